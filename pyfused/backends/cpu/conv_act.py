"""conv_act on the CPU: Winograd where conv2d_relu takes it, else PyTorch's convolution (oneDNN), either with the bias;
then one pass of ours, in place unless backward needs what it overwrites. In backward one pass, as for ReLU.
"""

from __future__ import annotations

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import conv2d_relu as conv_op
from ...ops import conv_act as op
from . import conv2d_relu as conv


def _convolution(*args) -> torch.Tensor:
    """input ∗ weight + bias, in the layout that the op promises."""
    input, weight, bias, stride, padding, dilation, groups = args
    if conv.algorithm(*args) == "winograd":
        out = cached(conv_op.alloc(*args))
        result = conv._channels_last(out, fill=False)
        transformed = conv._transformed(weight)
        _C.conv2d_winograd(
            result, conv._channels_last(input), transformed, bias, *padding, False, torch.get_num_threads()
        )
        return conv._convert(out, result)
    out = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return conv_op.conform(out, conv_op.alloc(*args))


@kernel("conv_act", "cpu")
def forward(input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, keep):
    z = _convolution(input, weight, bias, stride, padding, dilation, groups)
    out = cached(torch.empty_like(z)) if keep else z
    if residual is not None or op.ACTIVATIONS[activation] != "none":
        residual = None if residual is None else conv._dense(residual, z)
        _C.conv_act(out, z, residual, activation, slope, torch.get_num_threads())
    return out, z if keep else z.new_empty(0)


@kernel("conv_act_backward", "cpu")
def backward(grad, input, weight, saved, stride, padding, dilation, groups, activation, slope, needed):
    options, grad = (stride, padding, dilation, groups), conv._dense(grad, saved)
    of_convolution = needed[0] or needed[1]
    if op.ACTIVATIONS[activation] == "none":
        saved = grad
    g = cached(torch.empty_like(grad)) if of_convolution or needed[3] else None
    d_bias = weight.new_empty(weight.shape[0] if needed[2] else 0)
    _C.conv_act_grad(g, d_bias if needed[2] else None, grad, saved, activation, slope, torch.get_num_threads())
    grads = conv._finish(g if of_convolution else None, d_bias, input, weight, options, needed)
    return *grads, g if needed[3] else weight.new_empty(0)
