"""The 1x1 kernels by themselves, on every instruction set, in either layout, against float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("pyfused._C")
ACTIVATIONS = importlib.import_module("pyfused.ops.conv_act").ACTIVATIONS
pytestmark = pytest.mark.usefixtures("isa")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# images, C, H, W, O, why
SHAPES = [
    (2, 64, 12, 8, 64, "whole vectors, whole blocks of 48 pixels in channels_last"),
    (3, 17, 5, 7, 21, "tails of channels, outputs and pixels; images that end within a vector"),
    (1, 1, 1, 1, 1, "the smallest"),
    (1, 300, 9, 11, 70, "a second group of outputs, blocks of 48 pixels, 99 = 2 blocks and a rest of 3 rows"),
    (2, 16, 33, 31, 48, "blocks of several hundred pixels; several steps of the weight gradient"),
    (7, 96, 3, 3, 160, "images smaller than a vector"),
    (1, 1024, 4, 13, 33, "deep sums"),
]
ids = [f"{n}x{c}x{h}x{w}-{o}" for n, c, h, w, o, _ in SHAPES]
cases = pytest.mark.parametrize("n,c,h,w,o,why", SHAPES, ids=ids)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def empty(*shape, layout):
    return torch.full(shape, torch.nan).to(memory_format=layout)


def make(n, c, h, w, o, layout):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=g).to(memory_format=layout)
    return x, torch.randn(o, c, 1, 1, generator=g) / c**0.5, torch.randn(o, generator=g)


def forward(x, weight, bias, layout, threads=1):
    out = empty(x.shape[0], weight.shape[0], *x.shape[2:], layout=layout)
    _C.conv2d_1x1(out, x, weight, bias, threads)
    return out


def assert_close(actual, expected, depth):
    """|error| of a float32 sum of `depth` terms, of the root mean square of the result."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    scale = expected.square().mean().sqrt()
    error = (actual.double() - expected).abs().max()
    assert error <= 6e-8 * (8 + depth**0.5) * 4 * scale, f"error {error / scale:.1e} of the root mean square"


@layouts
@cases
def test_forward(n, c, h, w, o, why, layout):
    x, weight, bias = make(n, c, h, w, o, layout)
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    assert_close(forward(x, weight, bias, layout), exact.relu(), c)
    exact = F.conv2d(x.double(), weight.double())
    assert_close(forward(x, weight, None, layout), exact.relu(), c)


@layouts
@cases
@pytest.mark.parametrize("threads", [2, 5])
def test_bits_depend_on_neither_threads_nor_weight_strides(n, c, h, w, o, why, threads, layout):
    x, weight, bias = make(n, c, h, w, o, layout)
    strided = torch.zeros(c, 1, 1, 2 * o)[..., ::2].permute(3, 0, 1, 2).copy_(weight)
    out = forward(x, weight, bias, layout)
    assert torch.equal(out, forward(x, strided, bias, layout, threads))


def act(x, weight, bias, residual, activation, slope=0.0, threads=1, outputs=None):
    out = empty(x.shape[0], outputs or weight.shape[0], *x.shape[2:], layout=torch.channels_last)
    _C.conv2d_1x1_act(out, x, weight, bias, residual, activation, slope, threads)
    return out


@cases
@pytest.mark.parametrize("with_residual", [False, True])
def test_residual_and_activation(n, c, h, w, o, why, with_residual):
    x, weight, bias = make(n, c, h, w, o, torch.channels_last)
    g = torch.Generator().manual_seed(1)
    residual = torch.randn(n, o, h, w, generator=g).to(memory_format=torch.channels_last) if with_residual else None
    exact = F.conv2d(x.double(), weight.double(), bias.double()) + (0 if residual is None else residual.double())
    assert_close(act(x, weight, bias, residual, ACTIVATIONS.index("none")), exact, c)
    silu = act(x, weight, bias, residual, ACTIVATIONS.index("silu"))
    assert_close(silu, F.silu(exact), c)
    assert torch.equal(silu, act(x, weight, bias, residual, ACTIVATIONS.index("silu"), threads=3))
    leaky = act(x, weight, bias, residual, ACTIVATIONS.index("leaky_relu"), 0.25)
    assert_close(leaky, F.leaky_relu(exact, 0.25), c)


@layouts
@cases
def test_a_packed_weight_gives_the_same_bits(n, c, h, w, o, why, layout):
    x, weight, bias = make(n, c, h, w, o, layout)
    packed = torch.full((-(-o // 16) * 16 * c,), torch.nan)
    _C.conv2d_1x1_pack(packed, weight, 2)
    out = empty(n, o, h, w, layout=layout)
    _C.conv2d_1x1(out, x, packed, bias, 1)
    assert torch.equal(out, forward(x, weight, bias, layout))
    if layout == torch.channels_last:
        assert torch.equal(act(x, packed, bias, out, 5, outputs=o), act(x, weight, bias, out, 5))


@layouts
def test_nan_and_zero(layout):
    x = torch.tensor([float("nan"), 1, -1, 0.0]).repeat(6).view(1, 1, 4, 6).to(memory_format=layout)
    weight = torch.ones(3, 1, 1, 1)
    out = forward(x, weight, torch.zeros(3), layout)
    assert torch.equal(out.nan_to_num(nan=9.0), F.conv2d(x, weight).relu().nan_to_num(nan=9.0))
    assert not out.signbit().logical_and(out == 0).any()


@layouts
def test_no_pixels(layout):
    x, weight, bias = make(0, 8, 6, 6, 9, layout)
    out = forward(x, weight, bias, layout)
    assert out.shape == (0, 9, 6, 6)


def test_arguments_are_checked():
    x, weight, bias = make(1, 4, 6, 6, 8, torch.channels_last)
    out = empty(1, 8, 6, 6, layout=torch.channels_last)
    bad = {
        "input": (out, x[..., ::2], weight, bias),
        "out": (out.contiguous(), x, weight, bias),
        "weight": (out, x, weight[:7], bias),
        "bias": (out, x, weight, bias[:7]),
    }
    for argument, arguments in bad.items():
        with pytest.raises(ValueError, match=f"conv2d_1x1: {argument}:"):
            _C.conv2d_1x1(*arguments, 1)
    packed = torch.empty(16 * 4)
    with pytest.raises(ValueError, match="weight"):
        _C.conv2d_1x1(out, x, packed[1:], bias, 1)
    with pytest.raises(ValueError, match="packed"):
        _C.conv2d_1x1_pack(packed[1:], weight, 1)
    with pytest.raises(ValueError, match="residual"):
        act(x, weight, bias, out.contiguous(), 1)
    with pytest.raises(ValueError, match="out"):
        _C.conv2d_1x1_act(out.contiguous(), x.contiguous(), weight, bias, None, 1, 0.0, 1)
    with pytest.raises(ValueError, match="activation"):
        act(x, weight, bias, None, len(ACTIVATIONS))
