"""Tracing networks that are hard to export, and what of their outputs counts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from nets import IMAGE, Functional, analysed, axes_of, corresponding, free_axes, mlp, noise, reordering_error, seeded
from torch import nn

from mtzip import ZipError
from mtzip.inputs import as_batch
from mtzip.trace.analysis import Analysis
from mtzip.trace.export import export

PICTURES = noise(4, *IMAGE)


def test_a_fixed_batch_size_is_noticed():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.view(3, 6))

    assert analysed(seeded(Fixed), noise(4, 6)).exported.fixed_batch == 3
    assert analysed(seeded(mlp), noise(4, 6)).exported.fixed_batch is None


def test_a_torch_too_old_to_trace_is_named(monkeypatch):
    monkeypatch.setattr("mtzip.trace.export.Dim", object())  # as torch 2.4 and 2.5 have it, without AUTO
    with pytest.raises(ZipError, match=r"no Dim\.AUTO, expected torch 2\.6 or newer"):
        analysed(seeded(mlp), noise(4, 6))


def test_control_flow_on_values_cannot_be_exported():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else x

    with pytest.raises(ZipError, match=r"task 'b': Branching cannot be exported(.|\n)*wrap it") as refused:
        analysed(seeded(Branching), noise(4, 6), "b")
    here, line = Branching.forward.__code__.co_filename, Branching.forward.__code__.co_firstlineno + 1
    assert f"It stopped at {here}:{line}, in forward: return self.net(x) if x.sum() > 0 else x" in str(refused.value)
    with pytest.raises(ZipError, match="'b'"):
        analysed(seeded(mlp), noise(4, 7), "b")


def test_what_is_wrapped_in_no_grad_is_part_of_the_graph():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Linear(6, 5), mlp(5)

        def forward(self, x):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                x = self.body(x).relu()
            return self.top(x)

    analyses, found = corresponding((seeded(Frozen), noise(4, 6)), (seeded(Frozen, 1), noise(4, 6)))
    assert axes_of(found) == {"body": (5, 5), "top.0": (8, 8), "top.2": (5, 5)}
    assert not any("wrap" in str(node.target) for node in analyses[0].exported.graph.nodes)


def test_the_network_traced_is_a_frozen_copy():
    network = seeded(Functional).train()
    before = copy.deepcopy(network.state_dict())
    analysis = analysed(network, PICTURES)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in analysis.exported.network.parameters())
    assert not analysis.exported.network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_two_inputs_and_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(10, 2)

        def forward(self, first, second=None):
            return {"logits": self.head(torch.cat([self.left(first), self.right(second)], 1).relu())}

    batch = as_batch({"first": noise(4, 3), "second": noise(4, 5)})
    analysis = Analysis(export("t", seeded(Two), batch))
    assert list(free_axes(analysis).values()) == [["left"], ["right"]]


@dataclasses.dataclass
class Answer:
    """An output as libraries return them: with a cache that is no tensor."""

    logits: torch.Tensor
    encoder_last_hidden_state: torch.Tensor
    cache: object


class Answering(nn.Module):
    def __init__(self, form=lambda logits, hidden: Answer(logits, hidden, object())):
        super().__init__()
        self.body, self.head, self.form = nn.Linear(6, 5), nn.Linear(5, 3), form

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.form(self.head(hidden), hidden)


@pytest.mark.parametrize(
    "form, select, free",
    [
        (lambda logits, hidden: Answer(logits, hidden, object()), None, True),
        (lambda logits, hidden: Answer(logits, hidden, object()), "encoder_last_hidden_state", False),
        (lambda logits, hidden: Answer(logits, hidden, object()), lambda answer: answer.logits[:, :2], True),
        (lambda logits, hidden: (logits, hidden), None, False),
        (lambda logits, hidden: (logits, hidden), 0, True),
        (lambda logits, hidden: {"logits": logits, "aux": hidden}, None, False),
        (lambda logits, hidden: {"logits": logits, "aux": hidden}, "logits", True),
        (lambda logits, hidden: (logits, object()), None, True),
    ],
)
def test_what_of_the_output_counts(form, select, free):
    """Only what counts fixes an order."""
    exported = export("t", seeded(lambda: Answering(form)), as_batch(noise(4, 6)), select)
    analysis = Analysis(exported)
    assert analysis.axes.is_free(analysis.layers["body"].rows) == free
    (output, *rest) = exported.outputs(exported.network, exported.example)
    assert not rest or select is None
    assert output.shape[0] == exported.example.size


def test_an_output_that_cannot_be_selected_is_refused():
    with pytest.raises(ZipError, match=r"outputs must name a part of the network's output, got 'scores'.*'logits'"):
        export("t", seeded(Answering), as_batch(noise(4, 6)), "scores")
    with pytest.raises(ZipError, match="must put out tensors, got tuple"):
        export("t", seeded(lambda: Answering(lambda logits, hidden: (object(),))), as_batch(noise(4, 6)))


def test_sizes_that_depend_on_values():
    """Features of the last marked position, as sequence classifiers take it: a boolean index, then a view."""

    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, ids):
            x = self.body(self.embed(ids)).relu()
            return self.head(x[ids.eq(2), :].view(x.size(0), -1, 6)[:, -1])

    ids = torch.cat([torch.randint(3, 9, (4, 5)), torch.full((4, 1), 2)], 1)
    analysis = analysed(seeded(Marked), ids)
    assert list(free_axes(analysis).values()) == [["body"]]
    assert reordering_error(analysis, as_batch(ids[:3])) < 1e-9
