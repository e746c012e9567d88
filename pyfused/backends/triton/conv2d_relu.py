"""conv2d_relu and conv2d_relu_max_pool2d in Triton, in one of two ways:

own   the implicit matrix products of conv2d.py, with bias, ReLU and pooling inside. Channels side by side: what comes
      in NCHW is copied.
aten  PyTorch's convolution (cuDNN, MIOpen); in forward then one pass for ReLU and pooling; in backward before it one
      that masks or unpools the gradient and sums it up to the bias gradient. Groups always go this way.

The rule: own where memory is the bound, aten where arithmetic is, since Triton's products are said to reach 0.7 to 0.9
of cuDNN's speed. PYFUSED_AUTOTUNE=1 measures instead. Nobody has measured the rule on a GPU yet. The same bits every
time: always on the own way; on the other where PyTorch's convolution gives them (torch.backends.cudnn.deterministic).
"""

from __future__ import annotations

import math

import torch
import triton

from ...ops import conv2d_relu as op
from ...ops import conv2d_relu_max_pool2d as pool_op
from . import conv2d
from .common import bucket, choose, kernel

WHOLE = (1, 1, 1, 1)  # no pooling: windows of one element
# Flops per byte moved from which arithmetic is the bound: with tensor cores and without. An H100's own ratios are 150
# (TF32) to 300 and 20; its tensor cores get nowhere near them.
ARITHMETIC, PLAIN = 64, 16
PROGRAMS = 512  # a weight gradient is split into so many, a few for each multiprocessor
CHUNK = 512  # but at least so many pixels each


def _ways(input, weight, groups) -> list[bool]:
    """Whether to use our own products: the candidates, the one of the rule first."""
    if groups != 1:
        return [False]
    if not input.is_cuda or not torch.backends.cudnn.enabled:
        return [True]
    outputs, channels, *kernel_size = weight.shape
    flops = 2 * channels * outputs * kernel_size[0] * kernel_size[1]  # per pixel
    plain = input.dtype == torch.float64 or (input.dtype == torch.float32 and _precision(input.dtype) == "ieee")
    light = flops <= (PLAIN if plain else ARITHMETIC) * (channels + outputs) * input.dtype.itemsize
    return [light, not light]


def _key(name, input, weight, *options):
    how = (name, input.device, input.dtype, _precision(input.dtype), input.stride(1) == 1)
    return (*how, bucket(input.shape[0]), *input.shape[1:], weight.shape[0], *weight.shape[2:], options)


