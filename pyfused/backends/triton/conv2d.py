"""Kernels for convolutions in Triton: implicit matrix products with everything elementwise inside.

Layout   channels side by side (NHWC, any distances between pixels); weights as a matrix [C_out, K], K = KH KW C_in.
Forward  rows are pixels of the output, columns its channels, the depth is K. With max-pooling a row is a pooled pixel:
         a product per place of the window, the maximum in registers. Without it the window is 1x1, and ReLU the maximum
         with 0. Depth in blocks within one tap (ky, kx), whose pixels are then rows at one distance from the output's;
         FLAT: few channels, blocks across taps.
Backward input: rows are pixels of the input, columns its channels, the depth is taps x C_out. With a stride only every
         stride-th tap meets a pixel: programs take the pixels of one residue, and the taps that meet them. Weight: rows
         are output channels, columns K, the depth is pixels; these are split over programs, whose parts are summed
         afterwards, in float32 (float64), in a fixed order: no atomics, the same bits every time. Both mask or unpool
         the gradient as they load it; bias: sums of that, in the programs of the first columns.
Bytes    forward: input and weight read and output written once, if the caches serve the taps' rereading: 3x3 from 64
         to 64 channels, 64 x 56 x 56, bfloat16: 51 MB, 15 us on an H100, and 14.8 GFLOP, 19 us at 790 TFLOP/s. Eager
         PyTorch moves the output four times more for bias and ReLU, and the pool's int64 indices. Backward: gradient
         and saved output (pooled: a byte) read by both products, the input read, its gradient written, partial weights
         of at most 512 tiles. _pool: the map read, a number and a byte written per window. _gradient: gradient and
         saved output (pooled: a byte) read, the map's gradient written. Each once, a pass's floor, unless windows
         overlap: then the caches serve what is read again.
Edges    a row or a channel past the end is 0 in both factors. NaN: kept by ReLU, the last of a window by the pool.
Offsets  of 64 bits; divisions of 32 (see _pixels).
"""

import triton
import triton.language as tl

from ...ops import conv2d_relu_max_pool2d as pool_op

DEAD = tl.constexpr(pool_op.DEAD)
NOWHERE = tl.constexpr(-(1 << 30))  # the row of a pixel past the end: no tap brings it into the image


@triton.jit
def _pixels(first, j, rows, columns):
    """(image, row, column) of the pixels first + j. `first` may need 64 bits, j not, and so no division per pixel."""
    x = (first % columns).to(tl.int32) + j
    y = (first // columns % rows).to(tl.int32) + x // columns
    return first // columns // rows + (y // rows).to(tl.int64), y % rows, x % columns


@triton.jit
def _within(i, n):
    """0 <= i < n, in one comparison."""
    return i.to(tl.uint32, bitcast=True) < n


@triton.jit
def _offsets(strides, n, y, x):
    return n.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]


