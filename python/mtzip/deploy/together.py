"""All tasks on the same input, as one graph that computes once what they compute alike.

``zipped(x)`` in evaluation mode without gradients runs such a graph if one pays: the networks are traced with the first
input of a kind, nodes of the tasks that apply the same operator to the same values are one node, and what depends on
weights alone (blocks put together, scales) is kept until a block changes. Everything else runs task by task, as do
networks that have hooks or have been changed since they were traced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ZipError
from ..trace.export import functionalise
from .calls import Calls, SameInput
from .exporting import batch_sizes, exported

if TYPE_CHECKING:
    from ..network.zipped import ZippedNetwork

#: The same functions by a shorter way: a call through ``torch.ops`` takes a microsecond more than one of these.
_FAST = {
    torch.ops.aten.linear.default: torch.nn.functional.linear,
    torch.ops.aten.conv1d.default: torch.conv1d,
    torch.ops.aten.conv2d.default: torch.conv2d,
    torch.ops.aten.relu.default: torch.relu,
    torch.ops.aten.flatten.using_ints: torch.flatten,
    torch.ops.aten.max_pool2d.default: torch.max_pool2d,
    torch.ops.aten.batch_norm.default: torch.batch_norm,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.mul.Tensor: torch.mul,
}

LEAST = 0.05  # of the operations have to be common for a graph to be used
MOST = 8  # times a network is traced

_MISSING: Any = object()


class Together:
    """The graphs of one zipped network, a kind of input each."""

    def __init__(self) -> None:
        self._graphs: dict[tuple, Graph | None] = {}
        self._traced = 0

    def __call__(self, zipped: ZippedNetwork, x: Any) -> dict[str, Any] | None:
        """Task to output, or None where the tasks are to run in turn."""
        if type(x) is not Tensor or x.dim() < 2 or not len(x) or torch.is_autocast_enabled(x.device.type):
            return None
        size, *form = x.shape
        kind = (*form, x.dtype, x.device)
        graph = self._graphs.get(kind, _MISSING)
        if graph is _MISSING or (graph is not None and not graph.is_current()):
            # A network whose settings change with every call would be traced for ever.
            self._traced += 1
            graph = self._graphs[kind] = Graph.of(zipped, x) if self._traced <= MOST else None
        if graph is None or size in graph.refused:
            return None
        return graph(x) if size in graph.proven else graph.prove(zipped, x)


class Graph:
    """One traced graph of all tasks.

    Args:
        tasks: in the order of its outputs.
        weights: holder and name of every parameter and buffer, in the order of its first inputs.
        prepare: from weights to what depends on them alone.
        run: from that and the input to the outputs.
        common: fraction of the operations of all tasks that is saved.
    """

    def __init__(self, tasks, weights, prepare: fx.GraphModule, run: fx.GraphModule, common: float):
        self.tasks, self.prepare, self.run, self.common = tasks, prepare, run, common
        self.proven: set[int] = set()  # batch sizes
        self.refused: set[int] = set()
        self._weights: list[tuple[dict[str, Tensor], str]] = weights
        self._seen: list[tuple[nn.Module, dict[str, Any]]] = []
        self._prepared: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, zipped: ZippedNetwork, x: Tensor) -> Graph | None:
        """The graph for inputs such as ``x``; None if there is none, or none that pays."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in zipped.networks.modules()) or not _have_common(zipped):
            return None
        example = x if len(x) > 1 else torch.cat([x, x])
        with torch.inference_mode(False), torch.no_grad():
            example = example.clone()
            try:
                calls = Calls(zipped, zipped.tasks, dict.fromkeys(zipped.tasks, example))
                if any(names != [""] for names in calls.output_names):
                    return None  # outputs in containers of their own
                weights = {key: tensor.detach() for key, tensor in calls.tensors.items()}
                sizes = dict.fromkeys(weights), batch_sizes(calls)[0]
                program = exported(SameInput(calls), calls, (weights, calls.inputs[0]), sizes)
            except (ZipError, ValueError, TypeError):
                return None
        if any(spec.kind.name != "USER_OUTPUT" for spec in program.graph_signature.output_specs):
            return None  # something is changed in place
        module, graph = program.graph_module, program.graph
        functionalise(graph)
        before = _operations(graph)
        merge_equal(graph)
        common = 1 - sum(_operations(graph).values()) / max(1, sum(before.values()))
        if common < LEAST:
            return None
        prepare, run = split(module, graph, len(weights))
        found = cls(zipped.tasks, _places(zipped, calls), prepare, run, common)
        found._seen = [(m, _state(m)) for m in zipped.networks.modules()]
        return found

    def is_current(self) -> bool:
        """Whether every module is as it was traced: children, parameters, settings, hooks."""
        try:
            return all(module.__dict__ == state for module, state in self._seen)
        except (RuntimeError, ValueError):  # another tensor in the place of one: their equality has no single truth
            return False

    def prove(self, zipped: ZippedNetwork, x: Tensor) -> dict[str, Any]:
        """The tasks' outputs in turn; a batch size counts as proven if the graph's are the same.

        A forward may do one thing for batches of four and another for the rest: a graph knows one of them.
        """
        expected = {task: network(x) for task, network in zipped.networks.items()}
        try:
            got = self(x)
            same = all(torch.allclose(got[task], expected[task], rtol=1e-5, atol=1e-6) for task in expected)
        except Exception:  # an operator that refuses this size
            same = False
        (self.proven if same else self.refused).add(len(x))
        return expected

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        weights = [holder[name] for holder, name in self._weights]
        state = [(p.data_ptr(), p._version) for p in weights]
        if self._prepared is None or self._prepared[0] != state:
            self._prepared = state, self.prepare(*weights)
        return dict(zip(self.tasks, self.run.forward(*self._prepared[1], x), strict=True))