def _precision(dtype: torch.dtype) -> str:
    """TF32 where PyTorch's convolutions may use it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if tf32 else "ieee"


def _tiles(weight: torch.Tensor, columns: int, depth: int, widest: int = 64) -> list[tuple[int, int, int, int, int]]:
    """(rows, columns, depth, warps, stages) of a program's product; the rule of thumb first.

    A thread holds 32 sums: with 64, what else it holds no longer fits its registers. Where channels are no multiples of
    16, Triton reads a number at a time, with an address for each: half as deep, and 16 sums to a thread.
    """
    dtype, aligned = weight.dtype, weight.shape[0] % 16 == weight.shape[1] % 16 == 0
    deepest = (128 if aligned else 64) // dtype.itemsize
    columns, depth = (min(max(bucket(x), 16), max(most, 16)) for x, most in ((columns, widest), (depth, deepest)))
    if dtype == torch.float64:
        return [(32, min(columns, 32), depth, 4, 2)]
    if dtype == torch.float32 and _precision(dtype) == "ieee":
        return [(64, columns, depth, 4, 2), (32, columns, depth, 4, 2)]
    return [(64, columns, depth, 4 if aligned else 8, 3), (128, columns, depth, 8, 3)]


def _nhwc(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` with its channels side by side."""
    if x is None or x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """[C_out, KH, KW, C_in]."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _grid(rows: int, columns: int, tile) -> int:
    return triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])


FLAT = 16  # with so few channels blocks go across taps: one tap would fill half of a block or less


# --- Our own products
def _product(out, code, input, weight, bias, stride, padding, dilation, pool):
    n, outputs, out_rows, out_columns = out.shape
    channels, rows, columns = input.shape[1:]
    taps = weight.shape[2] * weight.shape[3]
    pixels = n * out_rows * out_columns
    given = (out, code, input, _matrix(weight), bias, pixels, channels, outputs, rows, columns, out_rows, out_columns,
             weight.shape[3], taps, input.stride(), out.stride(), stride, padding, dilation)  # fmt: skip

    def run(tile):
        block = {"PIXELS": tile[0], "OUTPUTS": tile[1], "DEPTH": tile[2], "num_warps": tile[3], "num_stages": tile[4]}
        flags = {"POOL": pool, "PRECISION": _precision(input.dtype), "FLAT": channels <= FLAT}
        conv2d._forward_kernel[(_grid(pixels, outputs, tile),)](*given, **flags, **block)

    # Pooling keeps a maximum and its place for each sum; FLAT an address for each element of a block.
    depth = min(channels * taps, 32 if channels <= FLAT else channels)
    tiles = _tiles(weight, outputs, depth, 64 if pool == WHOLE else 32)
    run(choose(_key("conv2d_forward", input, weight, stride, dilation, pool), tiles, run))


def _own_forward(args, pool):
    input, weight, bias, stride, padding, dilation, _ = args
    bias = None if bias is None else bias.contiguous()
    given = (_nhwc(input), weight, bias, tuple(stride), tuple(padding), tuple(dilation))
    if pool is None:
        out = op.alloc(*args)
        _product(out, None, *given, WHOLE)
        return out, None
    if _overlaps(pool):  # an element would be computed once for each of its windows
        shape = op.output_shape(input, weight, stride, padding, dilation)
        activation = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        _product(activation, None, *given, WHOLE)
        return _pool(activation, args, pool)
    out, code = pool_op.alloc(*args, pool[:2], pool[2:])
    _product(out, code, *given, pool)
    return out, code


def _overlaps(pool) -> bool:
    """Whether an element of the activation may be in several windows."""
    return pool[2] < pool[0] or pool[3] < pool[1]


def _sizes(grad, input, weight, out_shape):
    return (input.shape[1], weight.shape[0], *input.shape[2:], *out_shape[2:], *grad.shape[2:])


def _backward_input(grad_input, grad, saved, weight, options, out_shape, pool):
    stride, _, dilation = options
    steps = tuple(s // math.gcd(s, d) for s, d in zip(stride, dilation))
    n, channels, rows, columns = grad_input.shape
    pixels = n * triton.cdiv(rows, stride[0]) * triton.cdiv(columns, stride[1])
    strides = (grad_input.stride(), grad.stride(), (grad if saved is None else saved).stride())
    sizes = (n, *_sizes(grad, grad_input, weight, out_shape), *weight.shape[2:])
    given = (grad_input, grad, saved, _matrix(weight), *sizes, *strides, *options, steps)

    def run(tile):
        block = {"PIXELS": tile[0], "CHANNELS": tile[1], "DEPTH": tile[2], "num_warps": tile[3], "num_stages": tile[4]}
        grid = (_grid(pixels, channels, tile), stride[0] * stride[1])
        conv2d._backward_input_kernel[grid](*given, POOL=pool, PRECISION=_precision(grad.dtype), **block)

    tiles = _tiles(weight, channels, weight.shape[0])
    run(choose(_key("conv2d_backward_input", grad_input, weight, *options, pool), tiles, run))


def _backward_weight(grad_weight, grad_bias, grad, saved, input, options, out_shape, pool):
    outputs, channels, kernel_rows, kernel_columns = grad_weight.shape
    taps, pixels = kernel_rows * kernel_columns, out_shape[0] * out_shape[2] * out_shape[3]
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    strides = (input.stride(), grad.stride(), (grad if saved is None else saved).stride())
    sizes = (*_sizes(grad, input, grad_weight, out_shape), kernel_columns, taps)

    def run(tile):
        rows, columns, depth, warps, stages = tile
        blocks = triton.cdiv(outputs, rows) * (triton.cdiv(taps * channels, columns) if flat else
                                               taps * triton.cdiv(channels, columns))  # fmt: skip
        splits = max(1, min(PROGRAMS // blocks, pixels // CHUNK), triton.cdiv(pixels, 1 << 28))
        chunk = triton.cdiv(triton.cdiv(pixels, splits), depth) * depth
        splits = triton.cdiv(pixels, chunk)
        weights = torch.empty(splits, outputs, kernel_rows, kernel_columns, channels, dtype=work, device=grad.device)
        biases = weights.new_empty(splits, outputs) if grad_bias.numel() else None
        block = {"PIXELS": depth, "OUTPUTS": rows, "DEPTH": columns, "num_warps": warps, "num_stages": stages}
        conv2d._backward_weight_kernel[(blocks, splits)](
            weights, biases, grad, saved, input, pixels, chunk, *sizes, *strides,
            *options, POOL=pool, PRECISION=_precision(grad.dtype), FLAT=flat, **block,
        )  # fmt: skip
        return weights, biases

    flat = channels <= FLAT
    tiles = _tiles(grad_weight, channels * taps if flat else channels, pixels, 32 if flat else 64)
    tiles = [(min(rows, max(bucket(outputs), 16)), *rest) for rows, *rest in tiles]
    weights, biases = run(choose(_key("conv2d_backward_weight", input, grad_weight, *options, pool), tiles, run))
    grad_weight.copy_(weights.sum(0).permute(0, 3, 1, 2))
    if grad_bias.numel():
        grad_bias.copy_(biases.sum(0))


def _own_backward(grads, grad, saved, input, weight, options, out_shape, pool, needed):
    grad_input, grad_weight, grad_bias = grads
    grad, saved, options = _nhwc(grad), _nhwc(saved), tuple(map(tuple, options[:3]))
    # Triton 3.7 aborts, in an assertion of its own, on products of float64 that hang on bytes: unpooled before.
    unpool = pool and (_overlaps(pool) or grad.dtype == torch.float64)
    if unpool or (needed[2] and not needed[1]):
        grad = _gradient(grad_bias, grad, saved, out_shape, pool, needed[0] or needed[1])
        saved = pool = None
    if needed[0]:
        _backward_input(grad_input, grad, saved, weight, options, out_shape, pool)
    if needed[1]:
        _backward_weight(grad_weight, grad_bias, grad, saved, _nhwc(input), options, out_shape, pool)


# --- Before and after PyTorch's convolution
def _passes(n, outputs, rows, columns):
    """(grid, constants) of a pass over a map."""
    block = min(bucket(outputs), 64)
    each = max(1, (2048 if outputs % 16 == 0 else 1024) // block)  # with vectors a thread has room for twice as much
    grid = (triton.cdiv(n * rows * columns, each), triton.cdiv(outputs, block))
    return grid, {"PIXELS": each, "OUTPUTS": block}


def _pool(activation, args, pool):
    out, code = pool_op.alloc(*args, pool[:2], pool[2:])
    n, outputs, rows, columns = out.shape
    grid, block = _passes(*out.shape)
    sizes = (n * rows * columns, outputs, rows, columns, activation.stride(), out.stride())
    conv2d._pool_kernel[grid](out, code, activation, *sizes, POOL=pool, **block)
    return out, code


def _aten_forward(args, pool):
    input, weight, bias, stride, padding, dilation, groups = args
    activation = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return (op.conform(activation.relu_(), op.alloc(*args)), None) if pool is None else _pool(activation, args, pool)


def _gradient(grad_bias, grad, saved, out_shape, pool, wanted: bool):
    """The convolution's own gradient, if wanted, and of it the bias gradient, if that has elements."""
    n, outputs, rows, columns = out_shape
    grid, block = _passes(*out_shape)
    shape, layout = out_shape if wanted else (0, 1, 1, 1), torch.channels_last
    g = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    partial = torch.empty(grid[0], outputs, dtype=work, device=grad.device) if grad_bias.numel() else None
    sizes = (n * rows * columns, outputs, rows, columns, *grad.shape[2:], g.stride(), grad.stride(), saved.stride())
    conv2d._gradient_kernel[grid](g if wanted else None, partial, grad, saved, *sizes, POOL=pool, **block)
    if partial is not None:
        grad_bias.copy_(partial.sum(0))
    return g


