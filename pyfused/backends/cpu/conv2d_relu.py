"""conv2d_relu and conv2d_relu_max_pool2d on the CPU: five algorithms, chosen by `algorithm`.

direct      own kernel for few input channels (first layers), either layout: bias, ReLU and 2x2 pooling in registers.
winograd    own kernel for 3x3 with stride 1 in channels_last; F(4x4, 3x3) or F(3x3, 3x3), error about 1e-5 of the
            output's scale.
implicit_gemm   own matrix product, float32, either layout, ReLU inside; forward only. As fast as oneDNN, for which
            PyTorch arranges the weight anew in every call: so it takes weights that are large beside the maps, as those
            of a single image are (1.1 to 2.9 times eager's speed), 1x1 kernels in channels_last (1.1 to 1.4), and in
            NCHW small 1x1 (1.2 to 1.8) and strided ones (1.0 to 1.4); in training large 1x1 alone. Elsewhere it has 0.8
            to 1.0 of eager's speed.
depthwise   own kernels for as many groups as channels, float32: 3, 5 or 7 wide, stride 1 or 2, in channels_last.
aten        PyTorch's convolution (oneDNN) in the layout given, then one pass of ours: ReLU, or ReLU with pooling; in
            backward one pass that masks or unpools the gradient and sums it up to the bias gradient. That is no faster
            than eager PyTorch with the ReLU in place, so the public functions call this (`_cedes`); the registered ops,
            which torch.compile sees, run it.

16-bit tensors are float32 here on CPUs that multiply float32 faster (see `widen`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import _C
from ..._library import by_signature, needs_grad
from ...dispatch import kernel
from ...memory import cached, derived
from ...ops import conv2d_relu as op
from ...ops import conv2d_relu_max_pool2d as pool_op
from ...ops.conv_act import ACTIVATIONS
from .widen import is_dense, is_slow, widened

WINOGRAD_SAVES = 1200  # products per pair of channels
REMEMBERED_SAVES = 500  # the same without gradients, where the weight's transform is remembered
LEAST_GEMM, LEAST_GEMM_REMEMBERED = 256, 32  # positions that repay packing the weight, and reading it
LARGE_WEIGHT = 64 << 10  # bytes of a weight whose transform is worth remembering
RELU = ACTIVATIONS.index("relu")
# Numbers of output: in training, to make up for what an autograd.Function costs; in NCHW, to be transposed in a cache.
LEAST_TRAINED, MOST_TRANSPOSED = 1_500_000, 1_000_000


def algorithm(input, weight, bias, stride, padding, dilation, groups) -> str:
    """Which of the algorithms takes a convolution. Arguments: the registered op's."""
    c_out, c_in, kh, kw = weight.shape
    if groups == c_out > 1 and _is_depthwise(input, weight, stride, dilation):
        return "depthwise"
    if groups != 1:
        return "aten"
    dense = tuple(dilation) == (1, 1)
    winograd = dense and (kh, kw) == (3, 3) and tuple(stride) == (1, 1) and max(padding) <= 2
    winograd = winograd and input.dtype == torch.float32
    if winograd and op.allowed_algorithms() == "winograd":
        return "winograd"
    if dense and c_in <= 4 and max(kh, kw) <= 7 and max(stride) <= 2 and input.dtype != torch.float64:
        return "direct"
    if min(c_in, c_out) < 16 or _C.isa() == "baseline" or input.dtype != torch.float32:
        return "aten"  # oneDNN is ahead on SSE2, whose vectors of 4 lose
    n, _, height, width = op.output_shape(input, weight, stride, padding, dilation)
    # The products saved, of 9 a position, must pay for the weight's transform, which costs as much as some hundred
    # positions. Incomplete tiles cost as much as whole ones.
    saves = n * (9 * height * width - min(_products(height, width, tile) for tile in (3, 4)))
    # In training this is asked by `_cedes`, before autograd stops recording: what then comes here saves enough, or a
    # backend was forced, or torch.compile is at work.
    trained = needs_grad(input, weight, bias)
    remembered = weight.nbytes >= LARGE_WEIGHT and not trained
    if winograd and op.allowed_algorithms() == "auto" and saves >= (REMEMBERED_SAVES if remembered else WINOGRAD_SAVES):
        return "winograd"
    if n * height * width < (LEAST_GEMM_REMEMBERED if remembered else LEAST_GEMM):
        return "aten"
    nchw, size = op.memory_format(input, weight) == torch.contiguous_format, n * c_out * height * width
    pointwise = (kh, kw) == (1, 1) and max(padding) == 0
    if trained:
        return "implicit_gemm" if pointwise and not nchw and size >= LEAST_TRAINED else "aten"
    wins = 3 * weight.numel() > input.numel()  # PyTorch arranges the weight for oneDNN in every call
    if nchw:
        wins |= (pointwise and size < MOST_TRANSPOSED) or (min(stride) > 1 and c_in >= 32)
    else:
        wins |= pointwise
    return "implicit_gemm" if wins else "aten"


