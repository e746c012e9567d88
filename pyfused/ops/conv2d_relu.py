"""Convolution + bias + ReLU.

    output = max(0, input ∗ weight + bias)

Backward takes the ReLU mask from the saved output, so no pre-activation and no mask tensor is kept:

    g = grad where output > 0 (or NaN), else 0;  d_bias = ∑ g;  d_input, d_weight = the convolution's gradients for g
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import autocasts, by_signature, define, differentiable_grads, is_transformed, needs_grad, reject

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reference(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The op in eager PyTorch."""
    return F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def eager_in_place(*args):
    """The same with the ReLU in place, which autograd allows: neither needs what the convolution returned."""
    return F.conv2d(*args).relu_()


# Multiplications below which calls go to eager PyTorch; measured on one and two threads. The direct kernel, for up to 4
# channels, loses to PyTorch's own loop only, which takes one image in float32 (28x28 -> 8: 7 us, ours 21; oneDNN needs
# 40 us for anything): ours is 2.9 times as fast for 64x64x3 -> 16, 0.6 for 32x32x3 -> 16. 3x3 in float32 (Winograd)
# wins from 2x32x14x14 -> 32 on, 3.6 million, and loses at half of that. Of 1x1 kernels 64x28x28 -> 64 (3.2 million)
# wins, 256x7x7 -> 256 loses.
TINY_DIRECT, TINY_WINOGRAD, TINY_OTHERS = 700_000, 2_500_000, 3_000_000


# --- Which algorithms may be used
_allowed = "auto"


def set_conv_algorithm(name: str) -> None:
    """Which algorithms the CPU convolutions may use, in the whole process.

    Args:
        name: "auto" (the fastest), "direct" (no Winograd: float32 rounding as in PyTorch) or "winograd" (Winograd
            wherever it can run, also where it is not the fastest).

    Raises:
        ValueError: another name.
    """
    global _allowed
    if name not in ("auto", "direct", "winograd"):
        raise ValueError(f"no convolution algorithm is called {name!r}; there are 'auto', 'direct' and 'winograd'")
    _allowed = name


def allowed_algorithms() -> str:
    """What set_conv_algorithm was last given."""
    return _allowed


# --- What the convolution ops share: layout and sizes
def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """PyTorch's rule for convolutions: channels_last if the input or the weight is, contiguous otherwise."""
    for x in tensors:
        if _is_channels_last(x.shape, x.stride()):
            return torch.channels_last
    return torch.contiguous_format


def _is_channels_last(shape, stride) -> bool:
    """What PyTorch calls so where dimensions of one element leave a choice (torch._prims_common takes 10 us to say)."""
    if stride[1] > stride[3] or stride[1] == 0:  # plainly NCHW
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * shape[d] if shape[d] > 1 else stride[d]
    return True