def _aten_backward(grads, grad, saved, input, weight, options, out_shape, pool, needed):
    g = _gradient(grads[2], _nhwc(grad), _nhwc(saved), out_shape, pool, needed[0] or needed[1])
    if needed[0] or needed[1]:
        found = op.convolution_backward(g, input, weight, *options, [*needed[:2], False])
        for x, like in zip(found[:2], grads):
            like.copy_(x)


# --- The ops
def _forward(args, pool):
    input, weight, _, stride, padding, dilation, groups = args
    if not input.numel():
        return pool_op.alloc(*args, pool[:2], pool[2:]) if pool else (op.alloc(*args), None)

    def run(own):
        return (_own_forward if own else _aten_forward)(args, pool)

    key = _key("conv2d", input, weight, *map(tuple, (stride, padding, dilation)), pool)
    return run(choose(key, _ways(input, weight, groups), run))


def _backward(grad, input, weight, saved, options, pool, needed):
    grads = op.alloc_grads(input, weight, needed)
    if not grad.numel():
        return tuple(g.zero_() for g in grads)
    out_shape = op.output_shape(input, weight, *options[:3])

    def run(own):
        way = _own_backward if own else _aten_backward
        way(grads, grad, saved, input, weight, options, out_shape, pool, needed)

    key = _key("conv2d_backward", input, weight, *map(tuple, options[:3]), pool, tuple(needed))
    run(choose(key, _ways(input, weight, options[3]), run))
    return grads


def cannot(*args) -> str | None:
    return None


@kernel("conv2d_relu", cannot)
def forward(*args):
    return _forward(args, None)[0]


@kernel("conv2d_relu_max_pool2d", cannot)
def pool_forward(*args):
    return _forward(args[:7], (*args[7], *args[8]))


@kernel("conv2d_relu_backward", cannot)
def backward(grad, input, weight, output, stride, padding, dilation, groups, needed):
    return _backward(grad, input, weight, output, (stride, padding, dilation, groups), None, needed)


@kernel("conv2d_relu_max_pool2d_backward", cannot)
def pool_backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    pool = (*pool_size, *pool_stride)
    return _backward(grad, input, weight, code, (stride, padding, dilation, groups), pool, needed)
