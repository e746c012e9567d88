"""Conv1d or Conv2d [+ BatchNorm2d in eval mode] [+ addition] + activation; after a ReLU, or before it, MaxPool2d.

A maximum may be taken before or after ReLU: both are monotone, so values and gradients are the same. Without an
activation, Conv2d + BatchNorm2d become one convolution, and Conv2d alone, as before a BatchNorm2d in training, is still
faster by Winograd's algorithm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import functional
from ..memory import constant
from ..ops import conv2d_relu as conv_op
from ..ops import conv_act
from .graph import ACTIVATIONS, Call, Match, Refusal, call_of, calls_of, only_user, why_not, writes_between

_POOL_PROBLEMS = {"padding": (0, (0, 0), [0, 0]), "dilation": (1, (1, 1), [1, 1]), "ceil_mode": (False,)}


def find(graph: fx.Graph, root: nn.Module) -> Iterator[Match | Refusal]:
    taken = set()  # nodes of matches: of two convolutions that are added, the first has the addition
    for node in graph.nodes:
        call = call_of(node, root)
        if call is not None and call.name in ("conv1d", "conv2d"):
            found = _match(node, call, root, taken)
            taken |= set(found.nodes) if isinstance(found, Match) else set()
            yield found


def _match(node: fx.Node, conv: Call, root: nn.Module, taken: set) -> Match | Refusal:
    place, pattern = conv.module or node.name, f"{conv.name} + activation"
    chain, calls, problem = [node], [conv], _module_problem(conv, root)
    if conv["padding_mode"] != "zeros":
        problem = f"padding_mode is {conv['padding_mode']!r}; the kernels pad with zeros"
    if problem:
        return Refusal(pattern, place, problem)
    while problem is None:
        following = only_user(chain[-1])
        more = [] if following is None else calls_of(following, root)
        if not more or not all(_joins(c, chain[-1], following, calls + more[:i]) for i, c in enumerate(more)):
            break
        problem = next(filter(None, (_module_problem(c, root) or _problem(c) for c in more)), None)
        if following in taken:
            problem = "what follows is fused with the convolution that it is added to"
        if problem is None:
            chain += [following] * len(more)
            calls += more
    if not ACTIVATIONS & {c.name for c in calls}:
        follows = _describe(only_user(chain[-1]), chain[-1], root)
        kept = next((i for i, c in enumerate(calls) if c.name in _NAMES), len(calls))
        if kept < len(calls):
            problem = problem or f"{_NAMES[calls[kept].name]} follows, and then {follows}"
        chain, calls = chain[:kept], calls[:kept]
        if "batch_norm" not in {c.name for c in calls}:
            chain, calls, problem = chain[:1], calls[:1], problem or follows
            if conv.name == "conv1d":
                return Refusal(pattern, place, problem)
    if len(chain) > 1 and (writing := writes_between(chain, root)):
        return Refusal(pattern, place, f"{writing.name}, which runs between its parts, may write to a tensor")
    return _build(chain, calls, place, problem or "")


_NAMES = {"max_pool2d": "MaxPool2d", "add": "an addition"}


def _joins(call: Call, last: fx.Node, node: fx.Node, calls: list[Call]) -> bool:
    """Whether the call that `node` makes continues `calls`, whose result is `last`."""
    names = {c.name for c in calls} - {"identity"}
    activated = names & ACTIVATIONS
    if call.name == "add":
        return not activated and not names & {"add", "max_pool2d"} and _residual(call, last, node) is not None
    if call.arguments.get("input") is not last:
        return False
    if call.name == "identity":
        return True
    if call.name == "batch_norm":
        return names == {"conv2d"}
    if call.name == "max_pool2d":
        return "conv2d" in names and not names & {"add", "max_pool2d"} and activated <= {"relu"}
    return call.name in ACTIVATIONS and not activated and ("max_pool2d" not in names or call.name == "relu")


def _writes(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _residual(add: Call, last: fx.Node, node: fx.Node) -> fx.Node | None:
    """What is added to `last`, if it is a tensor and nothing but `last` is written to."""
    mine = add["input"] is last
    other = add["other"] if mine else add["input"]
    fits = isinstance(other, fx.Node) and other is not last and add["alpha"] == 1 and (mine or not _writes(node))
    return other if fits else None


def _module_problem(call, root: nn.Module) -> str | None:
    return None if call.module is None else why_not(root.get_submodule(call.module))


def _problem(call) -> str | None:
    """Why this call cannot be part of the fused one."""
    if call.name == "batch_norm" and call["training"]:
        return "BatchNorm2d stands before the activation and is in training mode, where it depends on the whole batch"
    if call.name == "gelu" and call["approximate"] not in ("none", "tanh"):
        return f"gelu has approximate={call['approximate']}"
    if call.name == "max_pool2d":
        if call["return_indices"]:
            return "MaxPool2d has return_indices"
        for name, plain in _POOL_PROBLEMS.items():
            if call[name] not in plain:
                return f"MaxPool2d has {name}={call[name]}"
    return None


def _describe(following: fx.Node | None, node: fx.Node, root: nn.Module) -> str:
    if following is None:
        return "its output is used in several places" if node.users else "its output is not used"
    if following.op == "output":
        return "its output is what the module returns"
    if following.op == "call_module":
        module, call = root.get_submodule(following.target), call_of(following, root)
        problem = why_not(module) if call is not None and call.name in ACTIVATIONS else None
        return problem or f"{type(module).__name__} follows, which is not fused"
    return f"{getattr(following.target, '__name__', following.target)} follows, which is not fused"


def _build(chain: list, calls: list[Call], place: str, note: str) -> Match:
    """chain: for each of the calls its node."""
    conv, by_name = calls[0], {c.name: c for c in calls}
    norm, pool, add = (by_name.get(name) for name in ("batch_norm", "max_pool2d", "add"))
    activation = next((c for c in calls if c.name in ACTIVATIONS), None)
    args = tuple(conv[name] for name in ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    kwargs = {}
    if activation is None:
        function, kwargs = functional.conv_act, {"activation": "none"}
    elif pool:
        function, kwargs = functional.conv2d_relu_max_pool2d, {"pool_size": pool["kernel_size"]}
        kwargs["pool_stride"] = pool["stride"]
    elif activation.name == "relu" and conv.name == "conv2d" and not add:
        function = functional.conv2d_relu
    else:
        function, kwargs = functional.conv_act, activation_of(activation)
    if add:
        at = calls.index(add)
        kwargs |= {"residual": _residual(add, chain[at - 1], chain[at]), "in_place": _writes(chain[at])}
        function = conv_add_act
    if norm:
        function = _WITH_NORM[function]
        kwargs |= {name: norm[name] for name in ("running_mean", "running_var", "eps")}
        kwargs |= {"gamma": norm["weight"], "beta": norm["bias"]}
    modules = tuple(c.module for c in calls if c.module is not None)
    evals = (norm.module,) if norm and norm.module else ()
    pattern = " + ".join(c.name for c in calls if c.name != "identity")
    return Match(pattern, tuple(dict.fromkeys(chain)), function, args, kwargs, place, modules, evals, note)


def activation_of(call: Call) -> dict:
    """As functional.conv_act takes it."""
    if call.name == "leaky_relu":
        return {"activation": call.name, "negative_slope": call["negative_slope"]}
    tanh = call.name == "gelu" and call["approximate"] == "tanh"
    return {"activation": "gelu_tanh" if tanh else call.name}


def conv_add_act(input, weight, bias, *options, residual, in_place, activation, negative_slope=0.01):
    """activation(conv + residual). Added in place, the sum keeps the convolution's dtype; else the dtypes promote."""
    if in_place and residual.dtype != conv_op.autocast(input)[0].dtype:
        z = conv_act.reference(input, weight, bias, *options, activation="none").add_(residual)
        return conv_act.EAGER[activation](z, negative_slope)
    kwargs = {"activation": activation, "negative_slope": negative_slope, "residual": residual}
    return functional.conv_act(input, weight, bias, *options, **kwargs)


