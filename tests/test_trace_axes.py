"""The algebra of axes: joining, cutting and refining dimensions never allows an order that is not one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtzip.trace.axes import Axes, Segment


def orders_of(axes: Axes, seed: int = 0) -> dict[int, torch.Tensor]:
    """A random order of every atom that may be reordered."""
    generator = torch.Generator().manual_seed(seed)
    return {
        atom: torch.randperm(axes[atom].size, generator=generator) for atom in axes.roots() if axes[atom].pinned is None
    }


def index(axes: Axes, dim, orders=None) -> list[int]:
    """Where every element of ``dim`` comes from, the identity spelled out."""
    found = axes.index(dim, orders_of(axes) if orders is None else orders)
    return list(range(axes.size(dim))) if found is None else found.tolist()


def test_a_refined_atom_is_its_segments_wherever_it_is_used():
    axes = Axes()
    whole = axes.new(12)
    heads = axes.new(3)
    inside = (Segment(whole[0].atom, 2, 5),)
    axes.refine(whole[0].atom, (Segment(heads[0].atom, 1, 4),))
    assert axes.resolve(whole) == (Segment(heads[0].atom, 1, 4),)
    assert axes.resolve(inside) == (Segment(heads[0].atom, 2, 20),)
    assert axes.roots() == [heads[0].atom]
    axes.refine(heads[0].atom, axes.new(1) + axes.new(2))
    assert [(s.outer, s.inner) for s in axes.resolve(inside)] == [(1, 20)] * 4
    assert axes.size(inside) == 120
    assert axes.resolve(None) is None


def test_a_residual_axis_cut_by_a_padded_shortcut():
    """32 channels that meet 8 zeros, a stream of 16 and 8 zeros: three axes, the middle one the stream's."""
    axes = Axes()
    stream, wide = axes.new(16), axes.new(32)
    padded = axes.new(8, uniform=True) + stream + axes.new(8, uniform=True)
    axes.unify(wide, padded, "add")
    segments = axes.resolve(wide)
    assert [axes[s.atom].size for s in segments] == [8, 16, 8]
    assert axes.resolve(stream) == (segments[1],)
    assert not any(axes[s.atom].uniform for s in segments)
    assert all(axes.is_free((s,)) for s in segments)


def test_query_heads_follow_their_group_of_keys():
    axes = Axes()
    queries, keys = axes.new(48), axes.new(16)
    query_heads, _ = axes.grid(queries, (6, 8), 0, "view")
    key_heads, _ = axes.grid(keys, (2, 8), 0, "view")
    axes.unify(query_heads, axes.multiply(key_heads, 1, 3), "attention")
    (query,), (key,) = axes.resolve(queries), axes.resolve(keys)
    assert (query.atom, query.inner, key.inner) == (key.atom, 24, 8)
    assert axes[key.atom].size == 2


def test_a_fused_output_splits_into_its_heads():
    """View as (3, heads, size) keeps the heads, three times; as (heads, 3 * size), the heads once."""
    axes = Axes()
    fused = axes.new(3 * 4 * 5)
    assert axes.grid_positions(fused, (3, 4, 5)) == [0, 1, 2]
    axes.grid(fused, (3, 4, 5), 1, "view")
    (only,) = axes.resolve(fused)
    assert (axes[only.atom].size, only.outer, only.inner) == (4, 3, 5)
    assert axes.grid_positions(fused, (3, 4, 5)) == [1]
    pieces = axes.cut(fused, 20, "split")
    assert axes.resolve(pieces[0]) == (Segment(only.atom, 1, 5),)
    assert axes.resolve(pieces[1]) == (Segment(only.atom, 2, 5),)


