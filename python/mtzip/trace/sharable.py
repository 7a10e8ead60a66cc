"""How much of a network can be shared: its parameters by what they are, and why the rest stays private."""

from __future__ import annotations

from dataclasses import dataclass, field

from .analysis import Analysis, Note
from .layers import OUTPUT


@dataclass
class Sharable:
    """Parameters of a network, counted.

    Args:
        free: of layers whose rows lie on axes that can be shared.
        heads: of layers that write an output of the network, embedding tables among them.
        private: of layers and weights that cannot be shared for another reason.
        other: of normalisation layers, embedding tables, positions: no neurons.
        notes: what is private and why, heads first.
    """

    free: int = 0
    heads: int = 0
    private: int = 0
    other: int = 0
    notes: list[Note] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.free + self.heads + self.private + self.other

    @property
    def fraction(self) -> float:
        """Sharable parameters of what has neurons and is no head."""
        return self.free / max(self.free + self.private, 1)


def sharable(analysis: Analysis) -> Sharable:
    """Counts what of an analysed network can be shared with a network of the same architecture."""
    result, private = Sharable(), []
    exported, axes = analysis.exported, analysis.axes
    sizes = {path: exported.tensor(path).numel() for path in exported.tensors.values()}
    for layer in analysis.layers.values():
        size = sizes.pop(layer.weight) + (sizes.pop(layer.bias, 0) if layer.bias is not None else 0)
        segments = axes.resolve(layer.rows)
        rows = axes.size(segments)
        free = sum(axes.length(segment) for segment in segments if axes.is_free((segment,)))
        free = 0 if layer.private else size * free // rows
        result.free += free
        reason = layer.private or axes.why_pinned(segments)
        if free == size:
            continue
        if reason == OUTPUT or layer.weight in analysis.tables:
            result.heads += size - free
            result.notes.append(Note(layer.name, reason))
        else:
            result.private += size - free
            private.append(Note(layer.name, reason or "a single channel"))
    for path in analysis.unshared:
        result.private += sizes.pop(path, 0)
    named = {path for path, _ in exported.network.named_parameters()}
    result.other = sum(size for path, size in sizes.items() if path in named)
    result.notes += private + analysis.notes
    return result
