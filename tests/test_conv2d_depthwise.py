"""The depthwise kernels by themselves, on every instruction set, against float64: forward and the three gradients."""

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("pyfused._C")
pytestmark = pytest.mark.usefixtures("isa")

CHANNELS_LAST = torch.channels_last

# images, C, H, W, (kh, kw), stride, (pad_h, pad_w), why
SHAPES = [
    (2, 32, 12, 19, (3, 3), 1, (1, 1), "whole vectors, a last tile that overlaps the one before"),
    (3, 35, 9, 7, (3, 3), 2, (1, 1), "a tail of channels; stride 2 on odd sizes: phases of one and of two taps"),
    (1, 16, 8, 10, (3, 3), 2, (0, 0), "stride 2 without padding: rows and columns that nothing reads"),
    (1, 24, 14, 11, (5, 5), 1, (2, 2), "5x5, two rows of the kernel at a time and a single one"),
    (2, 17, 13, 12, (5, 5), 2, (2, 1), "5x5 with stride 2, unequal padding"),
    (1, 40, 15, 16, (7, 7), 1, (3, 3), "7x7"),
    (1, 16, 17, 21, (7, 7), 2, (3, 3), "7x7 with stride 2: phases of three and of four taps"),
    (2, 16, 2, 1, (3, 3), 1, (1, 1), "a map smaller than the kernel and than a tile"),
    (2, 16, 1, 2, (1, 3), 2, (0, 2), "one row; padding wider than the kernel reaches"),
    (1, 20, 6, 9, (4, 3), 2, (5, 4), "padding higher than the kernel: rows of outputs that see no input"),
    (2, 256, 40, 40, (3, 3), 1, (1, 1), "several bands of rows"),
    (2, 256, 81, 80, (3, 3), 2, (1, 1), "several bands of rows with stride 2"),
    (40, 16, 5, 5, (3, 3), 1, (1, 1), "more units than parts"),
]
ids = [f"{n}x{c}x{h}x{w}-k{k[0]}{k[1]}-s{s}-p{p[0]}{p[1]}" for n, c, h, w, k, s, p, _ in SHAPES]
cases = pytest.mark.parametrize("n,c,h,w,kernel,stride,pad,why", SHAPES, ids=ids)


def make(n, c, h, w, kernel):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=g).to(memory_format=CHANNELS_LAST)
    return x, torch.randn(c, 1, *kernel, generator=g), torch.randn(c, generator=g)


def forward(x, weight, bias, stride, pad, threads=1):
    shape = F.conv2d(x[:1], weight, None, stride, pad, groups=x.shape[1]).shape[1:]
    out = torch.full((x.shape[0], *shape), torch.nan).to(memory_format=CHANNELS_LAST)
    _C.conv2d_depthwise(out, x, weight, bias, stride, *pad, threads)
    return out


def backward(x, weight, grad, saved, stride, pad, threads=1):
    grads = torch.full_like(x, torch.nan), torch.full_like(weight, torch.nan), torch.full_like(weight[:, 0, 0, 0], 9)
    _C.conv2d_depthwise_backward(*grads, grad, saved, x, weight, stride, *pad, threads)
    return grads


def backward64(x, weight, g, stride, pad):
    sizes = [x.shape[1]], [stride] * 2, list(pad), [1, 1], False, [0, 0], x.shape[1], [True] * 3
    return torch.ops.aten.convolution_backward(g.double(), x.double(), weight.double(), *sizes)


def assert_close(actual, exact, bound=3e-6):
    assert actual.shape == exact.shape and actual.isfinite().all()
    assert (actual.double() - exact).abs().max() <= bound * max(1, exact.abs().max())


@cases
def test_forward(n, c, h, w, kernel, stride, pad, why):
    x, weight, bias = make(n, c, h, w, kernel)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, pad, groups=c).relu()
    assert_close(forward(x, weight, bias, stride, pad), exact)
    exact = F.conv2d(x.double(), weight.double(), None, stride, pad, groups=c).relu()
    assert_close(forward(x, weight.to(memory_format=CHANNELS_LAST), None, stride, pad), exact)


@cases
def test_gradients(n, c, h, w, kernel, stride, pad, why):
    x, weight, bias = make(n, c, h, w, kernel)
    out = forward(x, weight, bias, stride, pad)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(memory_format=CHANNELS_LAST)
    grads = backward(x, weight, grad, out, stride, pad)
    for actual, exact in zip(grads, backward64(x, weight, torch.where(out > 0, grad, 0), stride, pad), strict=True):
        assert_close(actual, exact)
    weight_grad = torch.full_like(weight, torch.nan).to(memory_format=CHANNELS_LAST)
    _C.conv2d_depthwise_backward(None, weight_grad, None, grad, out, x, weight, stride, *pad, 1)
    assert torch.equal(weight_grad, grads[1])


@pytest.mark.parametrize("threads", [2, 5])
@cases
def test_bits_do_not_depend_on_threads(n, c, h, w, kernel, stride, pad, why, threads):
    x, weight, bias = make(n, c, h, w, kernel)
    out = forward(x, weight, bias, stride, pad)
    assert torch.equal(out, forward(x, weight, bias, stride, pad, threads))
    one, many = (backward(x, weight, out, out, stride, pad, t) for t in (1, threads))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_nan():
    """A NaN stays one, and the mask lets a gradient through to it; a masked NaN in the gradient goes nowhere."""
    x, weight, bias = make(1, 16, 9, 9, (3, 3))
    x[0, 3, 4, 4] = torch.nan
    out = forward(x, weight, bias, 1, (1, 1))
    expected = F.conv2d(x, weight, bias, 1, 1, groups=16).relu()
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().sum() == 9
    x, weight, bias = make(1, 16, 9, 9, (3, 3))
    saved = forward(x, weight, bias, 1, (1, 1))
    saved[0, 0, 5, 5] = torch.nan
    grad = torch.where(saved == 0, torch.nan, 1.0)
    exact = backward64(x, weight, torch.ops.aten.threshold_backward(grad, saved, 0), 1, (1, 1))
    for actual, expected in zip(backward(x, weight, grad, saved, 1, (1, 1)), exact, strict=True):
        assert_close(actual, expected)


def test_no_images():
    x, weight, bias = make(0, 16, 6, 6, (3, 3))
    grad = torch.empty(0, 16, 6, 6).to(memory_format=CHANNELS_LAST)
    _C.conv2d_depthwise(grad, x, weight, bias, 1, 1, 1, 1)
    grads = backward(x, weight, grad, grad, 1, (1, 1))
    assert grads[0].numel() == 0 and grads[1].eq(0).all() and grads[2].eq(0).all()


def test_arguments_are_checked():
    x, weight, bias = make(1, 16, 6, 6, (3, 3))
    out = torch.full((1, 16, 6, 6), torch.nan).to(memory_format=CHANNELS_LAST)
    bad = {
        "input": (out, x.contiguous(), weight, bias, 1),
        "out": (out[:, :, :5], x, weight, bias, 1),
        "weight": (out, x, weight[..., :2], bias, 1),
        "bias": (out, x, weight, bias[:7], 1),
        "stride": (out, x, weight, bias, 3),
    }
    for argument, arguments in bad.items():
        with pytest.raises(ValueError, match=f"conv2d_depthwise: {argument}:"):
            _C.conv2d_depthwise(*arguments, 1, 1, 1)
    assert out.isnan().all()  # nothing was written