def _is_depthwise(input, weight, stride, dilation) -> bool:
    """Whether the depthwise kernels serve this: `groups` is the number of output channels."""
    c_out, c_in, kh, kw = weight.shape
    return (
        c_in == 1
        and kw in (3, 5, 7)
        and kh <= 16
        and tuple(stride) in ((1, 1), (2, 2))
        and tuple(dilation) == (1, 1)
        and c_out >= 16
        and input.dtype == torch.float32
        and _C.isa() != "baseline"
        and op.memory_format(input, weight) == torch.channels_last
    )


def _cedes(*args) -> bool:
    """Whether eager PyTorch does as well: its own convolution would run."""
    return not is_slow(args[0]) and algorithm(*args[:7]) == "aten"


def _pool_cedes(*args) -> bool:
    """The same, without gradients, for which eager would save the full-size activation, and in channels_last: in NCHW
    our pooling pass is ahead of PyTorch's. The direct kernels pool in registers."""
    if is_slow(args[0]) or needs_grad(*args[:3]) or op.memory_format(*args[:2]) == torch.contiguous_format:
        return False
    return algorithm(*args[:7]) == "aten"


@by_signature
def _plan(_, *args) -> tuple[str, tuple[int, ...], torch.memory_format]:
    """(algorithm, output's shape, layout) of a convolution, after what is allowed: op.allowed_algorithms()."""
    input, weight, _, stride, padding, dilation, _ = args
    return algorithm(*args), op.output_shape(input, weight, stride, padding, dilation), op.memory_format(input, weight)


def _empty(shape, layout, like: torch.Tensor) -> torch.Tensor:
    n, c, h, w = shape
    if n * c * h * w * like.itemsize < _C.cache_smallest:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    # Not cached(torch.empty(...)): for one image, the system's calls behind it cost as much as a small convolution.
    strides = (h * w * c, 1, w * c, c) if layout == torch.channels_last else (c * h * w, h * w, w, 1)
    return _C.cached_like(like, shape, strides)


