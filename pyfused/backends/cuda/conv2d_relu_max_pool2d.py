"""conv2d_relu_max_pool2d on CUDA, by the algorithms of conv2d_relu.py. The direct kernels and the implicit GEMM pool
2x2 windows themselves; else csrc/cuda/conv2d_pool.cu comes after the convolution, in backward before it."""

from __future__ import annotations

import math

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import conv2d_relu as conv
from ...ops import conv2d_relu_max_pool2d as op
from . import conv2d_direct as direct
from . import conv2d_relu as relu


def _cannot(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride) -> str | None:
    if math.prod(conv.output_shape(input, weight, stride, padding, dilation)[1:]) >= 2**30:
        return "the pooling kernels take fewer than 2^30 numbers an image"
    return None


def _cannot_backward(grad, input, weight, code, *options_and_needed) -> str | None:
    return _cannot(input, weight, None, *options_and_needed[:-1])


def _is_2x2(pool_size, pool_stride) -> bool:
    """Whether the kernels that pool themselves serve this."""
    return tuple(pool_size) == tuple(pool_stride) == (2, 2)


def _plan(*args) -> relu.Plan:
    input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride = args
    inside = _is_2x2(pool_size, pool_stride)
    rule = relu.choose(input, weight, stride, padding, dilation, groups, pooled=inside)

    def filled(run, *given):
        out, code = op.alloc(*args)
        run(out, code, *given)
        return out, code

    def pooled(activation):
        return filled(_C.cuda_relu_max_pool2d, activation, *pool_size, *pool_stride)

    def by_cudnn():  # the pooling kernel has the ReLU
        activation = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
        return pooled(activation.contiguous(memory_format=conv.memory_format(input, weight)))

    candidates = {name: lambda run=run: pooled(run()) for name, run in relu.plan(*args[:7]).candidates.items()}
    if inside:
        own = {
            "direct": lambda: filled(direct.forward, *args[:5]),
            "implicit_gemm": lambda: filled(relu.gemm, *args[:6]),
        }
        candidates |= {name: run for name, run in own.items() if name in candidates}
    candidates["cudnn"] = by_cudnn
    return relu.Plan(candidates, rule, ("pool", *args))


def _plan_backward(
    grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed
) -> relu.Plan:
    options, inside = (stride, padding, dilation, groups), _is_2x2(pool_size, pool_stride)
    rule = relu.choose(input, weight, *options, backward=True)

    def unpooled():
        layout, shape = conv.memory_format(code), conv.output_shape(input, weight, stride, padding, dilation)
        g = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        _C.cuda_relu_max_unpool2d(g, grad.contiguous(memory_format=layout), code, *pool_size, *pool_stride)
        return g

    def by_cudnn():
        d_input, d_weight, d_bias = conv.alloc_grads(input, weight, needed)
        if needed[0] or needed[1]:
            d_input, d_weight, _ = conv.convolution_backward(unpooled(), input, weight, *options, [*needed[:2], False])
        if needed[2]:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            d_bias.copy_(torch.where(code == op.DEAD, 0, grad).sum((0, 2, 3), dtype=dtype))
        return d_input, d_weight, d_bias

    def by_direct():
        return direct.backward(grad, code, input, weight, stride, padding, needed, unpooled)

    def by_gemm():
        given, saved = (grad, code) if inside else (unpooled(), None)
        return relu.gemm_backward(given, input, weight, saved, *options[:3], needed)

    candidates = {"cudnn": by_cudnn}
    if inside and not direct.cannot(input, weight, *options):
        candidates["direct"] = by_direct
    elif rule[0] == "direct":
        rule = "cudnn", "the direct kernels take codes of 2x2 windows only"
    if not relu.cannot_gemm(input, weight, *options):
        candidates["implicit_gemm"] = by_gemm
    key = ("pool backward", grad, input, weight, *options, pool_size, pool_stride, tuple(needed))
    return relu.Plan(candidates, rule, key)


@kernel("conv2d_relu_max_pool2d", "cuda", _cannot, how=lambda *args: _plan(*args).how())
def forward(*args):
    return _plan(*args).run()


@kernel("conv2d_relu_max_pool2d_backward", "cuda", _cannot_backward, how=lambda *args: _plan_backward(*args).how())
def backward(*args):
    return _plan_backward(*args).run()
