"""The CPU's implicit GEMM by itself, on every instruction set, in either layout, against float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("pyfused._C")
ACTIVATIONS = importlib.import_module("pyfused.ops.conv_act").ACTIVATIONS
RELU, SILU, NONE = map(ACTIVATIONS.index, ("relu", "silu", "none"))
pytestmark = pytest.mark.usefixtures("isa")
GUARD = 64
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# input, outputs, kernel, options, why
CASES = [
    ((2, 64, 12, 8), 64, (1, 1), {}, "1x1: whole vectors, whole blocks of 48 pixels in channels_last"),
    ((3, 17, 5, 7), 21, (1, 1), {}, "tails of channels, outputs and pixels; images that end within a vector"),
    ((1, 1, 1, 1), 1, (1, 1), {}, "the smallest"),
    ((1, 300, 9, 11), 70, (1, 1), {}, "a second group of outputs; the weight outweighs the pixels"),
    ((2, 16, 33, 31), 48, (1, 1), {}, "blocks of several hundred pixels; the pixels outweigh the weight"),
    ((7, 96, 3, 3), 160, (1, 1), {}, "images smaller than a vector"),
    ((1, 1024, 4, 13), 33, (1, 1), {}, "deep sums"),
    ((2, 20, 9, 11), 24, (1, 1), {"padding": 1}, "1x1 with padding: outputs that are the bias alone"),
    ((2, 20, 9, 11), 24, (1, 1), {"stride": 2}, "1x1 with a stride: lines do not follow each other"),
    ((2, 33, 17, 14), 70, (3, 3), {"stride": 2, "padding": 1}, "a network's downsampling; odd and even sizes"),
    ((1, 40, 7, 7), 136, (3, 3), {"padding": 1}, "one image: threads divide the columns"),
    ((3, 24, 30, 41), 17, (3, 3), {"padding": 1}, "lines that end within blocks, several blocks an image"),
    ((2, 18, 12, 13), 20, (3, 3), {"padding": 2, "dilation": 2}, "dilation"),
    ((2, 18, 12, 13), 20, (2, 3), {"stride": (3, 1), "padding": (0, 2), "dilation": (1, 3)}, "two of everything"),
    ((1, 16, 4, 5), 16, (3, 3), {"padding": 6}, "lines and columns wholly in the padding"),
    ((2, 16, 16, 20), 40, (4, 4), {"stride": 4}, "patches that do not overlap"),
    ((2, 16, 11, 11), 16, (1, 1), {"stride": 5}, "a stride past the kernel"),
    ((2, 48, 1, 500), 40, (1, 3), {"stride": (1, 2), "padding": (0, 1)}, "rows: parts of a line are gathered"),
    ((1, 8, 300, 1), 20, (5, 1), {"padding": (2, 0)}, "columns: lines of one pixel"),
]
ids = [f"{'x'.join(map(str, shape))}-{o}-{kh}x{kw}-{i}" for i, (shape, o, (kh, kw), *_) in enumerate(CASES)]
cases = pytest.mark.parametrize("shape,outputs,kernel,options,why", CASES, ids=ids)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make(shape, outputs, kernel, layout):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(memory_format=layout)
    fan_in = shape[1] * kernel[0] * kernel[1]
    return x, torch.randn(outputs, shape[1], *kernel, generator=g) / fan_in**0.5, torch.randn(outputs, generator=g)


def exact(x, weight, bias, options):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **options)


def convolve(x, weight, bias, like, options, residual=None, activation=RELU, slope=0.0, threads=1):
    """like: a tensor of the output's shape. The result is written over NaN, and between NaN that must stay."""
    around = torch.full((like.numel() + 2 * GUARD,), torch.nan)
    layout = torch.channels_last if is_nhwc(x) else torch.contiguous_format
    strides = torch.empty(like.shape, memory_format=layout).stride()
    out = around.as_strided(like.shape, strides, GUARD)
    pairs = [(options.get(name, default),) * 2 for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    pairs = [p[0] if isinstance(p[0], tuple) else p for p in pairs]
    _C.conv2d_implicit_gemm(out, x, weight, bias, residual, *sum(pairs, ()), activation, slope, threads)
    assert around[:GUARD].isnan().all() and around[len(around) - GUARD :].isnan().all()
    return out


def is_nhwc(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def pack(weight, threads=2):
    o, c, kh, kw = weight.shape
    packed = torch.full((-(-o // 16), kh, kw, c, 16), torch.nan)
    _C.conv2d_implicit_gemm_pack(packed, weight, threads)
    return packed


def assert_close(actual, expected, depth):
    """|error| of a float32 sum of `depth` terms, of the root mean square of the result."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    scale = expected.square().mean().sqrt()
    error = (actual.double() - expected).abs().max()
    assert error <= 6e-8 * (8 + depth**0.5) * 4 * scale, f"error {error / scale:.1e} of the root mean square"


@layouts
@cases
def test_forward(shape, outputs, kernel, options, why, layout):
    x, weight, bias = make(shape, outputs, kernel, layout)
    depth, expected = weight[0].numel(), exact(x, weight, bias, options)
    assert_close(convolve(x, weight, bias, expected, options), expected.relu(), depth)
    expected = exact(x, weight, None, options)
    assert_close(convolve(x, weight, None, expected, options), expected.relu(), depth)


@layouts
@cases
@pytest.mark.parametrize("threads", [2, 5, 16])
def test_bits_depend_on_neither_threads_nor_packing_nor_strides(
    shape, outputs, kernel, options, why, threads, layout
):  # fmt: skip
    x, weight, bias = make(shape, outputs, kernel, layout)
    strided = torch.zeros(*kernel, shape[1], 2 * outputs)[..., ::2].permute(3, 2, 0, 1).copy_(weight)
    like = exact(x, weight, bias, options)
    out = convolve(x, weight, bias, like, options)
    assert torch.equal(out, convolve(x, strided, bias, like, options, threads=threads))
    assert torch.equal(out, convolve(x, pack(weight), bias, like, options, threads=threads))
    assert torch.equal(pack(weight), pack(strided, threads))


@layouts
@cases
@pytest.mark.parametrize("with_residual", [False, True])
def test_residual_and_activation(shape, outputs, kernel, options, why, with_residual, layout):
    x, weight, bias = make(shape, outputs, kernel, layout)
    depth, expected = weight[0].numel(), exact(x, weight, bias, options)
    residual = None
    if with_residual:
        residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        residual = residual.contiguous(memory_format=torch.channels_last if is_nhwc(x) else torch.contiguous_format)
        expected = expected + residual
    assert_close(convolve(x, weight, bias, expected, options, residual, NONE), expected, depth)
    silu = convolve(x, weight, bias, expected, options, residual, SILU)
    assert_close(silu, F.silu(expected), depth)
    assert torch.equal(silu, convolve(x, weight, bias, expected, options, residual, SILU, threads=3))
    leaky = convolve(x, weight, bias, expected, options, residual, ACTIVATIONS.index("leaky_relu"), 0.25)
    assert_close(leaky, F.leaky_relu(expected, 0.25), depth)


@layouts
def test_nan_and_zero(layout):
    x = torch.tensor([float("nan"), 1, -1, 0.0]).repeat(6).view(1, 1, 4, 6).to(memory_format=layout)
    weight = torch.ones(3, 1, 1, 1)
    out = convolve(x, weight, torch.zeros(3), F.conv2d(x, weight), {})
    assert torch.equal(out.nan_to_num(nan=9.0), F.conv2d(x, weight).relu().nan_to_num(nan=9.0))
    assert not out.signbit().logical_and(out == 0).any()


@layouts
def test_no_pixels(layout):
    x, weight, bias = make((0, 8, 6, 6), 9, (3, 3), layout)
    assert convolve(x, weight, bias, torch.empty(0, 9, 4, 4), {}).shape == (0, 9, 4, 4)


def test_arguments_are_checked():
    x, weight, bias = make((1, 4, 6, 6), 8, (3, 3), torch.channels_last)
    out = torch.empty(1, 8, 4, 4).to(memory_format=torch.channels_last)
    packed = pack(weight)

    def run(out=out, x=x, weight=weight, bias=bias, residual=None, stride=1, padding=0, dilation=1, activation=RELU):
        numbers = (stride, stride, padding, padding, dilation, dilation)
        _C.conv2d_implicit_gemm(out, x, weight, bias, residual, *numbers, activation, 0.0, 1)

    run()
    bad = {
        "input": [{"x": x[..., ::2]}, {"x": x.double()}],
        "out": [
            *({"out": out.contiguous()}, {"out": out[:0]}, {"stride": 2}, {"padding": 1}, {"dilation": 2}),
            *({"stride": 0}, {"dilation": 0}, {"padding": -1}),
        ],
        "weight": [{"weight": weight[:7]}, {"weight": packed[:, :, :, 1:]}, {"weight": packed.transpose(1, 2)}],
        "bias": [{"bias": bias[:7]}, {"bias": bias.double()}],
        "residual": [{"residual": out.contiguous()}, {"residual": out[..., 1:]}],
        "activation": [{"activation": len(ACTIVATIONS)}, {"activation": -1}],
    }
    for argument, wrong in bad.items():
        for given in wrong:
            with pytest.raises(ValueError, match=f"conv2d_implicit_gemm: {argument}:"):
                run(**given)
    with pytest.raises(ValueError, match="conv2d_implicit_gemm_pack: packed:"):
        _C.conv2d_implicit_gemm_pack(packed[:, 1:], weight, 1)
    with pytest.raises(ValueError, match="conv2d_implicit_gemm_pack: weight:"):
        _C.conv2d_implicit_gemm_pack(packed, weight.double(), 1)
