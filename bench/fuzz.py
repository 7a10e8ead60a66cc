"""Malformed files: every one of thousands gives a clear error or the right network, and nothing in it is executed.

python -m bench fuzz [--cases 5000] [--seed 0]

A case takes the file of a small zipped network, changes it, puts a right checksum on it where the change is meant to
get past that, and loads it. What may happen: ``ValueError``, ``OSError``, or a network whose state dict is what another
reader finds in the file. Anything else is a fault: another exception, other weights, more than ten seconds, more than
a gigabyte, or a file opened, a module imported, code compiled, a process started while loading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import mtzip

NAME = "fuzz"
HELP = "malformed files: each a clear error or the right network, nothing executed"
ORDER = 8
SECONDS, MEMORY = 10, 2**30  # of one case at most; more than the process has
_WATCHED = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.")


class Net(nn.Module):
    """A little of everything: convolution, BatchNorm with its counters, linear layers."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6 * 4, 8), nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Hang(BaseException):
    """A case took too long; no OSError, which loading may raise."""


class File:
    """A file taken apart, to be changed and put together again.

    Args:
        data: its bytes.
    """

    def __init__(self, data: bytes):
        start = 8 + int.from_bytes(data[:8], "little")
        self.data, self.header, self.tensors = data, json.loads(data[8:start]), data[start:]
        self.document = json.loads(self.header.pop("__metadata__")["mtzip"])
        self.document["sha256"] = "0" * 64

    def bytes(self) -> bytes:
        """The file of the parts as they are now, with the right checksum."""
        text = json.dumps(self.document, separators=(",", ":"))
        return signed(json.dumps({**self.header, "__metadata__": {"mtzip": text}}), self.tensors)


def signed(header: str, tensors: bytes) -> bytes:
    """A file of this header and data, the checksum in place of its 64 zeros."""
    text = header.encode("utf-8", "surrogatepass")
    data = len(text).to_bytes(8, "little") + text + tensors
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


# -- what is done to a file: (rng, bytes) -> bytes ---------------------------------------------------------------

_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "b", "0", "F32", "I64", "\ud800", "\0", "x" * 10_000, "../../etc/passwd", "/etc/passwd", "__class__"),
    *("os.system", "__import__('os').system('true')", "networks.a", "networks.a.head.weight", "shared", "conv.forward"),
    *([], {}, [[]], [0], [0, 1], [[0], 1], [[0, 1], 4], [2**40, 2**40], {"a": 1}, {"": {}}, [None] * 1000),
]
_NAMES = ["a", "b", "", ".", "..", "../x", "/", "__dict__", "networks.a.forward", "shared.x", "x" * 5000, "\ud800", "é"]


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(rng.choice((8, header, len(data))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(rng: random.Random, data: bytes) -> bytes:
    a, b, c = sorted(rng.randrange(len(data)) for _ in range(3))
    noise = rng.randbytes(rng.choice((1, 8, 1000)))
    return rng.choice(
        (
            data[:a] + data[b:],
            data[:a] + noise + data[a:],
            data[:a] + data[b:c] + data[a:b] + data[c:],
            data + data[a:b],
        )
    )


def sized(rng: random.Random, data: bytes) -> bytes:
    """Another length of the header."""
    true = int.from_bytes(data[:8], "little")
    size = rng.choice((0, 1, 2, true - 1, true + 1, true + 8, len(data), len(data) - 8, 10**8, 2**31, 2**40, 2**64 - 1))
    return max(0, size).to_bytes(8, "little") + data[8:]


def nested(rng: random.Random, data: bytes) -> bytes:
    """JSON as deep, long or odd as it gets."""
    count = rng.choice((10, 500, 20_000, 200_000))
    text = rng.choice(
        (
            "[" * count,
            '{"a":' * count,
            '{"a":' + "[" * count + "]" * count + "}",
            "{" + ",".join(f'"{at}":0' for at in range(min(count, 20_000))) + "}",
            '{"a":' + "9" * count + "}",
            '{"a":1e' + "9" * min(count, 500) + "}",
            '{"a":NaN}',
            '{"a":1,"a":2}',
            '{"__metadata__":{"mtzip":"' + '{\\"sha256\\":\\"' + "0" * 64 + '\\"}"}}',
            '{"__metadata__":{"mtzip":' + "[" * count + "]" * count + "}}",
            "\ud800" * 8,
        )
    )
    return signed(text, File(data).tensors)


def edited(rng: random.Random, data: bytes) -> bytes:
    """One to three values of the manifest or the header replaced, removed or renamed, under a right checksum."""
    file = File(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(rng.choice((file.document, file.document, file.header))))
        if not places:
            break
        holder, key = rng.choice(places)
        if isinstance(holder, list):
            change = rng.randrange(3)
            if change == 0:
                holder[key] = rng.choice(_VALUES)
            elif change == 1:
                holder.insert(key, rng.choice([*_VALUES, holder[key]]))
            else:
                del holder[key]
        elif rng.random() < 0.6:
            holder[key] = rng.choice(_VALUES)
        else:
            value = holder.pop(key)
            if rng.random() < 0.6:
                holder[rng.choice([*_NAMES, *map(str, holder)])] = value
    return file.bytes()


def resized(rng: random.Random, data: bytes) -> bytes:
    """A tensor of another shape, type or place, under a right checksum."""
    file = File(data)
    entry = file.header[rng.choice(sorted(file.header))]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    change = rng.randrange(6)
    if change == 0:
        entry["shape"] = rng.choice(
            ([], shape[::-1], [*shape, 1], [1] * 70, [0, *shape], [2**62, 2**62], [-1, *shape[1:]])
        )
    elif change == 1:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "U8", "C64", "F8_E4M3", "Q4", ""))
    elif change == 2:
        step = rng.choice((-8, -4, 4, 8, len(file.tensors), 2**62))
        entry["data_offsets"] = [start + step, stop + rng.choice((0, step))]
    elif change == 3:
        file.tensors = file.tensors[: rng.randrange(len(file.tensors))]
    elif change == 4:
        file.tensors += bytes(rng.choice((1, 4, 1000)))
    else:
        other = file.header[rng.choice(sorted(file.header))]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    return file.bytes()


