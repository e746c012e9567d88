"""Convolution (of rows or of maps) + bias [+ residual] + activation.

    z = input ∗ weight + bias + residual,   output = act(z)

    relu           max(0, z)                              leaky_relu   z where z > 0, else negative_slope z
    relu6          min(max(0, z), 6)                      hardswish    z relu6(z + 3) / 6
    silu           z / (1 + e^-z)                         gelu         z Φ(z), Φ the normal distribution's (erf)
    gelu_tanh      GELU with Φ approximated by tanh       none         z

Backward:  g = grad act'(z);  d_residual = g,  d_bias = ∑ g,  d_input, d_weight = the convolution's gradients for g.
Where act' follows from the output (relu, relu6, leaky_relu with a positive slope) the output is what is kept, else z;
for "none" nothing. A residual is kept for second derivatives.

ReLU without a residual is conv2d_relu, whose kernels are the fastest. A convolution of rows is one of maps of height 1:
views, no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import by_signature, define, differentiable_grads, is_transformed, needs_grad, reject
from . import conv2d_relu as conv

ACTIVATIONS = ("none", "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh")
EAGER = {
    "none": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "relu6": lambda z, slope: F.relu6(z),
    "hardswish": lambda z, slope: F.hardswish(z),
    "silu": lambda z, slope: F.silu(z),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
}


def reference(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation="relu", negative_slope=0.01,
    residual=None,
):  # fmt: skip
    """The op in eager PyTorch."""
    convolve = F.conv1d if _is_rows(weight) else F.conv2d
    z = convolve(input, weight, bias, stride, padding, dilation, groups)
    return EAGER[activation](z if residual is None else z + residual, negative_slope)


def eager_in_place(input, weight, bias, residual, *options, activation, negative_slope):
    """The same with the addition in place, and the ReLU, as autograd allows."""
    z = (F.conv1d if _is_rows(weight) else F.conv2d)(input, weight, bias, *options)
    z = z if residual is None else z.add_(residual)
    return z.relu_() if activation == "relu" else EAGER[activation](z, negative_slope)


def _reference(input, weight, bias, residual, *options):
    """With the registered op's arguments up to `slope`."""
    *options, activation, slope = options
    kwargs = {"activation": ACTIVATIONS[activation], "negative_slope": slope, "residual": residual}
    return reference(input, weight, bias, *options, **kwargs)


# --- Forward
def alloc(input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, keep):
    """(output, z, which without `keep` has no elements)."""
    output = conv.alloc(input, weight, bias, stride, padding, dilation, groups)
    return output, torch.empty_like(output) if keep else output.new_empty(0)


def _reference_forward(input, weight, bias, residual, *options):
    *options, activation, slope, keep = options
    z = _reference(input, weight, bias, residual, *options, ACTIVATIONS.index("none"), slope)
    output, kept = alloc(input, weight, bias, residual, *options, activation, slope, keep)
    return output.copy_(EAGER[ACTIVATIONS[activation]](z, slope)), kept.copy_(z) if keep else kept


_forward = define(
    "conv_act(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, SymInt groups, int activation, float slope, bool keep) -> (Tensor, Tensor)",
    alloc,
    _reference_forward,
)


# --- Backward
def alloc_backward(grad, input, weight, saved, stride, padding, dilation, groups, activation, slope, needed):
    """(d_input, d_weight, d_bias, d_residual); what is not needed has no elements."""
    d_residual = torch.empty_like(saved) if needed[3] else weight.new_empty(0)
    return *conv.alloc_grads(input, weight, needed), d_residual


def _reference_backward(grad, input, weight, saved, *options):
    *options, activation, slope, needed = options
    with torch.enable_grad():  # act' at `saved`: at z, or at an output where it is the same
        z = saved.detach().requires_grad_()
        (g,) = torch.autograd.grad(EAGER[ACTIVATIONS[activation]](z, slope), z, grad)
    *_, d_residual = alloc_backward(grad, input, weight, saved, *options, activation, slope, needed)
    if needed[3]:
        d_residual.copy_(g)
    return *conv.convolution_backward(g, input, weight, *options, needed[:3]), d_residual


_backward = define(
    "conv_act_backward(Tensor grad, Tensor input, Tensor weight, Tensor saved, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, SymInt groups, int activation, float slope, bool[4] needed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    alloc_backward,
    _reference_backward,
)


def _needs_z(activation: int, slope: float) -> bool:
    """Whether act' does not follow from the output."""
    name = ACTIVATIONS[activation]
    return name not in ("none", "relu", "relu6", "leaky_relu") or (name == "leaky_relu" and slope <= 0)


class _ConvAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, *options):
        activation, slope = options[-2:]
        keep = _needs_z(activation, slope)
        output, z = _forward(input, weight, bias, residual, *options, keep)
        saved = z if keep else None if ACTIVATIONS[activation] == "none" else output
        ctx.save_for_backward(input, weight, bias, residual, saved)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, residual, saved = ctx.saved_tensors
        needed, options = ctx.needs_input_grad[:4], ctx.options
        if torch.is_grad_enabled():
            given = (input, weight, bias, residual)
            grads = differentiable_grads(lambda *x: _reference(*x, *options), given, needed, grad)
        else:
            grads = _backward(grad, input, weight, grad if saved is None else saved, *options, needed)
            grads = [g if wanted else None for g, wanted in zip(grads, needed)]
        return (*grads, *[None] * len(options))


