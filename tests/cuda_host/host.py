"""Builds csrc/cuda for the host, runs its operators there, and plants faults in copies of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
OPERATORS = ("neuron_distances", "sherman_morrison", "match_neurons", "conv2d_second_moment")
SCALARS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
COMPILER = os.environ.get("CXX", "c++")
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas"),
    "-DMTZ_MAX_BLOCKS=5",  # so that every kernel walks with a stride of its grid, or is launched in several goes
    "-DMTZ_ENOUGH_BLOCKS=6",  # so that small matrices are worked on in large tiles too, and in few slices
    "-DMTZ_ROUND_SHARE=1",  # so that not only matrices of thousands of rows are updated by several panels at once
    "-DMTZ_MOST_SUM_BYTES=5000000",  # so that sums are kept of a few tiles at a time
]


@dataclass(frozen=True)
class Schedule:
    """The order in which threads run; `eager`: asynchronous copies happen at once, not when they are waited for."""

    order: int = 0
    eager: bool = False
    seed: int = 0


FORWARD, BACKWARD = Schedule(), Schedule(order=1, eager=True)
SCHEDULES = (FORWARD, BACKWARD, Schedule(order=2, seed=1), Schedule(order=2, eager=True, seed=2))


class Fault(Exception):
    """The driver stopped: the address sanitizer, a barrier that not all threads reach, or the like."""


def _compile(source: Path, csrc: Path, extra: tuple[str, ...]) -> Path:
    """One object file, kept in the build folder under a hash of everything it is made of."""
    read = [*sorted((csrc / "cuda").glob("*.cuh")), *sorted((ROOT / "csrc/include/mtz").glob("*.h"))]
    read += [*sorted(HERE.glob("*.h")), HERE / "cuda/intrinsics.cuh", source]
    key = hashlib.sha256(repr((COMPILER, FLAGS, extra)).encode())
    for file in read:
        key.update(file.name.encode() + file.read_bytes())
    target = ROOT / "build/cuda_host" / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            command = [COMPILER, *FLAGS, *extra, f"-I{HERE}", f"-I{csrc}", f"-I{ROOT / 'csrc/include'}", "-x", "c++"]
            made = Path(scratch) / "out.o"
            done = subprocess.run([*command, "-c", source, "-o", made], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source} does not compile for the host:\n{done.stderr}")
            made.replace(target)
    return target


def build(csrc: Path = ROOT / "csrc") -> Path:
    """The driver with the operators of `csrc`."""
    present = [op for op in OPERATORS if (csrc / f"cuda/{op}.cu").exists()]
    defines = tuple(f"-DCUDA_HOST_{op.upper()}" for op in present)
    jobs = [(source, ()) for source in sorted((csrc / "cuda").glob("*.cu"))]
    jobs += [(HERE / "fibers.cpp", ()), (HERE / "driver.cpp", defines)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(job[0], csrc, job[1]), jobs))
    name = hashlib.sha256(repr(objects).encode()).hexdigest()[:20]
    driver = ROOT / "build/cuda_host" / f"driver-{name}"
    if not driver.exists():
        with tempfile.TemporaryDirectory(dir=driver.parent) as scratch:
            made = Path(scratch) / "driver"
            subprocess.run([COMPILER, "-fsanitize=address", *objects, "-o", made], check=True)
            made.replace(driver)
    return driver


def build_with(faults: list[tuple[str, str, str]]) -> Path:
    """The driver with all `faults` (file, place, instead); number i + 1 takes effect in a session with fault=i + 1.

    A place is text that occurs once, with «» around the expression or the statements that the fault replaces.
    """
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc/cuda", csrc / "cuda")
        (csrc / "cuda/intrinsics.cuh").unlink()  # the twin is taken
        for number, (file, place, instead) in enumerate(faults, 1):
            path = csrc / "cuda" / file
            text, found = path.read_text(), place.replace("«", "").replace("»", "")
            assert text.count(found) == 1, f"{file} has {text.count(found)} places {found!r}"
            before, _, rest = place.partition("«")
            original, _, after = rest.partition("»")
            if original.endswith(";"):
                both = f"if (cuda_host::fault == {number}) {{ {instead} }} else {{ {original} }}"
            else:
                both = f"(cuda_host::fault == {number} ? ({instead}) : ({original}))"
            path.write_text(text.replace(found, before + both + after))
        return build(csrc)


class Session:
    """A driver that is running; one call after another."""

    def __init__(self, driver: Path, shared_memory: int = 99 << 10, fault: int = 0, tensor_cores: bool = True):
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
        environment["CUDA_HOST_SHARED_MEMORY"] = str(shared_memory)
        environment["CUDA_HOST_FAULT"] = str(fault)
        environment["CUDA_HOST_TENSOR_CORES"] = str(int(tensor_cores))
        pipe = subprocess.PIPE
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([driver], stdin=pipe, stdout=pipe, stderr=self.errors, env=environment)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()

    def call(self, op: str, arguments: list[int], buffers: list[np.ndarray], schedule: Schedule) -> list[np.ndarray]:
        """Contents of all buffers after the call. Raises Fault if the driver stops, RuntimeError for a bad status."""
        head = [OPERATORS.index(op), schedule.order, int(schedule.eager), schedule.seed, len(arguments), *arguments]
        sent = np.array([*head, len(buffers)], dtype=np.int64).tobytes()
        for buffer in buffers:
            sent += np.int64(buffer.nbytes).tobytes() + buffer.tobytes()
        try:
            self.process.stdin.write(sent)
            self.process.stdin.flush()
        except BrokenPipeError:
            self._stopped()
        code, error = np.frombuffer(self._read(16), dtype=np.int64)
        after = [np.frombuffer(self._read(b.nbytes), dtype=b.dtype).reshape(b.shape).copy() for b in buffers]
        if code:
            raise RuntimeError(f"{op}: status {code}, device error {error}")
        return after

    def _read(self, size: int) -> bytes:
        got = self.process.stdout.read(size)
        if len(got) != size:
            self._stopped()
        return got

    def _stopped(self) -> None:
        self.process.wait()
        self.errors.seek(0)
        raise Fault(self.errors.read().decode(errors="replace")[:4000])


def memory(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The bytes an array covers, from its first to its last element, and where its element 0 is among them."""
    if array.size == 0:
        return np.empty(0, np.uint8), 0
    low, high = np.lib.array_utils.byte_bounds(array)
    flat = np.lib.stride_tricks.as_strided(array, shape=(1,) * array.ndim)
    start = flat.__array_interface__["data"][0] - low
    base = array
    while base.base is not None:
        base = base.base
    whole, _ = np.lib.array_utils.byte_bounds(base)
    raw = np.frombuffer(base.tobytes() if base.flags.c_contiguous else _refuse(), np.uint8)
    return raw[low - whole : high - whole], start