# --- BatchNorm in eval mode is an affine map of each channel, so it goes into the convolution's weight and bias.
# By the convolution's weight: the other tensors that went in, the versions of all, and what came out.
_folded = WeakTensorKeyDictionary()


def fold(weight, bias, running_mean, running_var, gamma, beta, eps):
    """(weight, bias) of the convolution that does conv2d and batch_norm at once.

    Kept while the tensors do not change; computed anew, so that gradients flow, where any of them needs one.
    """
    given = (weight, bias, running_mean, running_var, gamma, beta)
    tensors = [x for x in given if x is not None]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _fold(*given, eps)
    known = _folded.get(weight)
    if known is not None and all(a is b for a, b in zip(known[0], given[1:])) and known[1] == _state(tensors):
        return known[2]
    if any(x.is_inference() or type(x) not in (torch.Tensor, nn.Parameter) for x in tensors):
        return _fold(*given, eps)
    with torch.inference_mode(False), torch.no_grad():
        folded, shift = _fold(*given, eps)
    _folded[weight] = (given[1:], _state(tensors), (constant(folded), shift))
    return folded, shift


def _state(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x._version) for x in tensors]


def _fold(weight, bias, running_mean, running_var, gamma, beta, eps):
    scale = torch.rsqrt(running_var + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -running_mean if bias is None else bias - running_mean
    shift = shift * scale if beta is None else shift * scale + beta
    folded = weight * scale.to(weight.dtype).view(-1, 1, 1, 1)
    return folded, shift.to(weight.dtype)


def _with_norm(function, name: str):
    """`function`, a convolution with anything behind it, with BatchNorm between the two."""

    def fused(input, weight, bias, *options, running_mean, running_var, gamma, beta, eps, **kwargs):
        weight, bias = fold(weight, bias, running_mean, running_var, gamma, beta, eps)
        return function(input, weight, bias, *options, **kwargs)

    fused.__name__ = fused.__qualname__ = name
    return fused


conv2d_batch_norm_relu = _with_norm(functional.conv2d_relu, "conv2d_batch_norm_relu")
conv2d_batch_norm_relu_max_pool2d = _with_norm(functional.conv2d_relu_max_pool2d, "conv2d_batch_norm_relu_max_pool2d")
conv2d_batch_norm_act = _with_norm(functional.conv_act, "conv2d_batch_norm_act")
conv2d_batch_norm_add_act = _with_norm(conv_add_act, "conv2d_batch_norm_add_act")
_WITH_NORM = {
    functional.conv2d_relu: conv2d_batch_norm_relu,
    functional.conv2d_relu_max_pool2d: conv2d_batch_norm_relu_max_pool2d,
    functional.conv_act: conv2d_batch_norm_act,
    conv_add_act: conv2d_batch_norm_add_act,
}
