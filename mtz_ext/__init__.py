"""Kernels of Multi-Task Zipping: tensors in, tensors out.

Every function works on float32 and float64 tensors on the CPU or, if built with CUDA, on a GPU, with any leading batch
dimensions and strides, honours ``torch.set_num_threads`` (the result does not depend on it), and works inside
``torch.compile(fullgraph=True)``. None has a derivative: inputs that require grad are refused.
"""

from mtz_ext import reference
from mtz_ext._native import native as _n
from mtz_ext.ops.conv2d_second_moment import conv2d_second_moment
from mtz_ext.ops.match_neurons import match_neurons
from mtz_ext.ops.neuron_distances import neuron_distances
from mtz_ext.ops.sherman_morrison import sherman_morrison_

has_cuda: bool = _n.has_cuda
"""Whether this build has CUDA kernels."""

__all__ = [
    "conv2d_second_moment",
    "has_cuda",
    "match_neurons",
    "neuron_distances",
    "reference",
    "sherman_morrison_",
]
