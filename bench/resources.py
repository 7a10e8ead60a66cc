"""python -m bench.resources: registers and spilled bytes of the CUDA kernels, as the compiler says; needs no GPU."""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture; `spilled` bytes are stored and loaded again."""

    file: str
    kernel: str
    architecture: str
    registers: int
    spilled: int


def compiled(source: Path, architecture: str) -> list[Kernel]:
    """All kernels of a file.

    Raises:
        RuntimeError: nvcc does not compile it.
    """
    options = ["-std=c++17", "-O3", f"-I{CSRC / 'include'}", f"-I{CSRC}", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *options, "-cubin", "-o", f"{folder}/out", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr}")
    name, spilled, found = "", 0, []
    for line in done.stderr.splitlines():
        if entry := ENTRY.search(line):
            name = entry[1]
        elif spills := SPILLS.search(line):
            spilled = int(spills[1]) + int(spills[2])
        elif used := REGISTERS.search(line):
            found.append(Kernel(source.name, plain(name), f"sm_{architecture}", int(used[1]), spilled))
    return sorted(found, key=lambda kernel: kernel.kernel)


def plain(mangled: str) -> str:
    """name<arguments> of a kernel, without its namespaces and parameters."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").replace("mtz::cuda::", "").removeprefix("void ")
    return text.split("(")[0]


def table(kernels: list[Kernel]) -> list[dict[str, str]]:
    """One row a kernel, its registers an architecture a column, and what is spilled where anything is.

    Kernels of at most 64 registers that spill nothing are left out: they hold no sums.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for kernel in kernels:
        row = rows.setdefault((kernel.file, kernel.kernel), {"file": kernel.file, "kernel": kernel.kernel})
        spilled = f", {kernel.spilled} B spilled" if kernel.spilled else ""
        row[kernel.architecture] = f"{kernel.registers}{spilled}"
    large = {(kernel.file, kernel.kernel) for kernel in kernels if kernel.registers > 64 or kernel.spilled}
    return [row for name, row in rows.items() if name in large]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--csv", metavar="FILE", help="write the rows there too")
    parser.add_argument("--architecture", nargs="+", default=ARCHITECTURES, help="of %(default)s")
    options = parser.parse_args()
    jobs = [(source, arch) for source in sorted((CSRC / "cuda").glob("*.cu")) for arch in options.architecture]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda job: compiled(*job), jobs) for kernel in found]
    rows = table(kernels)
    for row in rows:
        print("  ".join(row.values()))
    if options.csv and rows:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