def test_what_cannot_be_reordered_says_why():
    axes = Axes()
    given, free, other = axes.new(6, "input0.1", "its order is given by the input"), axes.new(6), axes.new(9)
    axes.unify(free, given, "add")
    assert not axes.is_free(free)
    assert axes.why_pinned(free) == "its order is given by the input"
    axes.unify(other, axes.new(8), "mul")
    assert "mul joins dimensions of different size" in axes.why_pinned(other)
    axes.unify(left := axes.new(4), None, "sub")
    assert "unknown order" in axes.why_pinned(left)
    assert axes.unify(axes.new(4, uniform=True), None, "add") is None
    crossed = axes.new(4)[0].atom
    axes.unify((Segment(crossed, 2, 1),), (Segment(crossed, 1, 2),), "transposed")
    assert not axes.is_free((Segment(crossed),))
    with pytest.raises(ValueError, match="5 elements of its atom, got 4"):
        axes.refine(axes.new(5)[0].atom, axes.new(4))
    with pytest.raises(ValueError, match=r"multiply to 6, got \[4, 2\]"):
        axes.grid(axes.new(6), (4, 2), 0, "view")


def test_an_axis_joined_with_itself_turned_around_keeps_what_both_orders_allow():
    axes = Axes()
    first, second = axes.new(3), axes.new(5)
    axes.unify(first + second, second + first, "add")
    orders = orders_of(axes)
    assert index(axes, first + second, orders) == index(axes, second + first, orders)


SEGMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)
SIZES = st.lists(st.integers(1, 6), min_size=4, max_size=4)


def fitted(axes: Axes, dim, size: int):
    """``dim`` cut or filled up to so many elements."""
    have = axes.size(dim)
    return axes.cut(dim, size, "cut")[0] if have >= size else dim + axes.new(size - have)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIZES, SEGMENTS, SEGMENTS, SEGMENTS, st.integers(1, 40))
def test_joined_dimensions_have_one_order(sizes, first, second, third, size):
    """Dimensions that share atoms, joined: whatever order is left to the atoms, it is the same one in both."""
    axes = Axes()
    atoms = [axes.new(n)[0].atom for n in sizes]
    dims = [tuple(Segment(atoms[a], o, i) for a, o, i in spec) for spec in (first, second, third)]
    a, b, c = (fitted(axes, dim, size) for dim in dims)
    axes.unify(a, b, "one")
    axes.unify(b, c, "two")
    orders = orders_of(axes, 1)
    assert index(axes, a, orders) == index(axes, b, orders) == index(axes, c, orders)
    assert sorted(index(axes, a, orders)) == list(range(size))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIZES, SEGMENTS, st.integers(0, 60))
def test_a_cut_dimension_is_its_pieces(sizes, spec, at):
    axes = Axes()
    atoms = [axes.new(n)[0].atom for n in sizes]
    dim = tuple(Segment(atoms[a], o, i) for a, o, i in spec)
    at = min(at, axes.size(dim))
    left, right = axes.cut(dim, at, "split")
    assert (axes.size(left), axes.size(right)) == (at, axes.size(dim) - at)
    orders = orders_of(axes)
    whole = index(axes, dim, orders)
    assert whole == index(axes, left, orders) + [at + p for p in index(axes, right, orders)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIZES, SEGMENTS, st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2))
def test_a_split_dimension_is_reordered_along_one_of_its_parts(sizes, spec, shape, position):
    axes = Axes()
    atoms = [axes.new(n)[0].atom for n in sizes]
    total = shape[0] * shape[1] * shape[2]
    dim = fitted(axes, tuple(Segment(atoms[a], o, i) for a, o, i in spec), total)
    parts = axes.grid(dim, shape, position, "view")
    orders = orders_of(axes)
    assert [at for at, part in enumerate(parts) if part is not None] == [position]
    grid = torch.tensor(index(axes, dim, orders)).view(shape)
    expected = (
        torch.arange(total).view(shape).index_select(position, torch.tensor(index(axes, parts[position], orders)))
    )
    assert torch.equal(grid, expected)


def test_what_can_be_kept_is_kept():
    """Joining equal structures, and cutting at boundaries that are there, costs no freedom."""
    axes = Axes()
    a, b, c = axes.new(6), axes.new(4), axes.new(10)
    axes.unify(a + b, c, "add")
    assert [axes[atom].size for atom in axes.roots()] == [6, 4]
    axes.cut(c, 6, "split")
    axes.grid(a, (6, 1), 0, "view")
    free = [atom for atom in axes.roots() if axes.is_free((Segment(atom),))]
    assert sorted(axes[atom].size for atom in free) == [4, 6]
