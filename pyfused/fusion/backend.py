"""torch.compile(model, backend="pyfused"): fused calls in the graphs that TorchDynamo captures, the rest by Inductor.

The graphs are rewritten before AOTAutograd sees them, so the ops bring their own backward. What Inductor does as well
is left to it: see rival.py. pyproject.toml registers `compile_graph` under the entry point torch_dynamo_backends.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from . import conv, embedding, losses, rival
from .graph import Match, call_of, distinct, rewrite
from .head import Deferred

# What may stand between a linear layer and its cross-entropy, as methods of the logits.
_METHODS = {"float", "to", "contiguous", "view", "reshape", "flatten", "tanh", "div", "mul"}
_OPERATORS = {
    operator.getitem: "__getitem__",
    operator.truediv: "div",
    operator.mul: "mul",
    torch.tanh: "tanh",
    torch.reshape: "reshape",
    torch.flatten: "flatten",
}


def compile_graph(gm: fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None):
    """A torch.compile backend; mode and options are Inductor's."""
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx

    patches = (torch._inductor.list_mode_options(mode) if mode else {}) | (options or {})
    return compile_fx(fuse_graph(gm), example_inputs, config_patches=patches or None)


def fuse_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace what matches in a captured graph and pays, in place."""
    found = (m for find in (find_heads, losses.find, conv.find, embedding.find) for m in find(gm.graph, gm))
    matches = distinct(m for m in found if isinstance(m, Match))
    rewrite(gm.graph, [m for m in matches if rival.pays(m, gm)])
    gm.recompile()
    return gm


def find_heads(graph: fx.Graph, root: fx.GraphModule) -> Iterator[Match]:
    """linear, calls that leave its rows alone, cross_entropy: each taken by the next one only."""
    for node in graph.nodes:
        loss = call_of(node, root)
        if loss is None or loss.name != "cross_entropy" or loss["size_average"] or loss["reduce"]:
            continue
        nodes, steps = [node], []
        while isinstance(last := nodes[0].args[0] if nodes[0].args else None, fx.Node) and len(last.users) == 1:
            nodes.insert(0, last)
            call = call_of(last, root)
            if call is not None and call.name == "linear":
                kwargs = {name: loss[name] for name in ("weight", "ignore_index", "reduction", "label_smoothing")}
                args = (call["input"], call["weight"], call["bias"], loss["target"], tuple(steps))
                yield Match("linear + cross_entropy", tuple(nodes), head_loss, args, kwargs)
                break
            name = _OPERATORS.get(last.target, last.target if last.target in _METHODS else None)
            if name is None:
                break
            steps.insert(0, (name, tuple(last.args[1:]), dict(last.kwargs)))


def head_loss(rows, linear_weight, linear_bias, target, steps, **options):
    """cross_entropy of a linear layer's outputs after `steps`; without the logits if the steps allow it."""
    logits = Deferred.of(rows, linear_weight, linear_bias)
    for name, args, kwargs in steps:
        logits = getattr(logits, name)(*args, **kwargs)
    return F.cross_entropy(logits, target, **options)