@triton.jit
def _depth(step, channels, taps, kernel_columns, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """(ky, kx, c, k, inside) of the step-th block of a weight's K columns. Not FLAT: ky and kx have one element."""
    j = tl.arange(0, BLOCK)
    if FLAT:
        k = step * BLOCK + j
        tap, c = k // channels, k % channels
        inside = tap < taps
    else:
        blocks = tl.cdiv(channels, BLOCK)
        tap = step // blocks + tl.zeros((1,), tl.int32)
        c = step % blocks * BLOCK + j
        k = tap * channels + c
        inside = c < channels
    return tap // kernel_columns, tap % kernel_columns, c, k, inside


@triton.jit
def _image(input, strides, n, y, x, dy, dx, c, inside, rows, columns):
    """Input at the pixels (y + dy, x + dx), 0 outside of the image: [pixels, columns of the weight]."""
    at = input + _offsets(strides, n, y, x)
    to = dy.to(tl.int64) * strides[2] + dx.to(tl.int64) * strides[3] + c.to(tl.int64) * strides[1]
    y, x = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
    valid = inside[None, :] & _within(y, rows) & _within(x, columns)
    return tl.load(at[:, None] + to[None, :], mask=valid, other=0.0)


@triton.jit
def _gradient(grad, saved, n, y, x, c, ok, inside, rows, columns, g_strides, s_strides, POOL: tl.constexpr):
    """The gradient of the convolution's output at these pixels and channels, from that of relu or of the pooled map.

    saved: the output, the pool's code, or None: `grad` is what is wanted. POOL: (rows and columns of a window, steps).
    """
    DTYPE: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    if POOL is None:
        inside = ok[:, None] & inside[None, :]
        g = tl.load(grad + _offsets(g_strides, n, y, x)[:, None] + c[None, :] * g_strides[1], mask=inside, other=0.0)
        if saved is not None:
            s_at = saved + _offsets(s_strides, n, y, x)[:, None] + c[None, :] * s_strides[1]
            s = tl.load(s_at, mask=inside, other=0.0)
            g = tl.where((s > 0) | (s != s), g, 0.0)
        return g
    else:
        total = tl.zeros((y.shape[0], c.shape[0]), DTYPE)
        ACROSS: tl.constexpr = (POOL[1] - 1) // POOL[3] + 1  # windows side by side that share an element
        for i in range(((POOL[0] - 1) // POOL[2] + 1) * ACROSS):
            wy, wx = y // POOL[2] - i // ACROSS, x // POOL[3] - i % ACROSS
            ry, rx = y - wy * POOL[2], x - wx * POOL[3]
            met = ok & (ry < POOL[0]) & (rx < POOL[1]) & _within(wy, rows) & _within(wx, columns)
            valid = met[:, None] & inside[None, :]
            s_at = saved + _offsets(s_strides, n, wy, wx)[:, None] + c[None, :] * s_strides[1]
            s = tl.load(s_at, mask=valid, other=DEAD).to(tl.int32)
            g_at = grad + _offsets(g_strides, n, wy, wx)[:, None] + c[None, :] * g_strides[1]
            g = tl.load(g_at, mask=valid, other=0.0).to(DTYPE)
            total += tl.where(s == (ry * POOL[1] + rx)[:, None], g, 0.0)
        return total.to(grad.dtype.element_ty)


@triton.jit
def _larger(best, place_of, v, place, DTYPE: tl.constexpr):
    """The running maximum, from 0 on, rounded as the output is, and its place: the first of equals, the last NaN."""
    v = v.to(DTYPE).to(best.dtype)
    better = (v > best) | (v != v)
    return tl.where(better, v, best), tl.where(better, place, place_of)


@triton.jit
def _forward_kernel(
    out, code, input, weight, bias, pixels, channels, outputs, rows, columns, out_rows, out_columns, kernel_columns,
    taps, i_strides, o_strides, stride, padding, dilation, POOL: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(outputs, OUTPUTS)
    j = tl.arange(0, PIXELS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS
    n, y, x = _pixels(first, j, out_rows, out_columns)
    ok = first + j < pixels
    co = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    here = co < outputs
    best, place_of = tl.zeros((PIXELS, OUTPUTS), DTYPE), tl.full((PIXELS, OUTPUTS), DEAD, tl.int32)
    steps = tl.cdiv(taps * channels, DEPTH) if FLAT else taps * tl.cdiv(channels, DEPTH)
    for place in range(POOL[0] * POOL[1]):
        iy = tl.where(ok, (y * POOL[2] + place // POOL[1]) * stride[0] - padding[0], NOWHERE)
        ix = (x * POOL[3] + place % POOL[1]) * stride[1] - padding[1]
        acc = tl.zeros((PIXELS, OUTPUTS), DTYPE)
        for step in range(steps):
            ky, kx, c, k, inside = _depth(step, channels, taps, kernel_columns, DEPTH, FLAT)
            dy, dx = ky * dilation[0], kx * dilation[1]
            a = _image(input, i_strides, n, iy, ix, dy, dx, c, inside, rows, columns)
            w_at = weight + co[None, :].to(tl.int64) * (taps * channels) + k[:, None]
            w = tl.load(w_at, mask=inside[:, None] & here[None, :], other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=DTYPE)
        if bias is not None:
            acc += tl.load(bias + co, mask=here, other=0.0).to(DTYPE)[None, :]
        best, place_of = _larger(best, place_of, acc, place, out.dtype.element_ty)
    at = _offsets(o_strides, n, y, x)[:, None] + (co.to(tl.int64) * o_strides[1])[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=ok[:, None] & here[None, :])
    if code is not None:
        tl.store(code + at, place_of.to(tl.uint8), mask=ok[:, None] & here[None, :])


@triton.jit
def _first_tap(residue, stride, dilation, taps, tap_step):
    """The least tap k < tap_step with k dilation = residue modulo stride, or `taps`."""
    first = residue * 0 + taps
    for k in range(tap_step):
        first = tl.where(k * dilation % stride == residue, k, first)
    return first


@triton.jit
def _backward_input_kernel(
    grad_input, grad, saved, weight, images, channels, outputs, rows, columns, out_rows, out_columns, grad_rows,
    grad_columns, kernel_rows, kernel_columns, i_strides, g_strides, s_strides, stride, padding, dilation, tap_step,
    POOL: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    # The pixels (iy, ix) with (iy + padding) % stride = residue: rows first_y, first_y + stride, ...
    residue_y, residue_x = tl.program_id(1) // stride[1], tl.program_id(1) % stride[1]
    first_y = (residue_y + (stride[0] - padding[0] % stride[0])) % stride[0]
    first_x = (residue_x + (stride[1] - padding[1] % stride[1])) % stride[1]
    blocks = tl.cdiv(channels, CHANNELS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS
    some_rows, some_columns = tl.cdiv(rows, stride[0]), tl.cdiv(columns, stride[1])
    n, y, x = _pixels(first, tl.arange(0, PIXELS), some_rows, some_columns)
    image = first // some_columns // some_rows
    n = (n - image).to(tl.int32)  # counted from the first pixel's image: a register less for each pixel
    grad_input, grad = grad_input + image * i_strides[0], grad + image * g_strides[0]
    if saved is not None:
        saved += image * s_strides[0]
    iy, ix = first_y + y * stride[0], first_x + x * stride[1]
    ok = (n < images - image) & (iy < rows) & (ix < columns)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    here = c < channels
    ky_first = _first_tap(residue_y, stride[0], dilation[0], kernel_rows, tap_step[0])
    kx_first = _first_tap(residue_x, stride[1], dilation[1], kernel_columns, tap_step[1])
    ky_count, kx_count = tl.cdiv(kernel_rows - ky_first, tap_step[0]), tl.cdiv(kernel_columns - kx_first, tap_step[1])
    depth_blocks = tl.cdiv(outputs, DEPTH)
    y = tl.where(ok, (iy + padding[0] - residue_y) // stride[0], NOWHERE)
    x = (ix + padding[1] - residue_x) // stride[1]
    acc = tl.zeros((PIXELS, CHANNELS), DTYPE)
    for step in range(ky_count * kx_count * depth_blocks):
        tap = step // depth_blocks
        ky, kx = ky_first + tap // kx_count * tap_step[0], kx_first + tap % kx_count * tap_step[1]
        oy, ox = y - ky * dilation[0] // stride[0], x - kx * dilation[1] // stride[1]
        co = step % depth_blocks * DEPTH + tl.arange(0, DEPTH)
        met = _within(oy, out_rows) & _within(ox, out_columns)
        g = _gradient(
            grad, saved, n, oy, ox, co, met, co < outputs, grad_rows, grad_columns, g_strides, s_strides, POOL
        )
        w_row = (co.to(tl.int64) * kernel_rows * kernel_columns + ky * kernel_columns + kx) * channels
        w = tl.load(weight + w_row[:, None] + c[None, :], mask=(co < outputs)[:, None] & here[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION, out_dtype=DTYPE)
    at = grad_input + _offsets(i_strides, n, iy, ix)[:, None] + (c.to(tl.int64) * i_strides[1])[None, :]
    tl.store(at, acc.to(grad_input.dtype.element_ty), mask=ok[:, None] & here[None, :])


@triton.jit
def _backward_weight_kernel(
    partial, bias_partial, grad, saved, input, pixels, chunk, channels, outputs, rows, columns, out_rows, out_columns,
    grad_rows, grad_columns, kernel_columns, taps, i_strides, g_strides, s_strides, stride, padding, dilation,
    POOL: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = partial.dtype.element_ty
    blocks = tl.cdiv(taps * channels, DEPTH) if FLAT else taps * tl.cdiv(channels, DEPTH)
    ky, kx, c, k, inside = _depth(tl.program_id(0) % blocks, channels, taps, kernel_columns, DEPTH, FLAT)
    dy, dx = ky * dilation[0] - padding[0], kx * dilation[1] - padding[1]
    co = tl.program_id(0) // blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    here = co < outputs
    begin = tl.program_id(1).to(tl.int64) * chunk
    left = tl.minimum(pixels - begin, chunk).to(tl.int32)
    acc, bias = tl.zeros((OUTPUTS, DEPTH), DTYPE), tl.zeros((OUTPUTS,), DTYPE)
    for start in range(0, chunk, PIXELS):
        j = start + tl.arange(0, PIXELS)
        n, y, x = _pixels(begin, j, out_rows, out_columns)
        ok = j < left
        g = _gradient(grad, saved, n, y, x, co, ok, here, grad_rows, grad_columns, g_strides, s_strides, POOL)
        iy, ix = tl.where(ok, y * stride[0], NOWHERE), x * stride[1]
        a = _image(input, i_strides, n, iy, ix, dy, dx, c, inside, rows, columns)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION, out_dtype=DTYPE)
        bias += tl.sum(g.to(DTYPE), 0)
    row = tl.program_id(1).to(tl.int64) * outputs + co
    at = partial + row[:, None] * (taps * channels) + k[None, :]
    tl.store(at, acc, mask=here[:, None] & inside[None, :])
    if bias_partial is not None:
        tl.store(bias_partial + row, bias, mask=here & (tl.program_id(0) % blocks == 0))


# --- Passes of their own, for PyTorch's convolution and for windows that overlap
@triton.jit
def _pool_kernel(out, code, input, pixels, outputs, out_rows, out_columns, i_strides, o_strides, POOL: tl.constexpr,
                 PIXELS: tl.constexpr, OUTPUTS: tl.constexpr):  # fmt: skip
    """ReLU and pooling of a convolution's output."""
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    j = tl.arange(0, PIXELS)
    first = tl.program_id(0).to(tl.int64) * PIXELS
    n, y, x = _pixels(first, j, out_rows, out_columns)
    co = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (first + j < pixels)[:, None] & (co < outputs)[None, :]
    best, place_of = tl.zeros((PIXELS, OUTPUTS), DTYPE), tl.full((PIXELS, OUTPUTS), DEAD, tl.int32)
    for place in range(POOL[0] * POOL[1]):
        at = _offsets(i_strides, n, y * POOL[2] + place // POOL[1], x * POOL[3] + place % POOL[1])
        v = tl.load(input + at[:, None] + (co.to(tl.int64) * i_strides[1])[None, :], mask=inside, other=0.0).to(DTYPE)
        best, place_of = _larger(best, place_of, v, place, out.dtype.element_ty)
    at = _offsets(o_strides, n, y, x)[:, None] + (co.to(tl.int64) * o_strides[1])[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=inside)
    tl.store(code + at, place_of.to(tl.uint8), mask=inside)


@triton.jit
def _gradient_kernel(out, bias_partial, grad, saved, pixels, outputs, out_rows, out_columns, grad_rows, grad_columns,
                     o_strides, g_strides, s_strides, POOL: tl.constexpr, PIXELS: tl.constexpr,
                     OUTPUTS: tl.constexpr):  # fmt: skip
    """_gradient, written down, and its sums over the pixels of a program."""
    j = tl.arange(0, PIXELS)
    first = tl.program_id(0).to(tl.int64) * PIXELS
    n, y, x = _pixels(first, j, out_rows, out_columns)
    ok = first + j < pixels
    co = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = co < outputs
    g = _gradient(grad, saved, n, y, x, co, ok, here, grad_rows, grad_columns, g_strides, s_strides, POOL)
    if out is not None:
        at = out + _offsets(o_strides, n, y, x)[:, None] + (co.to(tl.int64) * o_strides[1])[None, :]
        tl.store(at, g, mask=ok[:, None] & here[None, :])
    if bias_partial is not None:
        total = tl.sum(g.to(bias_partial.dtype.element_ty), 0)
        tl.store(bias_partial + tl.program_id(0).to(tl.int64) * outputs + co, total, mask=here)
