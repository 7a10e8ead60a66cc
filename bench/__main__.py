"""python -m bench [NAME ...]: run benchmarks, all of them by default."""

from __future__ import annotations

import argparse
import copy
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bench
from bench import timer


def benchmarks() -> dict[str, ModuleType]:
    """Every module of this package that has NAME, HELP and run, by NAME; operators first."""
    found = {}
    for info in pkgutil.iter_modules(bench.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"bench.{info.name}")
        if all(hasattr(module, name) for name in ("NAME", "HELP", "run")):
            found[module.NAME] = module
    order: Callable[[str], tuple[int, str]] = lambda name: (getattr(found[name], "ORDER", 9), name)  # noqa: E731
    return {name: found[name] for name in sorted(found, key=order)}


def file_of(given: str | None, name: str, several: bool) -> str | None:
    """The file a benchmark writes to: the one given, with the benchmark's name if several write."""
    if given is None or not several:
        return given
    path = Path(given)
    return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))


def main() -> None:
    """The command line."""
    modules = benchmarks()
    listed = "\n".join(f"  {name:22} {module.HELP}" for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # a benchmark may describe an option of all in its own words
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (all)")
    for module in modules.values():
        if hasattr(module, "add_arguments"):
            module.add_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there too; one file a benchmark")
    parser.add_argument("--plot", metavar="FILE", help="draw ratios to the baselines there; one file a benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, shorter timing")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in modules]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(modules)}")
    timer.check_device(parser, options)
    names = options.names or list(modules)
    for name in names:
        own = copy.copy(options)
        own.csv = file_of(options.csv, name, len(names) > 1)
        own.plot = file_of(options.plot, name, len(names) > 1)
        modules[name].run(own)


if __name__ == "__main__":
    main()