def merge_equal(graph: fx.Graph) -> None:
    """Makes one node of those that apply the same operator to the same values."""
    first: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        try:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            other = first.setdefault(key, node)
        except TypeError:  # an argument without a hash
            continue
        if other is not node:
            node.replace_all_uses_with(other)
            graph.erase_node(node)


def split(module: fx.GraphModule, graph: fx.Graph, weights: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graphs: what the first ``weights`` placeholders determine, and the rest from that."""
    nodes = list(graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    from_weights = set(given[:weights])
    for node in nodes:
        if node.op == "call_function" and node.all_input_nodes and _is_pure(node.target):
            if all(arg in from_weights for arg in node.all_input_nodes):
                from_weights.add(node)
    kept = [node for node in nodes if node in from_weights and any(user not in from_weights for user in node.users)]
    first, second = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in from_weights:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(tuple(copies[node] for node in kept))
    copies = {node: second.placeholder(node.name) for node in kept}
    for node in nodes:
        if node not in from_weights:
            copies[node] = second.node_copy(node, copies.__getitem__)
    for part in (first, second):
        part.eliminate_dead_code()
        for node in part.nodes:
            node.target = _FAST.get(node.target, node.target)
    return fx.GraphModule(module, first), fx.GraphModule(module, second)


def _have_common(zipped: ZippedNetwork) -> bool:
    """Whether any parameter is every task's; without one nothing is common."""
    networks = list(zipped.networks.values())
    ids = [{id(p) for p in network.parameters()} for network in networks]
    return len(networks) > 1 and bool(set.intersection(*ids))


def _places(zipped: ZippedNetwork, calls: Calls) -> list[tuple[dict[str, Tensor], str]]:
    """Where the tensors of the calls are now, in their order."""
    found: dict[int, tuple[dict[str, Tensor], str]] = {}
    for module in zipped.networks.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (holder, name))
    return [found[id(tensor)] for tensor in calls.tensors.values()]


def _state(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; dictionaries copied, so that a change in them shows."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}


def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "operator")
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _frozen(value: Any) -> Any:
    """Arguments as something with a hash; numbers that are equal but of other types stay apart."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), value)


def _operations(graph: fx.Graph) -> dict[fx.Node, int]:
    """Floating-point operations of every node that multiplies matrices or convolves."""
    found = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        values = map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("val"))
        with FlopCounterMode(display=False) as counter:
            try:
                node.target(*values[0], **values[1])
            except Exception:
                continue
        count = counter.get_total_flops()
        found[node] = count if isinstance(count, int) else count.node.hint
    return found