def _refuse() -> bytes:
    raise ValueError("views of C-contiguous arrays only")


def strides(array: np.ndarray) -> list[int]:
    return [s // array.itemsize for s in array.strides]


# --- the operators; `bfloat16` arrays are uint16 and named so ---------------------------------------------------------


def neuron_distances(
    session: Session, a: np.ndarray, b: np.ndarray, out: str = "", schedule: Schedule = FORWARD, kind: str = ""
) -> np.ndarray:
    """[batch, n, d], [batch, m, d] -> [batch, n, m]"""
    kind = kind or a.dtype.name
    out = out or ("float64" if kind == "float64" else "float32")
    (a_bytes, a_at), (b_bytes, b_at) = memory(a), memory(b)
    result = np.full((a.shape[0], a.shape[1], b.shape[1]), np.nan, out)
    arguments = [SCALARS[kind], SCALARS[out], *a.shape[:2], *b.shape[1:], a_at, *strides(a), b_at, *strides(b)]
    return session.call("neuron_distances", arguments, [a_bytes, b_bytes, result], schedule)[2]


def sherman_morrison(
    session: Session,
    inverse: np.ndarray,
    vectors: np.ndarray,
    weight: np.ndarray,
    schedule: Schedule = FORWARD,
    kind: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """[batch, d, d], [batch, k, d], [batch, k] -> the new inverse, with all memory it is a view of, and the status

    `kind` is the type of the vectors, where not that of the array.
    """
    base = inverse.base if inverse.base is not None and inverse.base.ndim == inverse.ndim else inverse
    buffer, at = memory(inverse)
    (x_bytes, x_at), (w_bytes, w_at) = memory(vectors), memory(weight)
    batch, k, d = vectors.shape
    status = np.full(batch, 77, np.int32)
    kinds = [SCALARS[inverse.dtype.name], SCALARS[kind or vectors.dtype.name]]
    arguments = [*kinds, batch, d, k, at, *strides(inverse), x_at, *strides(vectors), w_at, *strides(weight), 0]
    after = session.call("sherman_morrison", arguments, [buffer, x_bytes, w_bytes, status], schedule)
    result = base.copy()
    if inverse.size:
        low = np.lib.array_utils.byte_bounds(inverse)[0] - np.lib.array_utils.byte_bounds(base)[0]
        result.reshape(-1).view(np.uint8)[low : low + after[0].size] = after[0]
    return result, after[3]


def match_neurons(
    session: Session, distances: np.ndarray, count: int, schedule: Schedule = FORWARD
) -> tuple[np.ndarray, np.ndarray]:
    """[batch, n, m] -> pairs [batch, count, 2], greedily, and the status"""
    buffer, at = memory(distances)
    pairs, status = np.full((len(distances), count, 2), 77, np.int64), np.full(len(distances), 77, np.int64)
    arguments = [SCALARS[distances.dtype.name], 0, *distances.shape, count, at, *strides(distances)]
    return tuple(session.call("match_neurons", arguments, [buffer, pairs, status], schedule)[1:])


def conv2d_second_moment(
    session: Session,
    x: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    schedule: Schedule = FORWARD,
    kind: str = "",
) -> tuple[np.ndarray, int]:
    """[N, C, H, W] -> [groups, C / groups k, C / groups k] and the status"""
    kind = kind or x.dtype.name
    output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    side = x.shape[1] // groups * kernel[0] * kernel[1]
    out = np.full((groups, side, side), np.nan, "float64" if kind == "float64" else "float32")
    buffer, at = memory(x)
    shape = [SCALARS[kind], SCALARS[out.dtype.name], *x.shape, groups, *kernel, *stride, *dilation, *padding, *output]
    status = np.full(1, 77, np.int32)
    after = session.call("conv2d_second_moment", [*shape, at, *strides(x)], [buffer, out, status], schedule)
    return after[1], int(after[2][0])
