"""Leaves: layers whose weight is assembled from blocks that tasks may share.

A leaf is a subclass of the layer's own class, so ``isinstance`` and the user's ``forward`` go on working; only its
weight and bias are properties. A block that two tasks share is one ``nn.Parameter``, registered in the leaves of both:
optimisers, ``deepcopy``, pickle and ``torch.save`` see plain parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .assembly import forget, kept
from .layout import Layout, pieces, totals

#: Entries of a weight (2 MiB in float32) up to which a copy is kept with everything folded in, for speed.
SMALL = 2**19


class SharedLayer:
    """Mixin of the leaf classes: weight and bias are assembled from blocks that tasks may share.

    The weight is the effective one, private scale included, so a ``forward`` that reads ``layer.weight`` itself
    computes the right thing. Where the whole layer is shared and carries no scale, it is the shared Parameter.
    """

    plain: type[nn.Module]
    layout: Layout

    @classmethod
    def wrap(cls, layer: nn.Module, layout: Layout, blocks: Mapping[str, nn.Parameter]) -> SharedLayer:
        """A leaf with the settings of ``layer`` and these blocks; ``layer`` itself is not changed.

        Args:
            layer: an instance of ``cls.plain``.
            layout: how the blocks make up the layer.
            blocks: every name of ``layout.weight_blocks()`` and ``layout.bias_blocks()``, and the scale if scaled.
        """
        leaf = cls.__new__(cls)
        # Hooks and child modules lie in dicts: copied, or a hook on the leaf would be a hook on the layer.
        leaf.__dict__.update({key: copy.copy(v) if isinstance(v, dict) else v for key, v in layer.__dict__.items()})
        leaf._parameters = {name: p for name, p in layer._parameters.items() if name not in layout.names}
        leaf.layout = layout
        for name, parameter in blocks.items():
            leaf.register_parameter(name, parameter)
        return leaf

    def dense(self) -> nn.Module:
        """The layer as its plain class again, with a weight and bias of its own."""
        layer = self.plain.__new__(self.plain)
        layer.__dict__.update({key: value for key, value in self.__dict__.items() if key != "layout"})
        own = {*self.layout.weight_blocks(), *self.layout.bias_blocks(), self.layout.scale_name}
        layer._parameters = {name: p for name, p in self._parameters.items() if name not in own}
        layer._buffers = dict(self._buffers)
        for name, value in zip(self.layout.names, (self.assembled_weight(), self.assembled_bias()), strict=True):
            layer.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
        return layer

    @property
    def is_whole(self) -> bool:
        """True where one block is the entire weight, so that using it copies nothing."""
        return len(self.layout.rows) == 1 and len(self.layout.weight_blocks()) == 1

    def unscaled_weight(self) -> Tensor:
        """The weight without private scale, rows first."""
        layout = self.layout
        if self.is_whole:
            return self._parameters[next(iter(layout.weight_blocks()))]
        full: dict[tuple[int, ...], Tensor] = {}
        for tasks in totals(layout.rows):
            parts = [_columns(self._parameters[name], where) for name, where, _ in layout.column_pieces(tasks)]
            full[tasks] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        rows = [_piece(full[run.tasks], where) for run, where in pieces(layout.rows)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def full_scale(self) -> Tensor:
        """Private scale of every row, [r]: one where it is this task's alone."""
        scale, parts, start = self._parameters[self.layout.scale_name], [], 0
        for run in self.layout.rows:
            if len(run.tasks) > 1:
                parts.append(_piece(scale, slice(start, start + run.size)))
                start += run.size
            else:
                parts.append(scale.new_ones(run.size))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def assembled_weight(self) -> Tensor:
        """The weight as the layer's ``forward`` reads it."""
        weight = self.unscaled_weight()
        if self.layout.scaled:
            weight = weight * self.full_scale().view(-1, *[1] * (weight.dim() - 1))
        return weight.transpose(0, 1) if self.layout.transposed else weight

    def assembled_bias(self) -> Tensor | None:
        """The bias, None for a layer without one."""
        if self.layout.bias is None:
            return None
        blocks = self.layout.bias_block
        parts = [_piece(self._parameters[blocks(run.tasks)], where) for run, where in pieces(self.layout.bias)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def train(self, mode: bool = True):
        """As ever; the weight is assembled anew."""
        forget(self)
        return super().train(mode)

    def __reduce_ex__(self, protocol):
        if type(self).__module__ == __name__ and type(self) not in LEAVES.values():  # a class made for another
            return _blank, (self.plain, self.layout.names), self.__getstate__()
        return super().__reduce_ex__(protocol)


class SharedWeight(SharedLayer):
    """Mixin for layers that call their parameters weight and bias, and put out one row a channel."""

    _trailing = 0  # dimensions of the output behind the channel

    @property
    def weight(self) -> Tensor:
        return self.assembled_weight()

    @property
    def bias(self) -> Tensor | None:
        return self.assembled_bias()

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, scale = kept(self, "operands", self._operands)
        if scale is None:
            return self._apply_weight(input, weight, bias)
        # Scaling the output keeps the shared weight as it is; scaling the weight would copy it at every call.
        output = self._apply_weight(input, weight, None)
        scale = scale.to(output.dtype)  # autocast: stay in its type
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            output = output * scale
            return output if bias is None else output + bias.to(output.dtype)
        output.mul_(scale)  # in place: on a CPU a pass over new memory takes several times as long
        return output if bias is None else output.add_(bias.to(output.dtype))

    def _operands(self, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and the scale of the output, None where the weight has it already."""
        if not (self.layout.scaled and self.is_whole):
            return self.weight, self.bias, None
        if keep and self.unscaled_weight().numel() <= SMALL:  # there two operators more cost more than a copy takes
            return self.weight, self.bias, None
        channel = (-1,) + (1,) * self._trailing
        bias = self.bias
        return self.unscaled_weight(), None if bias is None else bias.view(channel), self.full_scale().view(channel)

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class SharedLinear(SharedWeight, nn.Linear):
    """An ``nn.Linear`` of a zipped network."""

    plain = nn.Linear

    def _operands(self, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        large = self.in_features * self.out_features > SMALL and not self.is_whole
        if large and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return None, self.bias, self.full_scale() if self.layout.scaled else None
        return super()._operands(keep)

    def _apply_weight(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self._block_by_block(input, bias) if weight is None else F.linear(input, weight, bias)

    def _block_by_block(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The output, every block applied to its columns: the time of the dense product, and no weight of its size."""
        outputs = {}
        for tasks in totals(self.layout.rows):
            for name, where, at in self.layout.column_pieces(tasks):
                part = F.linear(input[..., at], _columns(self._parameters[name], where))
                outputs[tasks] = outputs[tasks].add_(part) if tasks in outputs else part
        rows = [outputs[run.tasks][..., where] for run, where in pieces(self.layout.rows)]
        output = torch.cat(rows, -1) if len(rows) > 1 else rows[0]
        return output if bias is None else output.add_(bias.to(output.dtype))


class SharedConv1d(SharedWeight, nn.Conv1d):
    """An ``nn.Conv1d`` of a zipped network."""

    plain = nn.Conv1d
    _trailing = 1


class SharedConv2d(SharedWeight, nn.Conv2d):
    """An ``nn.Conv2d`` of a zipped network."""

    plain = nn.Conv2d
    _trailing = 2


class SharedConv3d(SharedWeight, nn.Conv3d):
    """An ``nn.Conv3d`` of a zipped network."""

    plain = nn.Conv3d
    _trailing = 3


#: Plain layer class to its leaf. Any other class gets one made for it: see :func:`leaf_class`.
LEAVES: dict[type[nn.Module], type[SharedLayer]] = {
    leaf.plain: leaf for leaf in (SharedLinear, SharedConv1d, SharedConv2d, SharedConv3d)
}


def _columns(block: Tensor, where: slice) -> Tensor:
    """Columns of a block; the block itself if those are all."""
    return block if where.stop - where.start == block.shape[1] else block[:, where]


def _piece(block: Tensor, where: slice) -> Tensor:
    """Rows of a block; the block itself if those are all."""
    return block if where.stop - where.start == len(block) else block[where]


@cache
def leaf_class(plain: type[nn.Module], names: tuple[str, str] = ("weight", "bias")) -> type[SharedLayer]:
    """The leaf class of a layer class: a subclass whose parameters ``names`` are assembled.

    Args:
        plain: any module class, the user's own included.
        names: its weight and its bias.
    """
    if plain in LEAVES and names == ("weight", "bias"):
        return LEAVES[plain]
    properties = {
        names[0]: property(lambda leaf: kept(leaf, "weight", lambda keep: leaf.assembled_weight())),
        names[1]: property(SharedLayer.assembled_bias),
    }
    return type(f"Shared{plain.__name__}", (SharedLayer, plain), {"plain": plain, "__module__": __name__, **properties})


def _blank(plain: type[nn.Module], names: tuple[str, str]) -> SharedLayer:
    """An empty leaf for pickle and ``deepcopy`` to fill."""
    cls = leaf_class(plain, names)
    return cls.__new__(cls)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replaces every reference to ``old`` inside ``root``; returns the root, which is ``new`` if it was ``old``."""
    if root is old:
        return new
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return root


def leaves(network: nn.Module) -> Iterator[tuple[str, SharedLayer]]:
    """Path and leaf of every layer of ``network`` that stores shared blocks."""
    for path, module in network.named_modules():
        if isinstance(module, SharedLayer):
            yield path, module
