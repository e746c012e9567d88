"""The Winograd kernels by themselves, on every instruction set, against float64: forward, pool, both gradients."""

import ctypes
import mmap

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("pyfused._C")
from pyfused.backends.cpu.conv2d_relu import winograd_tile  # noqa: E402

pytestmark = pytest.mark.usefixtures("isa")

CHANNELS_LAST = torch.channels_last

# images, C, H, W, O, (pad_h, pad_w), why
SHAPES = [
    (3, 32, 13, 13, 64, (0, 0), "whole vectors, incomplete tiles at the far edges"),
    (2, 64, 5, 5, 64, (0, 0), "one incomplete tile per image; H > 4 * tiles + 2 - pad where it pools"),
    (1, 1, 3, 3, 1, (0, 0), "the smallest: one pixel out, no pool window, one channel in a vector"),
    (2, 17, 9, 14, 70, (1, 2), "channel tails on both sides, a second group of 64 outputs, unequal padding"),
    (1, 5, 1, 2, 3, (1, 1), "a map smaller than the filter"),
    (2, 3, 8, 7, 33, (2, 1), "padding 2: a ring of outputs sees the corners only"),
    (2, 40, 20, 24, 48, (1, 1), "3 panels: a narrow register block; several blocks of tiles"),
    (1, 16, 63, 15, 24, (0, 1), "more tiles than a step of the weight gradient, odd sizes"),
    (2, 24, 33, 31, 20, (1, 1), "two slices of tiles, whose weight gradients add up"),
    (2, 16, 130, 126, 18, (1, 1), "eight slices"),
    (2, 128, 14, 14, 160, (1, 1), "three groups of outputs, deeper products"),
    (4, 128, 14, 14, 144, (1, 1), "a weight larger than a cache, more tiles than stay beside a part of it"),
    (1, 200, 9, 9, 86, (1, 1), "two parts of the input channels, the second group of outputs is not whole"),
    (1, 512, 7, 7, 64, (1, 1), "the deepest sums: rounding grows with C"),
    (1, 128, 52, 52, 128, (1, 1), "a transformed weight larger than a cache, several blocks of tiles"),
]
TILES = pytest.mark.parametrize("tile", [4, 3])
ids = [f"{n}x{c}x{h}x{w}-{o}-pad{p[0]}{p[1]}" for n, c, h, w, o, p, _ in SHAPES]


