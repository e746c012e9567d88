"""conv2d_relu and conv2d_relu_max_pool2d on the CPU: three algorithms, chosen by `algorithm`.

direct      own kernel for few input channels (first layers), either layout: bias, ReLU and 2x2 pooling in registers.
winograd    own kernel for 3x3 with stride 1 in channels_last; F(4x4, 3x3), error about 1e-5 of the output's scale.
aten        PyTorch's convolution (oneDNN) in the layout given, then one pass of ours: ReLU, or ReLU with pooling; in
            backward one pass that masks or unpools the gradient and sums it up to the bias gradient.
"""

from __future__ import annotations

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import conv2d_relu as op
from ...ops import conv2d_relu_max_pool2d as pool_op

_forced = "auto"


def set_conv_algorithm(name: str) -> None:
    """Which algorithms the CPU convolutions may use.

    Args:
        name: "auto" (the fastest), "direct" (no Winograd: float32 rounding as in PyTorch) or "winograd" (Winograd
            wherever it can run, also where it is not the fastest).

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in ("auto", "direct", "winograd"):
        raise ValueError(f"no convolution algorithm is called {name!r}; there are 'auto', 'direct' and 'winograd'")
    _forced = name


def algorithm(input, weight, bias, stride, padding, dilation, groups) -> str:
    """The algorithm of the forward pass: "direct", "winograd" or "aten"."""
    _, c_in, kh, kw = weight.shape
    if groups != 1 or tuple(dilation) != (1, 1):
        return "aten"
    if c_in <= 4 and max(kh, kw) <= 7 and max(stride) <= 2 and input.dtype != torch.float64:
        return "direct"
    return "aten"


def _dense(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` in the layout of `like` (contiguous or channels_last); a copy only where it is not."""
    return x.contiguous(memory_format=op.memory_format(like))


def _aten(input, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    """The convolution alone, dense in the layout that the op promises."""
    out = torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return out.contiguous(memory_format=op.memory_format(input, weight))


@kernel("conv2d_relu", "cpu")
def forward(*args):
    input, weight, bias, stride, padding, _, _ = args
    if algorithm(*args) == "direct":
        out = op.alloc(*args)
        _C.conv2d_direct(out, None, input, weight, bias, *stride, *padding, torch.get_num_threads())
        return out
    out = _aten(*args).relu_()
    return op.conform(out, op.alloc(*args))


@kernel("conv2d_relu_max_pool2d", "cpu")
def pool_forward(*args):
    input, weight, bias, stride, padding, *_, pool_size, pool_stride = args
    out, code = pool_op.alloc(*args)
    threads = torch.get_num_threads()
    if algorithm(*args[:7]) == "direct" and _is_2x2(pool_size, pool_stride):
        _C.conv2d_direct(out, code, input, weight, bias, *stride, *padding, threads)
    else:
        activation = forward(*args[:7])
        _C.relu_max_pool2d(out, code, activation, *pool_size, *pool_stride, threads)
    return out, code


@kernel("conv2d_relu_backward", "cpu")
def backward(grad, input, weight, output, stride, padding, dilation, groups, needed):
    options = stride, padding, dilation, groups
    grad = _dense(grad, output)
    grads = _native_backward(grad, input, weight, output, options, needed)
    if grads:
        return grads
    g = torch.empty_like(grad) if needed[0] or needed[1] else None
    _, _, d_bias = op.alloc_grads(input, weight, needed)
    _C.conv2d_relu_grad(g, d_bias if needed[2] else None, grad, output, torch.get_num_threads())
    return _finish(g, d_bias, input, weight, options, needed)


@kernel("conv2d_relu_max_pool2d_backward", "cpu")
def pool_backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    options = stride, padding, dilation, groups
    grad, g = _dense(grad, code), None
    if _is_2x2(pool_size, pool_stride):
        grads = _native_backward(grad, input, weight, code, options, needed)
        if grads:
            return grads
    _, _, d_bias = op.alloc_grads(input, weight, needed)
    if needed[2]:
        _C.conv2d_relu_grad(None, d_bias, grad, code, torch.get_num_threads())
    if needed[0] or needed[1]:
        shape = op.output_shape(input, weight, stride, padding, dilation)
        g = torch.empty(shape, dtype=grad.dtype, memory_format=op.memory_format(code))
        _C.relu_max_unpool2d(g, grad, code, *pool_size, *pool_stride, torch.get_num_threads())
    return _finish(g, d_bias, input, weight, options, needed)


def _is_2x2(pool_size, pool_stride) -> bool:
    """Whether the kernels that pool in registers serve this."""
    return tuple(pool_size) == tuple(pool_stride) == (2, 2)


def _native_backward(grad, input, weight, saved, options, needed):
    """All gradients from the kernels that mask or unpool `grad` themselves, or None where there are none."""
    stride, padding, _, _ = options
    threads = torch.get_num_threads()
    if algorithm(input, weight, None, *options) == "direct" and needed[1] and not needed[0]:
        d_input, d_weight, d_bias = op.alloc_grads(input, weight, needed)
        bias = d_bias if needed[2] else None
        _C.conv2d_direct_backward_weight(d_weight, bias, grad, saved, input, *stride, *padding, threads)
        return d_input, d_weight, d_bias
    return None


def _finish(g, d_bias, input, weight, options, needed):
    """The other two gradients, from PyTorch, for the gradient `g` of the convolution's output."""
    needed = [*needed[:2], False]
    if g is None:
        return (*op.alloc_grads(input, weight, needed)[:2], d_bias)
    return (*op.convolution_backward(g, input, weight, *options, needed)[:2], d_bias)
