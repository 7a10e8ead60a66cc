"""What a call costs before any work: one neuron against one."""

from __future__ import annotations

import argparse

import torch

import mtz_ext
from bench import timer
from mtz_ext import _native

NAME = "overhead"
HELP = "cost of a call: native, checked, torch.ops, public"
ORDER = 4

CALLS = 200  # a run


def run(options: argparse.Namespace) -> list[timer.Row]:
    """Microseconds a call of neuron_distances on 1 x 1, layer by layer; of torch's own operators beside it."""
    a = torch.ones(1, 1, device=options.device)
    out = torch.empty(1, 1, 1, device=options.device)
    batch = a.unsqueeze(0)
    arguments = (0, 0, 1, 1, 1, 1, a.data_ptr(), 1, 1, 1, a.data_ptr(), 1, 1, 1, out.data_ptr())
    backend = 1 if options.device.startswith("cuda") else 0
    execution = torch.cuda.current_stream().cuda_stream if backend else 1
    size = _native.native.neuron_distances_workspace(backend, execution, *arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=options.device)
    op = torch.ops.mtz.neuron_distances.default
    ways = {
        "public": lambda: mtz_ext.neuron_distances(a, a),
        "torch.ops": lambda: op(a, a),
        "checked": lambda: _native.call("neuron_distances", batch, *arguments),
        "native": lambda: _native.native.neuron_distances(backend, execution, workspace.data_ptr(), *arguments),
        "a @ b.T": lambda: a @ a.T,
        "torch.cdist": lambda: torch.cdist(a, a),
    }

    def many(way):
        def calls() -> None:
            for _ in range(CALLS):
                way()
            if timer.on_gpu(options):
                torch.cuda.synchronize()

        return calls

    calls = {name: many(way) for name, way in ways.items()}
    rows = timer.rows_of(NAME, f"{CALLS} calls", calls, timer.Work(), options, host=True)
    return timer.report(rows, options)