# --- Arguments
def _is_rows(weight) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() == 3


def as_maps(input, weight, bias, stride, padding, dilation, groups):
    """The arguments of a convolution of rows as those of one of maps of height 1."""

    def two(value, first):
        if isinstance(value, str):
            return value
        value = (value,) if isinstance(value, (int, torch.SymInt)) else tuple(value)
        return (first, *value) if len(value) == 1 else value * 3  # not a pair: `prepare` rejects it

    return input.unsqueeze(-2), weight.unsqueeze(-2), bias, two(stride, 1), two(padding, 0), two(dilation, 1), groups


def _is_residual(x, input, weight, maps: tuple) -> bool:
    """Whether the op takes it; eager PyTorch deals with broadcasting and promotion. maps: what `prepare` made."""
    rows, unbatched, shape = _is_rows(weight), input.dim() == weight.dim() - 1, _shape(maps)
    return (
        isinstance(x, torch.Tensor)
        and x.dtype == input.dtype
        and x.device == input.device
        and x.layout == torch.strided
        and tuple(x.shape) == (*shape[unbatched:2], *shape[2 + rows :])
    )


def _shape(maps: tuple) -> tuple[int, ...]:
    input, weight, _, stride, padding, dilation, _ = maps
    return conv.output_shape(input, weight, stride, padding, dilation)


def conv_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(conv(input, weight, bias) + residual), conv1d or conv2d; bias, residual and activation in one pass.

    On a CPU, convolutions that neither Winograd's algorithm nor the implicit GEMM takes, or that are too small to repay
    the call, go to eager PyTorch, with residual and ReLU in place; but in channels_last for GELU and for large maps in
    training.

    Args: as torch.nn.functional.conv2d or, where `weight` has three dimensions, conv1d, and
        input: (N, C_in, H, W), (N, C_in, L), or without N; float32, float64, bfloat16 or float16. Others run in eager
            PyTorch.
        activation: "none", "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu" or "gelu_tanh".
        negative_slope: of "leaky_relu".
        residual: is added before the activation; of the output's shape and dtype. Others, which broadcast or promote,
            run in eager PyTorch.

    Returns:
        (N, C_out, OH, OW) or (N, C_out, OL), or without N as the input; channels_last where input or weight is.

    Raises:
        ValueError: there is no such activation.
        What torch.nn.functional.conv1d or conv2d raises for the same arguments.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"pyfused.conv_act: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    rows, given = _is_rows(weight), (input, weight, bias, stride, padding, dilation, groups)
    if activation == "relu" and residual is None and not rows:
        return conv.conv2d_relu(*given)
    kwargs = {"activation": activation, "negative_slope": negative_slope, "residual": residual}
    if isinstance(input, torch.Tensor):
        input, weight, bias = conv.autocast(input, weight, bias)
    if dispatch.may_hand_over(input) and not is_transformed():
        tensors = (input, weight, bias, residual)
        way = _way(conv.allowed_algorithms(), *tensors, stride, padding, dilation, groups, activation)
        if way is not None:
            return way(*tensors, slope=float(negative_slope))
    if not conv.is_native(input, weight, bias):
        return reference(*given, **kwargs)
    unbatched, args = input.dim() == weight.dim() - 1, (input, weight, bias, *given[3:])
    problem, args = conv.prepare(*(as_maps(*args) if rows else args))
    if problem:
        reject("conv_act", problem, reference, *given, **kwargs)
    if residual is not None:
        if not _is_residual(residual, input, weight, args):
            return reference(*given, **kwargs)
        residual = residual.reshape(_shape(args))
    output = _run(*args[:3], residual, *args[3:], ACTIVATIONS.index(activation), float(negative_slope))
    output = output.squeeze(0) if unbatched else output
    return output.squeeze(-2) if rows else output


@by_signature
def _way(_, input, weight, bias, residual, *options) -> Callable | None:
    """How a call on CPU tensors goes, as a function of the four and the slope: to eager PyTorch, or with its options
    completed to the registered op. None for all that needs more: what is wrong, or PyTorch's alone, or rows, a single
    image or "same" padding that go to the op."""
    if not conv.is_native(input, weight, bias):
        return None
    *options, activation = options
    args = (input, weight, bias, *options)
    problem, args = conv.prepare(*(as_maps(*args) if _is_rows(weight) else args))
    if problem or not (residual is None or _is_residual(residual, input, weight, args)):
        return None
    number = ACTIVATIONS.index(activation)
    if conv.is_tiny(*args[:2]) or dispatch.cedes("conv_act", (*args[:3], residual, *args[3:], number)):
        return lambda *tensors, slope: eager_in_place(*tensors, *options, activation=activation, negative_slope=slope)
    if args[0] is not input:
        return None
    options = (*args[3:], number)
    return lambda *tensors, slope: _run(*tensors, *options, slope)


def _run(input, weight, bias, residual, *options):
    if ACTIVATIONS[options[-2]] == "relu" and residual is None:
        return conv.conv2d_relu(input, weight, bias, *options[:-2])
    if needs_grad(input, weight, bias, residual):
        return _ConvAct.apply(input, weight, bias, residual, *options)
    return _forward(input, weight, bias, residual, *options, False)[0]
