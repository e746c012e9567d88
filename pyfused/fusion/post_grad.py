"""conv2d + relu in the graphs that Inductor has already lowered to ATen: a pass for any use of Inductor.

    torch.compile(model, options={"post_grad_custom_pre_pass": Pass()})

What backend="pyfused" finds comes earlier and is more: losses, activations and pools are taken apart before this runs,
and in training only the forward convolution is replaced, where that alone is faster. It is for those who must keep
another backend's front end.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .. import functional
from . import rival
from .graph import only_user


class Pass(CustomGraphPass):
    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.convolution.default and _is_plain(node):
                _fuse(graph, node, only_user(node))

    def uuid(self) -> str:
        """Names this pass in the keys of Inductor's cache."""
        from .. import __version__

        return f"pyfused {__version__}"


def _is_plain(convolution: fx.Node) -> bool:
    """Whether it is two-dimensional, not transposed, of a dtype that the op takes, and goes to a ReLU alone."""
    from ..ops.conv2d_relu import DTYPES

    transposed, value = convolution.args[6], convolution.meta.get("val")
    relu = only_user(convolution)
    return (
        relu is not None
        and relu.target is torch.ops.aten.relu.default
        and not transposed
        and value is not None
        and value.dim() == 4
        and value.dtype in DTYPES
    )


def _fuse(graph: fx.Graph, convolution: fx.Node, relu: fx.Node) -> None:
    args = (*convolution.args[:6], convolution.args[8])
    values = tuple(fx.map_arg(x, lambda node: node.meta["val"]) for x in args)
    if not rival.is_faster("conv2d + relu", functional.conv2d_relu, values, {}, values[0].dtype, training=False):
        return
    with graph.inserting_before(relu):
        fused = graph.call_function(torch.ops.pyfused.conv2d_relu.default, args)
    fused.meta = dict(relu.meta)
    relu.replace_all_uses_with(fused)
    graph.erase_node(relu)
    graph.erase_node(convolution)
