"""Conv2d [+ BatchNorm2d that is in eval mode] + ReLU [+ MaxPool2d, before or after the ReLU].

A maximum may be taken before or after ReLU: both are monotone, so values and gradients are the same. Without a ReLU,
Conv2d + BatchNorm2d become one convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import functional
from .graph import Match, Refusal, call_of, only_user, why_not

_POOL_PROBLEMS = {"padding": (0, (0, 0), [0, 0]), "dilation": (1, (1, 1), [1, 1]), "ceil_mode": (False,)}


def find(graph: fx.Graph, root: nn.Module) -> Iterator[Match | Refusal]:
    for node in graph.nodes:
        call = call_of(node, root)
        if call is not None and call.name == "conv2d":
            yield _match(node, call, root)


def _match(node: fx.Node, conv, root: nn.Module) -> Match | Refusal:
    place = conv.module or node.name
    chain, calls, problem = [node], [conv], _module_problem(conv, root)
    if conv["padding_mode"] != "zeros":
        problem = f"padding_mode is {conv['padding_mode']!r}; the kernels pad with zeros"
    while problem is None:
        following = only_user(chain[-1])
        call = None if following is None else call_of(following, root)
        wanted = {"relu", "max_pool2d", "batch_norm"} - {c.name for c in calls[1:]}
        if call is None or call.name not in wanted or call["input"] is not chain[-1]:
            break
        if call.name == "batch_norm" and len(calls) > 1:
            break
        problem = _module_problem(call, root) or _problem(call)
        if problem is None:
            chain.append(following)
            calls.append(call)
    names = [c.name for c in calls]
    if names[-1] == "max_pool2d" and "relu" not in names:
        problem = problem or f"MaxPool2d follows, and then {_describe(only_user(chain[-1]), chain[-1], root)}"
        chain, calls, names = chain[:-1], calls[:-1], names[:-1]
    if names == ["conv2d"]:
        return Refusal("conv2d + relu", place, problem or _describe(only_user(node), node, root))
    return _build(chain, calls, place, problem or "")


def _module_problem(call, root: nn.Module) -> str | None:
    return None if call.module is None else why_not(root.get_submodule(call.module))


def _problem(call) -> str | None:
    """Why this BatchNorm or pool cannot be part of the fused call."""
    if call.name == "batch_norm" and call["training"]:
        return "BatchNorm2d stands before the ReLU and is in training mode, where it depends on the whole batch"
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
        module = root.get_submodule(following.target)
        problem = why_not(module) if isinstance(module, nn.ReLU) else None
        return problem or f"{type(module).__name__} follows, not ReLU"
    return f"{getattr(following.target, '__name__', following.target)} follows, not ReLU"


def _build(chain: list, calls: list, place: str, note: str) -> Match:
    conv, by_name = calls[0], {c.name: c for c in calls}
    args = tuple(conv[name] for name in ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    kwargs, norm, pool = {}, by_name.get("batch_norm"), by_name.get("max_pool2d")
    function = functional.conv2d_relu
    if pool:
        function = functional.conv2d_relu_max_pool2d
        kwargs = {"pool_size": pool["kernel_size"], "pool_stride": pool["stride"]}
    if norm:
        function = {1: conv2d_batch_norm, 2: conv2d_batch_norm_relu, 3: conv2d_batch_norm_relu_max_pool2d}[
            1 + ("relu" in by_name) + bool(pool)
        ]
        kwargs |= {name: norm[name] for name in ("running_mean", "running_var", "eps")}
        kwargs |= {"gamma": norm["weight"], "beta": norm["bias"]}
    modules = tuple(c.module for c in calls if c.module is not None)
    evals = (norm.module,) if norm and norm.module else ()
    pattern = " + ".join(c.name for c in calls)
    return Match(pattern, tuple(chain), function, args, kwargs, place, modules, evals, note)


# --- BatchNorm in eval mode is an affine map of each channel, so it goes into the convolution's weight and bias.
# By the convolution's weight: the other tensors that went in, the versions of all, and what came out.
_folded = WeakTensorKeyDictionary()


def fold(weight, bias, running_mean, running_var, gamma, beta, eps):
    """(weight, bias) of the convolution that does conv2d and batch_norm at once.

    Kept while the tensors do not change; computed anew, so that gradients flow, where any of them needs one.
    """
    given = (weight, bias, running_mean, running_var, gamma, beta)
    others = given[1:]
    tensors = [x for x in given if x is not None]
    if (
        torch.compiler.is_compiling()
        or any(x.is_inference() or type(x) not in (torch.Tensor, nn.Parameter) for x in tensors)
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    ):
        return _fold(*given, eps)
    state = [(x.data_ptr(), x._version) for x in tensors]
    known = _folded.get(weight)
    if known is None or known[1] != state or any(a is not b for a, b in zip(known[0], others)):
        with torch.inference_mode(False), torch.no_grad():
            known = _folded[weight] = (others, state, _fold(*given, eps))
    return known[2]


def _fold(weight, bias, running_mean, running_var, gamma, beta, eps):
    scale = torch.rsqrt(running_var + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -running_mean if bias is None else bias - running_mean
    shift = shift * scale if beta is None else shift * scale + beta
    folded = weight * scale.to(weight.dtype).view(-1, 1, 1, 1)
    return folded, shift.to(weight.dtype)


def conv2d_batch_norm(input, weight, bias, *options, running_mean, running_var, gamma, beta, eps):
    return F.conv2d(input, *fold(weight, bias, running_mean, running_var, gamma, beta, eps), *options)


def conv2d_batch_norm_relu(input, weight, bias, *options, running_mean, running_var, gamma, beta, eps):
    return functional.conv2d_relu(input, *fold(weight, bias, running_mean, running_var, gamma, beta, eps), *options)


def conv2d_batch_norm_relu_max_pool2d(
    input, weight, bias, *options, running_mean, running_var, gamma, beta, eps, **pool
):
    weight, bias = fold(weight, bias, running_mean, running_var, gamma, beta, eps)
    return functional.conv2d_relu_max_pool2d(input, weight, bias, *options, **pool)
