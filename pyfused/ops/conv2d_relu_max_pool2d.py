"""Convolution + bias + ReLU + max-pooling.

    output = max over each pooling window of max(0, input ∗ weight + bias)

Saves one byte per pooled output, `code`: the place of the maximum within its window, row by row, or DEAD where the
maximum is 0, so that nothing flows back. Backward needs neither the output nor the full-size activation nor int64
indices. Ties and NaN as in torch.nn.functional.max_pool2d: the first of equal maxima; the last NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import by_signature, define, differentiable_grads, is_transformed, needs_grad, reject
from . import conv2d_relu as conv

DEAD = 255  # also bounds the windows: their places are 0..254


TINY_DIRECT = 200_000  # as conv.TINY_DIRECT: 28x28 -> 8 loses at 0.8, 32x32x3 -> 16 wins 1.3 to 1.9 times


def reference(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, pool_size=2, pool_stride=None):
    """The op in eager PyTorch."""
    return F.max_pool2d(
        F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups)), pool_size, pool_stride
    )


# --- Forward
def pooled_shape(shape, pool_size, pool_stride) -> tuple[int, ...]:
    """(N, C, PH, PW) from (N, C, OH, OW)."""
    return (*shape[:2], *((shape[2 + d] - pool_size[d]) // pool_stride[d] + 1 for d in range(2)))


def alloc(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride):
    shape = pooled_shape(conv.output_shape(input, weight, stride, padding, dilation), pool_size, pool_stride)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=conv.memory_format(input, weight))
    return output, torch.empty_like(output, dtype=torch.uint8)


def _reference_forward(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride):
    activation = conv.reference(input, weight, bias, stride, padding, dilation, groups)
    output, index = F.max_pool2d(activation, pool_size, pool_stride, return_indices=True)
    row = index // activation.shape[3] - _starts(output, 2, pool_stride)
    column = index % activation.shape[3] - _starts(output, 3, pool_stride)
    code = torch.where(output <= 0, DEAD, row * pool_size[1] + column)
    like = alloc(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride)
    return conv.conform(output, like[0]), like[1].copy_(code)


def _starts(output, d, pool_stride):
    """First row (d = 2) or column (d = 3) of each window, broadcastable to the output."""
    start = torch.arange(output.shape[d], device=output.device) * pool_stride[d - 2]
    return start.unsqueeze(-1) if d == 2 else start


_forward = define(
    "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, SymInt groups, SymInt[2] pool_size, SymInt[2] pool_stride) -> (Tensor, Tensor)",
    alloc,
    _reference_forward,
)


# --- Backward
def alloc_backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    return conv.alloc_grads(input, weight, needed)


def _reference_backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    shape = conv.output_shape(input, weight, stride, padding, dilation)
    place = code.long()
    row = place // pool_size[1] + _starts(grad, 2, pool_stride)
    column = place % pool_size[1] + _starts(grad, 3, pool_stride)
    alive = code != DEAD
    index = torch.where(alive, row * shape[3] + column, 0).flatten(2)
    g = grad.new_zeros(*shape[:2], shape[2] * shape[3]).scatter_add_(2, index, torch.where(alive, grad, 0).flatten(2))
    return conv.convolution_backward(g.view(shape), input, weight, stride, padding, dilation, groups, needed)


_backward = define(
    "conv2d_relu_max_pool2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor code, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, SymInt groups, SymInt[2] pool_size, SymInt[2] pool_stride, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
    alloc_backward,
    _reference_backward,
)


class _Conv2dReLUMaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *options):
        output, code = _forward(input, weight, bias, *options)
        ctx.save_for_backward(input, weight, bias, code)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, code = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            *options, pool_size, pool_stride = ctx.options

            def eager(*x):
                return reference(*x, *options, pool_size=pool_size, pool_stride=pool_stride)

            grads = differentiable_grads(eager, (input, weight, bias), needed, grad)
        else:
            grads = _backward(grad, input, weight, code, *ctx.options, needed)
            grads = [g if wanted else None for g, wanted in zip(grads, needed)]
        return (*grads, None, None, None, None, None, None)


def _problem(args, pool_size, pool_stride) -> str | None:
    for name, value in (("pool_size", pool_size), ("pool_stride", pool_stride)):
        if len(value) != 2 or min(value) < 1:
            return f"{name} must be one or two integers of at least 1, got {value}"
    activation = conv.output_shape(*args[:2], *args[3:6])
    if min(pooled_shape(activation, pool_size, pool_stride)[2:]) < 1:
        return f"pool_size {pool_size} is larger than the convolution's output {tuple(activation)}"
    return None


def conv2d_relu_max_pool2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """max_pool2d(relu(conv2d(input, weight, bias)), pool_size, pool_stride) without storing the full-size activation.

    On a CPU, convolutions too small to repay the call go to eager PyTorch: see conv2d_relu's `is_tiny`.

    Args: as torch.nn.functional.conv2d, and
        pool_size: rows and columns of the pooling window. Windows of more than 255 elements run in eager PyTorch.
        pool_stride: step between windows; default: pool_size.

    Returns:
        (N, C_out, PH, PW), or without N as the input; channels_last where input or weight is.

    Raises:
        What torch.nn.functional.conv2d and max_pool2d raise for the same arguments.
    """
    given = (input, weight, bias, stride, padding, dilation, groups)
    pool = {"pool_size": pool_size, "pool_stride": pool_stride}
    if isinstance(input, torch.Tensor):
        input, weight, bias = conv.autocast(input, weight, bias)
    if dispatch.may_hand_over(input) and not is_transformed():
        options = (stride, padding, dilation, groups, pool_size, pool_stride)
        way = _way(conv.allowed_algorithms(), input, weight, bias, *options)
        if way is not None:
            return way(input, weight, bias)
    if not conv.is_native(input, weight, bias):
        return reference(*given, **pool)
    pool_size = conv.pair(pool_size)
    pool_stride = conv.pair(pool_stride) if pool_stride else pool_size
    problem, args = conv.prepare(input, weight, bias, stride, padding, dilation, groups)
    problem = problem or _problem(args, pool_size, pool_stride)
    if problem:
        reject("conv2d_relu_max_pool2d", problem, reference, *given, **pool)
    if pool_size[0] * pool_size[1] > DEAD:
        return reference(*given, **pool)
    output = _run(*args, pool_size, pool_stride)
    return output.squeeze(0) if input.dim() == 3 else output


def _run(*args):
    return _Conv2dReLUMaxPool2d.apply(*args) if needs_grad(*args[:3]) else _forward(*args)[0]


@by_signature
def _way(_, input, weight, bias, *options) -> Callable | None:
    """How a call on CPU tensors goes, as conv2d_relu's `_way` says."""
    if not conv.is_native(input, weight, bias):
        return None
    *options, pool_size, pool_stride = options
    pool_size = conv.pair(pool_size)
    pool_stride = conv.pair(pool_stride) if pool_stride else pool_size
    problem, args = conv.prepare(input, weight, bias, *options)
    if problem or _problem(args, pool_size, pool_stride) or pool_size[0] * pool_size[1] > DEAD:
        return None
    args = (*args, pool_size, pool_stride)
    if conv.is_tiny(input, weight, TINY_DIRECT) or dispatch.cedes("conv2d_relu_max_pool2d", args):
        return lambda *tensors: F.max_pool2d(conv.eager_in_place(*tensors, *options), pool_size, pool_stride)
    if args[0] is not input:
        return None
    options = args[3:]
    return lambda *tensors: _run(*tensors, *options)