def _dense(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` in the layout of `like` (contiguous or channels_last); a copy only where it is not."""
    return x.contiguous(memory_format=op.memory_format(like))


def _channels_last(x: torch.Tensor, fill: bool = True) -> torch.Tensor:
    """`x` if it is channels_last, else a channels_last copy; not `fill`: only its allocation."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    copy = cached(torch.empty_like(x, memory_format=torch.channels_last))
    return _convert(copy, x) if fill else copy


def _convert(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out.copy_(x) where one of them is channels_last; nothing where they are the same."""
    if x is not out:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        _C.convert_layout(out, x, torch.get_num_threads())
    return out


def _aten(*args) -> torch.Tensor:
    """PyTorch's convolution, then ReLU in place. (oneDNN could do both at once, but turns NaN into 0.)"""
    input, weight, bias, stride, padding, dilation, groups = args
    # Not torch.ops.aten.convolution, which takes 4 us more to call.
    out = torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups).relu_()
    # Where no dimension is 1, a dense layout determines the strides: nothing need be allocated to compare with.
    if 1 not in out.shape and out.is_contiguous(memory_format=op.memory_format(input, weight)):
        return out
    return op.conform(out, op.alloc(*args))


def _products(height: int, width: int, tile: int) -> int:
    """Of an input channel and an output channel, for height x width results in tiles of tile x tile."""
    return -(-height // tile) * -(-width // tile) * (tile + 2) ** 2


def winograd_tile(output: torch.Tensor) -> int:
    """3 or 4: the side of the tiles that take fewer products for the results [..., height, width]."""
    size = output.shape[-2:]
    return 3 if _products(*size, 3) < _products(*size, 4) else 4


def transformed(weight: torch.Tensor, tile: int = 4) -> torch.Tensor:
    """What the Winograd kernels take for a weight: itself, or its transform if that is remembered."""
    size = (tile + 2) ** 2 * (weight.shape[1] * _padded_outputs(weight) + 16)
    return _prepared(weight, f"winograd {tile}", (size,), _C.conv2d_winograd_transform_weight, tile)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The same for implicit_gemm."""
    c_out, c_in, kh, kw = weight.shape
    return _prepared(weight, "implicit_gemm", (-(-c_out // 16), kh, kw, c_in, 16), _C.conv2d_implicit_gemm_pack)


def _padded_outputs(weight: torch.Tensor) -> int:
    return -(-weight.shape[0] // 16) * 16


def _prepared(weight: torch.Tensor, kind: str, shape: tuple, prepare: Callable, *options) -> torch.Tensor:
    """prepare(result, weight, *options, threads) if that is remembered or now made to be, else the weight."""
    if weight.nbytes < LARGE_WEIGHT or not is_dense(weight):
        return weight

    def make():
        result = cached(weight.new_empty(shape))
        prepare(result, weight, *options, torch.get_num_threads())
        return result

    result = derived(weight, kind, make)
    return weight if result is None else result


def implicit_gemm(out, convolution, residual, activation, slope) -> None:
    """Fills `out`; everything in its layout."""
    input, weight, bias, stride, padding, dilation, _ = convolution
    given = (_dense(input, out), packed(weight), bias, residual, *stride, *padding, *dilation)
    _C.conv2d_implicit_gemm(out, *given, activation, slope, torch.get_num_threads())


@kernel("conv2d_relu", "cpu", cedes=_cedes)
@widened(op.alloc, weight=1)
def forward(*args):
    input, weight, bias, stride, padding, _, _ = args
    threads = torch.get_num_threads()
    chosen, shape, layout = _plan(op.allowed_algorithms(), *args)
    if chosen == "aten":
        return _aten(*args)
    out = _empty(shape, layout, input)
    if chosen == "direct":
        _C.conv2d_direct(out, None, input, weight, bias, *stride, *padding, threads)
        return out
    if chosen == "implicit_gemm":
        implicit_gemm(out, args, None, RELU, 0.0)
        return out
    if chosen == "depthwise":
        _C.conv2d_depthwise(out, _dense(input, out), weight, bias, stride[0], *padding, threads)
        return out
    result = _channels_last(out, fill=False)
    tile = winograd_tile(out)
    _C.conv2d_winograd(result, _channels_last(input), transformed(weight, tile), bias, *padding, True, tile, threads)
    return _convert(out, result)


@kernel("conv2d_relu_max_pool2d", "cpu", cedes=_pool_cedes)
@widened(pool_op.alloc, weight=1)
def pool_forward(*args):
    input, weight, bias, stride, padding, *_, pool_size, pool_stride = args
    threads = torch.get_num_threads()
    chosen, shape, layout = _plan(op.allowed_algorithms(), *args[:7])
    out = _empty(pool_op.pooled_shape(shape, pool_size, pool_stride), layout, input)
    code = cached(torch.empty_like(out, dtype=torch.uint8))
    chosen = chosen if _is_2x2(pool_size, pool_stride) else "aten"
    if chosen == "direct":
        _C.conv2d_direct(out, code, input, weight, bias, *stride, *padding, threads)
    elif chosen == "winograd":
        pooled, places = _channels_last(out, fill=False), _channels_last(code, fill=False)
        _C.conv2d_winograd_pool(pooled, places, _channels_last(input), transformed(weight), bias, *padding, threads)
        _convert(out, pooled)
        _convert(code, places)
    else:
        _C.relu_max_pool2d(out, code, forward(*args[:7]), *pool_size, *pool_stride, threads)
    return out, code


@kernel("conv2d_relu_backward", "cpu")
@widened(op.alloc_backward)
def backward(grad, input, weight, output, stride, padding, dilation, groups, needed):
    options = stride, padding, dilation, groups
    plan = _plan(op.allowed_algorithms(), input, weight, None, *options)
    grad = grad.contiguous(memory_format=plan[2])
    grads = _native_backward(plan, grad, input, weight, output, options, needed)
    if grads:
        return grads
    g = cached(torch.empty_like(grad)) if needed[0] or needed[1] else None
    d_bias = weight.new_empty(weight.shape[0] if needed[2] else 0)
    _C.conv2d_relu_grad(g, d_bias if needed[2] else None, grad, output, torch.get_num_threads())
    return _finish(g, d_bias, input, weight, options, needed)


@kernel("conv2d_relu_max_pool2d_backward", "cpu")
@widened(pool_op.alloc_backward)
def pool_backward(grad, input, weight, code, stride, padding, dilation, groups, pool_size, pool_stride, needed):
    options = stride, padding, dilation, groups
    plan = _plan(op.allowed_algorithms(), input, weight, None, *options)
    grad, g = grad.contiguous(memory_format=plan[2]), None
    if _is_2x2(pool_size, pool_stride):
        grads = _native_backward(plan, grad, input, weight, code, options, needed)
        if grads:
            return grads
    d_bias = weight.new_empty(weight.shape[0] if needed[2] else 0)
    if needed[2]:
        _C.conv2d_relu_grad(None, d_bias, grad, code, torch.get_num_threads())
    if needed[0] or needed[1]:
        g = _empty(*plan[1:], grad)
        _C.relu_max_unpool2d(g, grad, code, *pool_size, *pool_stride, torch.get_num_threads())
    return _finish(g, d_bias, input, weight, options, needed)


def _is_2x2(pool_size, pool_stride) -> bool:
    """Whether the kernels that pool in registers serve this."""
    return tuple(pool_size) == tuple(pool_stride) == (2, 2)


def _native_backward(plan, grad, input, weight, saved, options, needed):
    """All gradients from the kernels that mask or unpool `grad` themselves, or None where there are none."""
    _, padding, _, _ = options
    threads = torch.get_num_threads()
    chosen, _, layout = plan
    if not needed[1] or chosen in ("aten", "implicit_gemm") or (chosen == "direct" and needed[0]):
        return None
    if chosen == "depthwise" and saved.dtype == torch.uint8:
        return None
    d_input, d_weight, d_bias = map(cached, op.alloc_grads(input, weight, needed, layout))
    bias = d_bias if needed[2] else None
    if chosen == "direct":
        _C.conv2d_direct_backward_weight(d_weight, bias, grad, saved, input, *options[0], *padding, threads)
        return d_input, d_weight, d_bias
    if chosen == "depthwise":
        result = d_input if needed[0] else None
        input = _channels_last(input)
        _C.conv2d_depthwise_backward(
            result, d_weight, bias, grad, saved, input, weight, options[0][0], *padding, threads
        )
        return d_input, d_weight, d_bias
    winograd_backward(d_input if needed[0] else None, d_weight, bias, grad, saved, input, weight, padding)
    return d_input, d_weight, d_bias


def winograd_backward(d_input, d_weight, d_bias, grad, saved, input, weight, padding) -> None:
    """Fills the gradients that are not None. saved: the output or the pool's code; None: grad is not masked."""
    tile = 4 if saved is not None and saved.dtype == torch.uint8 else winograd_tile(grad)
    grad, threads = _channels_last(grad), torch.get_num_threads()
    saved = None if saved is None else _channels_last(saved)
    _C.conv2d_winograd_backward_weight(d_weight, d_bias, grad, saved, _channels_last(input), *padding, tile, threads)
    if d_input is not None:
        result = _channels_last(d_input, fill=False)
        _C.conv2d_winograd_backward_input(result, grad, saved, weight, *padding, tile, threads)
        _convert(d_input, result)


def _finish(g, d_bias, input, weight, options, needed):
    """The other two gradients, from PyTorch, for the gradient `g` of the convolution's output."""
    needed = [*needed[:2], False]
    if g is None:
        return (*op.alloc_grads(input, weight, needed)[:2], d_bias)
    return (*op.convolution_backward(g, input, weight, *options, needed)[:2], d_bias)
