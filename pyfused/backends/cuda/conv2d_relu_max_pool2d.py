"""conv2d_relu_max_pool2d on CUDA: the direct kernels where they pool in registers (first layers, 2x2), else PyTorch's
convolution with csrc/cuda/conv2d_pool.cu after it, in backward before it."""

from __future__ import annotations

import math

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import conv2d_relu as conv
from ...ops import conv2d_relu_max_pool2d as op
from . import conv2d_direct as direct


def _cannot(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride) -> str | None:
    if math.prod(conv.output_shape(input, weight, stride, padding, dilation)[1:]) >= 2**30:
        return "the pooling kernels take fewer than 2^30 numbers an image"
    return None


def _cannot_backward(grad, input, weight, code, *options_and_needed) -> str | None:
    return _cannot(input, weight, None, *options_and_needed[:-1])


def _is_direct(input, weight, stride, padding, dilation, groups, pool_size, pool_stride) -> bool:
    pools = tuple(pool_size) == tuple(pool_stride) == (2, 2)
    return pools and direct.cannot(input, weight, stride, padding, dilation, groups) is None


@kernel("conv2d_relu_max_pool2d", "cuda", _cannot)
def forward(*args):
    input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride = args
    out, code = op.alloc(*args)
    if _is_direct(input, weight, stride, padding, dilation, groups, pool_size, pool_stride):
        direct.forward(out, code, input, weight, bias, stride, padding)
    else:
        activation = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
        activation = activation.contiguous(memory_format=conv.memory_format(input, weight))
        _C.cuda_relu_max_pool2d(out, code, activation, *pool_size, *pool_stride)
    return out, code


@kernel("conv2d_relu_max_pool2d_backward", "cuda", _cannot_backward)
def backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    grad = grad.contiguous(memory_format=conv.memory_format(code))

    def unpooled():
        shape = conv.output_shape(input, weight, stride, padding, dilation)
        g = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=conv.memory_format(code))
        _C.cuda_relu_max_unpool2d(g, grad, code, *pool_size, *pool_stride)
        return g

    if _is_direct(input, weight, stride, padding, dilation, groups, pool_size, pool_stride):
        return direct.backward(grad, code, input, weight, stride, padding, needed, unpooled)
    d_input, d_weight, d_bias = conv.alloc_grads(input, weight, needed)
    if needed[0] or needed[1]:
        options = (stride, padding, dilation, groups)
        d_input, d_weight, _ = conv.convolution_backward(unpooled(), input, weight, *options, [*needed[:2], False])
    if needed[2]:
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        d_bias.copy_(torch.where(code == op.DEAD, 0, grad).sum((0, 2, 3), dtype=dtype))
    return d_input, d_weight, d_bias
