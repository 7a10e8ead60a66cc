"""Benchmarks: one file an operator, the cost of a call, and whole zips. ``python -m bench --help``.

A benchmark is a module of this package with NAME, HELP and ``run(options) -> list of rows``, which prints its own
table; ``add_arguments(parser)`` is optional.
"""