def output_shape(input, weight, stride, padding, dilation) -> tuple[int, ...]:
    """(N, C_out, OH, OW)."""
    (batch, _, *size), (channels, _, *kernel) = input.shape, weight.shape
    windows = zip(size, kernel, stride, padding, dilation)
    return (batch, channels, *((x + 2 * p - d * (k - 1) - 1) // s + 1 for x, k, s, p, d in windows))


def conform(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` with exactly the strides of `like`, as the fake kernel promised; copied only where they differ."""
    return x if x.stride() == like.stride() else like.copy_(x)


# --- Forward
def alloc(input, weight, bias, stride, padding, dilation, groups):
    shape = output_shape(input, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input, weight))


def _reference_forward(input, weight, bias, stride, padding, dilation, groups):
    output = reference(input, weight, bias, stride, padding, dilation, groups)
    return conform(output, alloc(input, weight, bias, stride, padding, dilation, groups))


_forward = define(
    "conv2d_relu(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation,"
    " SymInt groups) -> Tensor",
    alloc,
    _reference_forward,
)


# --- Backward
def alloc_grads(input, weight, needed, layout=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d_input, d_weight, d_bias); what is not needed has no elements. layout: memory_format(input, weight)."""
    return (
        torch.empty_like(input, memory_format=layout or memory_format(input, weight))
        if needed[0]
        else weight.new_empty(0),
        torch.empty_like(weight) if needed[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needed[2] else 0),
    )


def alloc_backward(grad, input, weight, output, stride, padding, dilation, groups, needed):
    return alloc_grads(input, weight, needed)


def convolution_backward(g, input, weight, stride, padding, dilation, groups, needed):
    """PyTorch's gradients for the convolution's own gradient `g`, in the strides of `alloc_grads`."""
    grads = torch.ops.aten.convolution_backward(
        g, input, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needed
    )
    # PyTorch may return more than was asked for.
    likes = alloc_grads(input, weight, needed)
    return tuple(conform(x, like) if wanted else like for x, like, wanted in zip(grads, likes, needed))


def _reference_backward(grad, input, weight, output, stride, padding, dilation, groups, needed):
    g = torch.ops.aten.threshold_backward(grad, output, 0)
    return convolution_backward(g, input, weight, stride, padding, dilation, groups, needed)


_backward = define(
    "conv2d_relu_backward(Tensor grad, Tensor input, Tensor weight, Tensor output, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, SymInt groups, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    alloc_backward,
    _reference_backward,
)


class _Conv2dReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *options):
        output = _forward(input, weight, bias, *options)
        ctx.save_for_backward(input, weight, bias, output)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, output = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = differentiable_grads(lambda *x: reference(*x, *ctx.options), (input, weight, bias), needed, grad)
        else:
            grads = _backward(grad, input, weight, output, *ctx.options, needed)
            grads = [g if wanted else None for g, wanted in zip(grads, needed)]
        return (*grads, None, None, None, None)


# --- Arguments
def is_tiny(input, weight, direct=TINY_DIRECT) -> bool:
    """Whether eager PyTorch is faster, because of what a call of ours costs besides the kernel."""
    if not isinstance(weight, torch.Tensor) or input.dim() < 3 or weight.dim() != 4 or _allowed == "winograd":
        return False
    shape, (*_, kh, kw) = input.shape, weight.shape
    channels, size = shape[-3], input.numel() * weight.numel()
    if channels <= 4:
        one_image = len(shape) == 3 or shape[0] == 1
        return one_image and size < direct * channels and kh <= 3 and kw <= 3 and input.itemsize >= 4
    winograd = kh == kw == 3 and input.dtype != torch.float64  # 16-bit types may be widened
    return size < (TINY_WINOGRAD if winograd else TINY_OTHERS) * channels


def is_native(input, weight, bias) -> bool:
    """Whether these are tensors that the registered op takes; eager PyTorch judges and runs everything else."""
    return (
        not is_transformed()
        and isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and input.dtype in DTYPES
        and input.device.type in ("cpu", "cuda")
        and input.layout == weight.layout == torch.strided
        and weight.dtype == input.dtype
        and weight.device == input.device
        and (bias is None or (bias.dtype == input.dtype and bias.device == input.device))
    )


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the dtype that autocast gives to a convolution; float64 stays, as there."""
    x = next((x for x in tensors if isinstance(x, torch.Tensor)), None)
    if x is None or not autocasts(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, (int, torch.SymInt)):
        return (value, value)
    value = tuple(value)
    return value * 2 if len(value) == 1 else value


def prepare(input, weight, bias, stride, padding, dilation, groups) -> tuple[str | None, tuple]:
    """What is wrong with the arguments (None: nothing), and the registered op's arguments made of them.

    Those are batched, with pairs for stride, padding and dilation. Where padding="same" is one longer on one side than
    on the other, the input is padded, as PyTorch does it.
    """
    if input.dim() not in (3, 4):
        return f"input must be (N, C, H, W) or (C, H, W), got {tuple(input.shape)}", ()
    if weight.dim() != 4:
        return f"weight must be (C_out, C_in / groups, KH, KW), got {tuple(weight.shape)}", ()
    if input.dim() == 3:
        input = input.unsqueeze(0)
    stride, dilation = pair(stride), pair(dilation)
    if padding == "same":
        if stride != (1, 1):
            return f"padding='same' needs stride 1, got {stride}", ()
        total = [dilation[d] * (weight.shape[2 + d] - 1) for d in range(2)]
        padding = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:
            input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    elif isinstance(padding, str):
        if padding != "valid":
            return f"padding must be 'same', 'valid' or one or two integers, got {padding!r}", ()
        padding = (0, 0)
    else:
        padding = pair(padding)
    args = (input, weight, bias, stride, padding, dilation, groups)
    return _problem(*args), args


def _problem(input, weight, bias, stride, padding, dilation, groups) -> str | None:
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or min(value) < least:
            return f"{name} must be one or two integers of at least {least}, got {value}"
    channels, (c_out, per_group, kh, kw) = input.shape[1], weight.shape
    if groups < 1 or c_out % groups or c_out < groups:
        return f"groups must divide C_out, got groups={groups} and C_out={c_out}"
    if channels != per_group * groups:
        return f"input has {channels} channels, but weight and groups={groups} ask for {per_group * groups}"
    if bias is not None and bias.shape != (c_out,):
        return f"bias must be ({c_out},), got {tuple(bias.shape)}"
    if kh * kw * channels == 0:
        return f"weight must not be empty, got {tuple(weight.shape)}"
    if min(output_shape(input, weight, stride, padding, dilation)[2:]) < 1:
        return (
            f"the kernel is larger than the padded input {tuple(input.shape)}: kernel ({kh}, {kw}), padding {padding}"
        )
    return None


def conv2d_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """relu(conv2d(input, weight, bias)) in one pass; keeps only the output for backward.

    On a CPU, convolutions too small to repay the call (`is_tiny`), and those for which PyTorch's own kernel is as good,
    go to eager PyTorch, with the ReLU in place.

    Args: as torch.nn.functional.conv2d.
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, bfloat16 or float16. Others run in eager PyTorch.
        weight: (C_out, C_in / groups, KH, KW), of the input's dtype.
        bias: (C_out,) or None.
        padding: one or two integers, "valid" or "same".

    Returns:
        (N, C_out, OH, OW), or without N as the input; channels_last where input or weight is.

    Raises:
        What torch.nn.functional.conv2d raises for the same arguments.
    """
    given = (input, weight, bias, stride, padding, dilation, groups)
    if isinstance(input, torch.Tensor):
        input, weight, bias = autocast(input, weight, bias)
    if dispatch.may_hand_over(input) and not is_transformed():
        way = _way(_allowed, input, weight, bias, stride, padding, dilation, groups)
        if way is not None:
            return way(input, weight, bias)
    if not is_native(input, weight, bias):
        return reference(*given)
    problem, args = prepare(input, weight, bias, stride, padding, dilation, groups)
    if problem:
        reject("conv2d_relu", problem, reference, *given)
    output = _run(*args)
    return output.squeeze(0) if input.dim() == 3 else output


def _run(*args):
    return (_Conv2dReLU.apply if needs_grad(*args[:3]) else _forward)(*args)


@by_signature
def _way(_, input, weight, bias, *options) -> Callable | None:
    """How a call on CPU tensors goes, as a function of the three: to eager PyTorch, or with its options checked and
    completed to the registered op. None for all that needs more: what is wrong, or PyTorch's alone, or a single image
    or "same" padding that goes to the op."""
    if not is_native(input, weight, bias):
        return None
    problem, args = prepare(input, weight, bias, *options)
    if problem:
        return None
    if is_tiny(input, weight) or dispatch.cedes("conv2d_relu", args):
        return lambda *tensors: eager_in_place(*tensors, *options)
    if args[0] is not input:
        return None
    run, options = _Conv2dReLU.apply if needs_grad(input, weight, bias) else _forward, args[3:]
    return lambda *tensors: run(*tensors, *options)
