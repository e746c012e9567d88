"""First layers on CUDA: csrc/cuda/conv2d_direct.cu and conv2d_direct_backward.cu, for at most 4 input channels.

Bias, ReLU and 2x2 pooling in registers; in backward the mask or the codes are applied while the gradient is read. Where
the input needs a gradient, which that of a first layer seldom does, it is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import _C
from ...ops import conv2d_relu as op

_PARTS = 256  # blocks of the weight gradient, about two a multiprocessor


def cannot(input, weight, stride, padding, dilation, groups) -> str | None:
    """Why the direct kernels cannot run this convolution, or None."""
    c_in, kernel_size = weight.shape[1], tuple(weight.shape[2:])
    if groups != 1 or tuple(dilation) != (1, 1):
        return "the direct kernels have no groups and no dilation"
    if c_in > 4 or max(kernel_size) > 7:
        return (
            f"the direct kernels take up to 4 channels and 7x7 taps, not {c_in} and {kernel_size[0]}x{kernel_size[1]}"
        )
    if max(stride) > 2:
        return f"the direct kernels take strides of 1 and 2, not {tuple(stride)}"
    if input.dtype == torch.float64:
        return "the direct kernels have no float64"
    rows, columns = op.output_shape(input, weight, stride, padding, dilation)[2:]
    if max(*input.shape[2:], *padding, rows * columns) >= 2**28:
        return "the direct kernels take fewer than 2^28 rows, columns and output positions of an image"
    return None


def forward(out, code, input, weight, bias, stride, padding) -> None:
    """Fills `out`, and with a 2x2 pooling `code`; without, that is None."""
    _C.cuda_conv2d_direct(out, code, input, weight, bias, *stride, *padding)


def backward(grad, saved, input, weight, stride, padding, needed, masked: Callable[[], torch.Tensor]):
    """(d_input, d_weight, d_bias), as far as needed. saved: the output, or codes of a 2x2 pooling; masked: makes the
    gradient of the convolution's output."""
    d_input, d_weight, d_bias = op.alloc_grads(input, weight, needed)
    if needed[1] or needed[2]:
        c_out, per_output = weight.shape[0], weight[0].numel() + 1
        rounded = -(-c_out // 8) * 8 if c_out <= 32 else -(-c_out // 32) * 32
        tile = 32 if saved.dtype == torch.uint8 else 128
        parts = min(_PARTS, max(1, saved.numel() // max(c_out, 1) // tile))
        workspace = weight.new_empty(parts, rounded * per_output, dtype=torch.float32)
        given = (workspace, grad.contiguous(memory_format=op.memory_format(saved)), saved, input)
        written = (d_weight if needed[1] else torch.empty_like(weight), d_bias if needed[2] else None)
        _C.cuda_conv2d_direct_backward_weight(*written, *given, *stride, *padding)
    if needed[0]:
        options = (stride, padding, (1, 1), 1)
        d_input = op.convolution_backward(masked(), input, weight, *options, [True, False, False])[0]
    return d_input, d_weight, d_bias