def overwritten(rng: random.Random, data: bytes) -> bytes:
    """Other weights under a right checksum: a right file of another network."""
    file = File(data)
    values = bytearray(file.tensors)
    for _ in range(rng.choice((1, 10, 100))):
        values[rng.randrange(len(values))] = rng.randrange(256)
    file.tensors = bytes(values)
    return file.bytes()


def foreign(rng: random.Random, data: bytes) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (
            lambda: rng.randbytes(rng.randrange(2000)),
            lambda: b"PK\x03\x04" + rng.randbytes(200),
            lambda: b"\x80\x04c" + b"os\nsystem\n(S'true'\ntR.",
            lambda: b"\x08" + bytes(7) + b'{"a":0} ' + rng.randbytes(50),
            lambda: bytes(rng.randrange(3000)),
        )
    )()


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    change.__name__: change
    for change in (edited, resized, flipped, truncated, spliced, sized, nested, overwritten, foreign)
}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


# -- trying one ----------------------------------------------------------------------------------------------------


class Fuzzer:
    """Loads changed files and says what came of them.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        networks = {"a": Net(3).eval(), "b": Net(4).eval()}
        zipped = mtzip.zip_networks(networks, {task: torch.randn(32, 2, 2, 2) for task in networks}, share=0.7)
        self.path, self.networks = folder / "z.safetensors", networks
        mtzip.save(zipped, self.path)
        self.data = self.path.read_bytes()
        self.inputs = torch.randn(2, 2, 2, 2)

    def attempt(self, data: bytes) -> str:
        """ "refused" or "right", or what went wrong."""
        self.path.write_bytes(data)
        with _watched(self.path) as events:
            try:
                zipped = mtzip.load(self.path, self.networks)
            except (ValueError, OSError) as error:
                return f"executed {events[0]}" if events else "refused" if str(error) else "an error without a word"
            except Hang:
                return f"more than {SECONDS} s"
            except BaseException as error:
                return f"{type(error).__name__}: {str(error)[:200]}"
        if events:
            return f"executed {events[0]}"
        expected, state = safetensors.torch.load(data), zipped.state_dict()
        same = expected.keys() == state.keys() and all(_same(state[key], value) for key, value in expected.items())
        with torch.no_grad():
            zipped({task: self.inputs for task in zipped})
        return "right" if same else "another network"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    plain = [x.contiguous().flatten().view(torch.uint8) if x.numel() else x for x in (a, b)]  # NaN is NaN
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*plain)


_listener: list[Callable[[str, tuple], None]] = []


def _audit(event: str, args: tuple) -> None:
    for listen in _listener:
        listen(event, args)


@contextmanager
def _watched(path: Path) -> Iterator[list[str]]:
    """Collects what the interpreter reports while loading; limits time and memory."""
    events: list[str] = []

    def listen(event: str, args: tuple) -> None:
        reads = event == "open" and Path(str(args[0])) == path and args[1] in ("rb", "r")
        if event.startswith(_WATCHED) and not reads and event != "os.fspath":
            events.append(f"{event} {str(args)[:80]}")

    def stop(*_) -> None:
        raise Hang

    if not getattr(_audit, "there", False):
        sys.addaudithook(_audit)
        _audit.there = True
    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _listener.append(listen)
    try:
        yield events
    finally:
        _listener.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _virtual() -> int:
    """Bytes of address space this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def attempts(cases: int, seed: int, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Kind, seed and outcome of every case."""
    fuzzer = Fuzzer(folder)
    fuzzer.attempt(fuzzer.data)  # imports what the first load imports
    if fuzzer.attempt(fuzzer.data) != "right":
        raise RuntimeError(f"the file as saved must load, got {fuzzer.attempt(fuzzer.data)}")
    kinds = list(KINDS)
    weights = [8 if kind in ("edited", "resized") else 2 for kind in kinds]
    for case in range(seed, seed + cases):
        rng = random.Random(case)
        kind = rng.choices(kinds, weights)[0]
        yield kind, case, fuzzer.attempt(KINDS[kind](rng, fuzzer.data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of this benchmark."""
    parser.add_argument("--cases", type=int, default=5000, help="malformed files to try (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them (%(default)s)")


def run(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Tries them all, prints a table and every fault.

    Raises:
        SystemExit: there was a fault.
    """
    cases = 500 if options.quick else options.cases
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = list(attempts(cases, options.seed, Path(folder)))
    seconds = time.perf_counter() - start
    counts = Counter((kind, outcome) for kind, _, outcome in found)
    print(f"\n{cases:,} malformed files in {seconds:.0f} s, peak {_peak():,.0f} MB")
    print(f"{'kind':14}{'tried':>8}{'refused':>10}{'right':>8}{'faults':>8}")
    for kind in KINDS:
        tried = sum(count for (name, _), count in counts.items() if name == kind)
        refused, right = counts[kind, "refused"], counts[kind, "right"]
        print(f"{kind:14}{tried:8,}{refused:10,}{right:8,}{tried - refused - right:8,}")
    faults = [case for case in found if case[2] not in ("refused", "right")]
    for kind, case, outcome in faults[:20]:
        print(f"case {case}, {kind}: {outcome}")
    if faults:
        raise SystemExit(f"{len(faults)} of {cases} cases are faults")
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
