"""Exported graphs made plain: none calls another graph. ``writes`` sees to operators that change values in place."""

from __future__ import annotations

from torch import fx


def inline(module: fx.GraphModule) -> None:
    """Puts the graphs that ``torch.no_grad()`` and a disabled autocast wrap into the graph that calls them.

    Nothing here computes gradients, so that such a call is its body.
    """
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            continue  # it changes the types its body computes with
        at = 1 if name == "wrap_with_set_grad_enabled" else 4
        body = getattr(module, node.args[at].target)
        inline(body)
        if any(inner.op == "get_attr" and inner.users for inner in body.graph.nodes):
            continue
        _replace(graph, node, body.graph, node.args[at + 1 :])


def _replace(graph: fx.Graph, node: fx.Node, body: fx.Graph, operands: tuple) -> None:
    values = dict(zip((inner for inner in body.nodes if inner.op == "placeholder"), operands, strict=True))
    results: tuple = ()
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                values[inner] = graph.node_copy(inner, values.__getitem__)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], values.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    holder = next(arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr")
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)
