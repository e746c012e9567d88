"""conv_act on the CPU, by three of conv2d_relu's algorithms.

winograd, implicit_gemm   where conv2d_relu takes them, the latter in training for large maps only; residual and
            activation in their epilogues, unless backward needs z.
aten        PyTorch's convolution (oneDNN) with its bias, then one pass of ours, in place unless backward needs z. That
            is no faster than eager PyTorch (0.7 to 1.0 of its speed up to 1.6 MB of output, 0.91 to 1.07 beyond), so
            the public function calls this (`_cedes`) but for maps in channels_last, large ones in training (1.04 to
            1.2), and GELU in float32: PyTorch then leaves oneDNN's GELU, and ours is 1.4 to 2.3 times as fast forward
            and 1.8 to 10 times in training.

In backward one pass gives g and the bias gradient, as for ReLU; then Winograd's kernels or PyTorch's.
"""

from __future__ import annotations

import math

import torch

from ... import _C
from ..._library import needs_grad
from ...dispatch import kernel
from ...memory import cached
from ...ops import conv2d_relu as conv_op
from ...ops import conv_act as op
from . import conv2d_relu as conv
from .widen import is_slow, widened

NONE, GELU = map(op.ACTIVATIONS.index, ("none", "gelu"))
# Numbers of output. GELU: 2x3x64x64 -> 16, stride 2, loses by a tenth, 8 of them -> 32 win.
LEAST_GELU, LEAST_TRAINED = 200_000, 3_000_000


def _winograd(out, convolution, residual, activation, slope) -> torch.Tensor:
    input, weight, bias, _, padding, *_ = convolution
    result = conv._channels_last(out, fill=False)
    residual = None if residual is None else conv._channels_last(residual)
    tile = conv.winograd_tile(out)
    given = (conv._channels_last(input), conv.transformed(weight, tile), bias, residual)
    _C.conv2d_winograd_act(result, *given, *padding, activation, slope, tile, torch.get_num_threads())
    return conv._convert(out, result)


def _implicit_gemm(out, convolution, residual, activation, slope) -> torch.Tensor:
    residual = None if residual is None else conv._dense(residual, out)
    conv.implicit_gemm(out, convolution, residual, activation, slope)
    return out


OWN = {"winograd": _winograd, "implicit_gemm": _implicit_gemm}  # do it all in one kernel


def _aten(convolution) -> torch.Tensor:
    input, weight, bias, stride, padding, dilation, groups = convolution
    out = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return conv_op.conform(out, conv_op.alloc(*convolution))


def _cedes(input, weight, bias, residual, stride, padding, dilation, groups, activation) -> bool:
    """Whether eager PyTorch does as well."""
    convolution = (input, weight, bias, stride, padding, dilation, groups)
    trained, chosen = needs_grad(input, weight, bias, residual), conv.algorithm(*convolution)
    if is_slow(input) or chosen == "winograd" or (chosen in OWN and not trained):
        return False
    if conv_op.memory_format(input, weight) != torch.channels_last or input.dtype != torch.float32:
        return True
    size = math.prod(conv_op.output_shape(input, weight, stride, padding, dilation))
    return not ((trained and size >= LEAST_TRAINED) or (activation == GELU and size >= LEAST_GELU))


@kernel("conv_act", "cpu", cedes=_cedes)
@widened(op.alloc, weight=1)
def forward(input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, keep):
    convolution = (input, weight, bias, stride, padding, dilation, groups)
    chosen, shape, layout = conv._plan(conv_op.allowed_algorithms(), *convolution)
    own = OWN.get(chosen)
    if own and not keep:
        out = own(conv._empty(shape, layout, input), convolution, residual, activation, slope)
        return out, out.new_empty(0)
    z = own(conv._empty(shape, layout, input), convolution, residual, NONE, 0.0) if own else _aten(convolution)
    out = cached(torch.empty_like(z)) if keep else z
    residual = None if residual is None or own else conv._dense(residual, z)
    if residual is not None or activation != NONE:
        _C.conv_act(out, z, residual, activation, slope, torch.get_num_threads())
    return out, z if keep else z.new_empty(0)


@kernel("conv_act_backward", "cpu")
@widened(op.alloc_backward)
def backward(grad, input, weight, saved, stride, padding, dilation, groups, activation, slope, needed):
    options, grad = (stride, padding, dilation, groups), conv._dense(grad, saved)
    of_convolution = needed[0] or needed[1]
    same = activation == NONE and not needed[3]  # g is grad itself, which may not be returned as d_residual
    written = cached(torch.empty_like(grad)) if not same and (of_convolution or needed[3]) else None
    g = grad if same else written
    d_bias = weight.new_empty(weight.shape[0] if needed[2] else 0)
    if written is not None or needed[2]:
        saved, bias = grad if activation == NONE else saved, d_bias if needed[2] else None
        _C.conv_act_grad(written, bias, grad, saved, activation, slope, torch.get_num_threads())
    d_residual = g if needed[3] else weight.new_empty(0)
    chosen, _, layout = conv._plan(conv_op.allowed_algorithms(), input, weight, None, *options)
    if needed[1] and chosen == "winograd":
        d_input, d_weight, _ = map(cached, conv_op.alloc_grads(input, weight, [*needed[:2], False], layout))
        conv.winograd_backward(d_input if needed[0] else None, d_weight, None, g, None, input, weight, padding)
        return d_input, d_weight, d_bias, d_residual
    return *conv._finish(g if of_convolution else None, d_bias, input, weight, options, needed), d_residual