def transform(weight, threads=1, tile=4):
    outputs, depth = weight.shape[:2]
    u = torch.full(((tile + 2) ** 2 * (depth * (-(-outputs // 16) * 16) + 16),), torch.nan)
    _C.conv2d_winograd_transform_weight(u, weight, tile, threads)
    return u


def empty(*shape, dtype=torch.float32):  # full of what nobody may read
    return torch.full(shape, 77 if dtype == torch.uint8 else torch.nan, dtype=dtype).to(memory_format=CHANNELS_LAST)


def forward(x, weight, bias, pad, relu=True, threads=1, outputs=None, tile=4):
    out = empty(x.shape[0], outputs or weight.shape[0], x.shape[2] + 2 * pad[0] - 2, x.shape[3] + 2 * pad[1] - 2)
    _C.conv2d_winograd(out, x, weight, bias, *pad, relu, tile, threads)
    return out


def forward_pool(x, weight, bias, pad, threads=1):
    shape = (x.shape[0], weight.shape[0], (x.shape[2] + 2 * pad[0] - 2) // 2, (x.shape[3] + 2 * pad[1] - 2) // 2)
    out, code = empty(*shape), empty(*shape, dtype=torch.uint8)
    _C.conv2d_winograd_pool(out, code, x, weight, bias, *pad, threads)
    return out, code


def backward(x, weight, grad, saved, pad, threads=1, bias=True, tile=4):
    grad_input, grad_weight = torch.full_like(x, torch.nan), torch.full_like(weight, torch.nan)
    grad_bias = torch.full((weight.shape[0],), torch.nan) if bias else None
    _C.conv2d_winograd_backward_input(grad_input, grad, saved, weight, *pad, tile, threads)
    _C.conv2d_winograd_backward_weight(grad_weight, grad_bias, grad, saved, x, *pad, tile, threads)
    return grad_input, grad_weight, grad_bias


def backward64(x, weight, grad, pad):
    """The three gradients in float64 from the gradient before the ReLU."""
    x, weight = x.double(), weight.double()
    sizes = [weight.shape[0]], [1, 1], list(pad), [1, 1], False, [0, 0], 1, [True] * 3
    return torch.ops.aten.convolution_backward(grad.double(), x, weight, *sizes)


def unpool(grad, code, height, width):
    """The gradient before ReLU and pool: each value goes to the pixel that its code names."""
    full = grad.new_zeros(*grad.shape[:2], height, width)
    for position in range(4):
        row, column = divmod(position, 2)
        part = full[:, :, row : height // 2 * 2 : 2, column : width // 2 * 2 : 2]
        part.copy_(torch.where(code == position, grad, 0))
    return full


def make(n, c, h, w, o, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=g).to(memory_format=CHANNELS_LAST)
    return x, torch.randn(o, c, 3, 3, generator=g) / (9 * c) ** 0.5, torch.randn(o, generator=g)


def assert_close(actual, expected, bound):
    """|error| <= bound * the root mean square of `expected`."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    scale = expected.square().mean().sqrt()
    error = (actual.double() - expected).abs().max()
    assert error <= bound * scale, f"error {error / scale:.1e} of the root mean square, bound {bound:.1e}"


def forward_bound(c):  # twice what the kernel's head comment states
    return 6e-5 * (1 + c / 64) ** 0.5


@TILES
@pytest.mark.parametrize("n,c,h,w,o,pad,why", SHAPES, ids=ids)
def test_forward(n, c, h, w, o, pad, why, tile):
    x, weight, bias = make(n, c, h, w, o)
    exact = F.conv2d(x.double(), weight.double(), padding=pad)
    assert_close(forward(x, weight, None, pad, relu=False, tile=tile), exact, forward_bound(c))
    out = forward(x, weight.to(memory_format=CHANNELS_LAST), bias, pad, tile=tile)
    assert_close(out, (exact + bias.double()[:, None, None]).relu(), forward_bound(c))
    without = forward(x, weight, bias, pad, relu=False, tile=tile)
    assert torch.equal(out, without.relu()) and ((without < 0).any() or without.numel() < 16)


@pytest.mark.parametrize("n,c,h,w,o,pad,why", SHAPES, ids=ids)
def test_pool_is_torchs_pool_of_the_unpooled_output(n, c, h, w, o, pad, why):
    x, weight, bias = make(n, c, h, w, o)
    full = forward(x, weight, bias, pad)
    out, code = forward_pool(x, weight, bias, pad)
    if out.numel() == 0:
        return
    pooled, index = F.max_pool2d(full, 2, return_indices=True)
    position = index // full.shape[3] % 2 * 2 + index % full.shape[3] % 2
    assert torch.equal(out, pooled)
    assert torch.equal(code, torch.where(pooled > 0, position, 255).to(torch.uint8))


@TILES
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("n,c,h,w,o,pad,why", SHAPES, ids=ids)
def test_gradients(n, c, h, w, o, pad, why, pooled, tile):
    x, weight, bias = make(n, c, h, w, o)
    if pooled:
        weight = weight.to(memory_format=CHANNELS_LAST)
        out, saved = forward_pool(x, weight, bias, pad)
    else:
        out = saved = forward(x, weight, bias, pad)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(memory_format=CHANNELS_LAST)
    height, width = h + 2 * pad[0] - 2, w + 2 * pad[1] - 2
    before = unpool(grad, saved, height, width) if pooled else torch.where(out > 0, grad, 0)
    grads = backward(x, weight, grad, saved, pad, tile=tile)
    expected = backward64(x, weight, before, pad)
    for actual, exact in zip(grads, expected, strict=True):
        assert_close(actual, exact, 6e-5)
    assert grads[1].stride() == weight.stride()
    again = backward(x, weight, grad, saved, pad, bias=False, tile=tile)
    assert torch.equal(again[0], grads[0]) and torch.equal(again[1], grads[1])


@TILES
@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("n,c,h,w,o,pad,why", SHAPES, ids=ids)
def test_bits_depend_on_neither_threads_nor_batch(n, c, h, w, o, pad, why, threads, tile):
    x, weight, bias = make(n, c, h, w, o)
    out = forward(x, weight, bias, pad, tile=tile)
    assert torch.equal(out, forward(x, weight, bias, pad, threads=threads, tile=tile))
    assert torch.equal(out[-1:], forward(x[-1:], weight, bias, pad, tile=tile))
    pool = forward_pool(x, weight, bias, pad)
    assert all(torch.equal(a, b) for a, b in zip(pool, forward_pool(x, weight, bias, pad, threads), strict=True))
    one, many = (backward(x, weight, out, out, pad, t, tile=tile) for t in (1, threads))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@TILES
@pytest.mark.parametrize("n,c,h,w,o,pad,why", SHAPES, ids=ids)
def test_a_finished_transform_gives_the_same_bits(n, c, h, w, o, pad, why, tile):
    x, weight, bias = make(n, c, h, w, o)
    finished = forward(x, transform(weight, tile=tile), bias, pad, outputs=o, tile=tile)
    assert torch.equal(finished, forward(x, weight, bias, pad, tile=tile))


@TILES
def test_integers_are_exact(tile):
    """No transform of multiples of 576 = 24 * 24 rounds, so a slightly wrong coefficient cannot hide in a bound."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 2, 11, 10), generator=g).float().to(memory_format=CHANNELS_LAST)
    weight = 576.0 * torch.randint(-2, 3, (5, 2, 3, 3), generator=g).float()
    bias = torch.randint(-999, 999, (5,), generator=g).float()
    assert torch.equal(forward(x, weight, bias, (1, 1), relu=False, tile=tile), F.conv2d(x, weight, bias, padding=1))
    grad = torch.randint(-2, 3, (2, 5, 11, 10), generator=g).float().to(memory_format=CHANNELS_LAST)
    exact = backward64(x, weight, grad, (1, 1))
    grads = backward(x, weight, grad, torch.ones_like(grad), (1, 1), tile=tile)
    assert torch.equal(grads[0].double(), exact[0]) and torch.equal(grads[2].double(), exact[2])


@pytest.mark.parametrize("c,o", [(20, 24), (32, 48), (16, 16), (7, 33)])
def test_any_weight_strides(c, o):
    """Filters are read 16 by 16, with vectors where channels or taps lie side by side, at the edges one by one."""
    x, weight, bias = make(1, c, 6, 6, o)
    strided = torch.zeros(3, 3, c, 2 * o)[..., ::2].permute(3, 2, 0, 1).copy_(weight)
    # The 16 floats that keep points apart are never written.
    assert torch.equal(transform(strided).nan_to_num(), transform(weight, threads=3).nan_to_num())
    grad = forward(x, weight, bias, (1, 1))
    assert torch.equal(grad, forward(x, strided, bias, (1, 1)))
    for layout in (strided, weight.to(memory_format=CHANNELS_LAST)):
        assert torch.equal(backward(x, layout, grad, grad, (1, 1))[0], backward(x, weight, grad, grad, (1, 1))[0])
        assert torch.equal(transform(strided).nan_to_num(), transform(layout).nan_to_num())
        assert torch.equal(backward(x, layout, grad, grad, (1, 1))[1], backward(x, weight, grad, grad, (1, 1))[1])
    written = torch.zeros(3, 3, c, o).permute(3, 2, 0, 1)
    _C.conv2d_winograd_backward_weight(written, None, grad, grad, x, 1, 1, 4, 1)
    assert torch.equal(written, backward(x, weight, grad, grad, (1, 1))[1])


def test_nothing_is_read_past_the_weights_end():
    """On AVX-512 a filter of 9 is read as a vector of 16; behind this weight is a page that may not be read."""
    pages, weight = mmap.mmap(-1, 2 * mmap.PAGESIZE), torch.randn(16, 2, 3, 3)
    offset = mmap.PAGESIZE - 4 * weight.numel()
    at_the_end = torch.frombuffer(pages, dtype=torch.float32, count=weight.numel(), offset=offset).view_as(weight)
    at_the_end.copy_(weight)
    behind = ctypes.c_void_p(at_the_end.data_ptr() + 4 * weight.numel())
    assert ctypes.CDLL(None).mprotect(behind, mmap.PAGESIZE, 0) == 0
    assert torch.equal(transform(at_the_end).nan_to_num(), transform(weight).nan_to_num())


def constant(values, bias):
    """Arguments for which the 4x4 outputs of a 1-channel convolution are exactly `values` + bias."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 576
    x = torch.tensor(values).div(576).reshape(1, 1, 4, 4).to(memory_format=CHANNELS_LAST)
    return x, weight, torch.tensor([bias])


def test_pool_takes_the_first_of_equals_and_marks_the_dead():
    x, weight, bias = constant([0.0] * 16, 1.0)
    assert forward_pool(x, weight, bias, (1, 1))[1].eq(0).all()
    for dead in (0.0, -1.0):  # a maximum of exactly 0 has no gradient
        out, code = forward_pool(x, weight, torch.tensor([dead]), (1, 1))
        assert code.eq(255).all() and out.eq(0).all() and not out.signbit().any()
    values = [1.0, 1, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 3, 0, 4, 0]
    out, code = forward_pool(*constant([576 * v for v in values], -288.0), (1, 1))
    assert code.flatten().tolist() == [0, 3, 1, 2]
    assert out.flatten().tolist() == [288, 864, 1440, 2016]


@TILES
def test_nan(tile):
    """A NaN stays one; among NaNs the last wins, as in torch; the mask lets a gradient through to it."""
    x, weight, bias = constant([0.0] * 16, 1.0)
    x[0, 0, 0, 0] = torch.nan
    assert forward(x, weight, bias, (1, 1), tile=tile).isnan().any()
    out, code = forward_pool(x, weight, torch.tensor([torch.nan]), (1, 1))
    assert out.isnan().all() and code.eq(3).all()
    saved = torch.tensor([torch.nan, 0.0, -0.0, 1.0] * 4).reshape(1, 1, 4, 4).to(memory_format=CHANNELS_LAST)
    grad = torch.arange(16.0).reshape(1, 1, 4, 4).to(memory_format=CHANNELS_LAST)
    grad[saved == 0] = torch.nan  # masked by choice, not by a product
    x = torch.ones_like(grad)
    before = torch.ops.aten.threshold_backward(grad, saved, 0)
    grads = backward(x, weight, grad, saved, (1, 1), tile=tile)
    for actual, exact in zip(grads, backward64(x, weight, before, (1, 1)), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-4)


def test_no_images_and_no_windows():
    x, weight, bias = make(0, 8, 6, 6, 9)
    assert forward(x, weight, bias, (0, 0)).shape == (0, 9, 4, 4)
    grads = backward(x, weight, empty(0, 9, 4, 4), empty(0, 9, 4, 4), (0, 0))
    assert grads[0].numel() == 0 and grads[1].eq(0).all() and grads[2].eq(0).all()
    x, weight, bias = make(2, 8, 3, 9, 9)  # one row of outputs: no window of two
    out, code = forward_pool(x, weight, bias, (0, 0))
    assert out.shape == (2, 9, 0, 3)
    assert all(grad.eq(0).all() for grad in backward(x, weight, out, code, (0, 0)))


def test_arguments_are_checked():
    x, weight, bias = make(1, 4, 6, 6, 8)
    u, out = transform(weight), empty(1, 8, 4, 4)
    bad = {
        "input": (out, x.contiguous(), u, bias, 0, 0),
        "padding": (out, x, u, bias, 3, 0),
        "weight": (out, x, u[:-1], bias, 0, 0),
        "bias": (out, x, u, bias[:-1], 0, 0),
        "out": (empty(1, 8, 5, 4), x, u, bias, 0, 0),
    }
    for argument, arguments in bad.items():
        with pytest.raises(ValueError, match=f"conv2d_winograd: {argument}:"):
            _C.conv2d_winograd(*arguments, True, 4, 1)
    for wrong in (weight[:, :3], weight[:7], weight[:, :, :2], weight.double()):
        with pytest.raises(ValueError, match="conv2d_winograd: weight:"):
            _C.conv2d_winograd(out, x, wrong, bias, 0, 0, True, 4, 1)
    with pytest.raises(ValueError, match="input: must have channels"):
        forward(x[:, :0].contiguous(memory_format=CHANNELS_LAST), weight[:, :0], bias, (0, 0))
    for tile in (2, 5):
        with pytest.raises(ValueError, match="tile"):
            _C.conv2d_winograd(out, x, weight, bias, 0, 0, True, tile, 1)
        with pytest.raises(ValueError, match="tile"):
            backward(x, weight, out, out, (0, 0), tile=tile)
    with pytest.raises(ValueError, match="as transformed"):  # for the other tile
        _C.conv2d_winograd(out, x, u, bias, 0, 0, True, 3, 1)
    with pytest.raises(ValueError, match="weight"):
        _C.conv2d_winograd_transform_weight(u, weight[:, :, :2], 4, 1)
    for saved in (out.double(), out[:, :, :2], out.contiguous()):
        with pytest.raises(ValueError, match="saved"):
            _C.conv2d_winograd_backward_input(torch.empty_like(x), out, saved, weight, 0, 0, 4, 1)
        with pytest.raises(ValueError, match="saved"):
            _C.conv2d_winograd_backward_weight(torch.empty_like(weight), None, out, saved, x, 0, 0, 4, 1)
    assert out.isnan().all()  # nothing was written


def test_the_tile_chosen_takes_the_fewer_products():
    chosen = {side: winograd_tile(torch.empty(1, 1, side, side)) for side in range(1, 15)}
    assert [side for side, tile in chosen.items() if tile == 3] == [1, 2, 3, 5, 6, 9]
    assert winograd_tile(torch.empty(1, 1, 6, 56)) == 3 and winograd_tile(torch.empty(1, 1, 3, 8)) == 4
