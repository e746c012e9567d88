"""conv2d_relu and conv2d_relu_max_pool2d beyond the case table: algorithms, layouts, special values, what is saved."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy import eager, public
from torch import nn

import pyfused
from pyfused import _binary, dispatch

PF = pyfused.functional
may_hand_over = dispatch.may_hand_over  # which conftest.py switches off
OPS = ("conv2d_relu", "conv2d_relu_max_pool2d")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
needs_cpu = pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))


def exact(*shape, high=5, seed=0):
    """Multiples of 1/4 between -1 and 1: sums are exact in any order, so results can be compared bit for bit."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=g).float() / 4 - 0.5


@needs_cpu
@pytest.mark.parametrize(
    "shape, weight, options, expected",
    [
        ((2, 1, 9, 9), (32, 1, 3, 3), {}, "direct"),
        ((2, 4, 9, 9), (8, 4, 7, 7), {"stride": 2}, "direct"),
        ((2, 3, 9, 9), (8, 3, 3, 3), {"dtype": torch.float64}, "aten"),
        ((2, 3, 9, 9), (8, 3, 8, 1), {}, "aten"),
        ((2, 3, 9, 9), (8, 3, 3, 3), {"stride": 3}, "aten"),
        ((2, 3, 9, 9), (8, 3, 3, 3), {"dilation": 2}, "aten"),
        ((2, 3, 9, 9), (9, 1, 3, 3), {"groups": 3}, "aten"),
        ((2, 5, 9, 9), (32, 5, 3, 3), {}, "aten"),
        ((3, 16, 9, 9), (16, 16, 3, 3), {"padding": 2}, "winograd"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"padding": 2}, "aten"),
        ((1, 160, 16, 16), (160, 160, 3, 3), {"training": True}, "aten"),
        ((1, 160, 16, 16), (160, 160, 3, 3), {}, "winograd"),
        ((1, 160, 9, 9), (160, 160, 3, 3), {}, "implicit_gemm"),
        ((1, 160, 9, 9), (160, 160, 3, 3), {"training": True}, "aten"),
        ((1, 160, 7, 7), (160, 160, 3, 3), {}, "aten"),
        ((1, 48, 16, 16), (48, 48, 3, 3), {"dilation": 2}, "implicit_gemm"),
        ((2, 160, 16, 16), (160, 160, 3, 3), {}, "winograd"),
        ((8, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}, "winograd"),
        ((4, 16, 8, 8), (16, 16, 1, 1), {}, "implicit_gemm"),
        ((4, 16, 8, 8), (16, 16, 1, 1), {"layout": torch.channels_last}, "implicit_gemm"),
        ((4, 16, 8, 8), (16, 16, 1, 1), {"training": True}, "aten"),
        ((9, 16, 88, 88), (16, 16, 1, 1), {}, "aten"),
        ((9, 16, 88, 88), (16, 16, 1, 1), {"layout": torch.channels_last}, "implicit_gemm"),
        ((9, 16, 88, 88), (16, 16, 1, 1), {"layout": torch.channels_last, "training": True}, "aten"),
        ((9, 24, 88, 88), (24, 24, 1, 1), {"layout": torch.channels_last, "training": True}, "implicit_gemm"),
        ((9, 32, 88, 88), (32, 32, 3, 3), {"stride": 2}, "implicit_gemm"),
        ((9, 32, 88, 88), (32, 32, 3, 3), {"stride": 2, "layout": torch.channels_last}, "aten"),
        ((9, 16, 88, 88), (32, 16, 3, 3), {"stride": 2}, "aten"),
        ((3, 16, 9, 9), (16, 16, 1, 1), {}, "aten"),
        ((4, 16, 9, 9), (15, 16, 1, 1), {}, "aten"),
        ((4, 16, 9, 9), (16, 16, 1, 1), {"padding": 1}, "aten"),
        ((4, 16, 17, 17), (16, 16, 1, 1), {"stride": 2}, "implicit_gemm"),
        ((4, 16, 9, 9), (16, 16, 1, 1), {"dtype": torch.float64}, "aten"),
        ((999, 32, 3, 3), (32, 32, 3, 3), {}, "aten"),
        ((2, 16, 29, 29), (16, 16, 3, 3), {"padding": 3}, "aten"),
        ((2, 16, 9, 9), (15, 16, 3, 3), {}, "aten"),
        ((2, 16, 9, 9), (16, 16, 3, 3), {"stride": 2}, "aten"),
        ((2, 16, 9, 9), (16, 16, 3, 3), {"dtype": torch.bfloat16}, "aten"),
        ((2, 24, 9, 9), (24, 1, 3, 3), {"groups": 24, "layout": torch.channels_last}, "depthwise"),
        ((2, 24, 9, 9), (24, 1, 5, 7), {"groups": 24, "layout": torch.channels_last, "stride": 2}, "depthwise"),
        ((2, 24, 9, 9), (24, 1, 3, 3), {"groups": 24}, "aten"),
        ((2, 24, 9, 9), (48, 1, 3, 3), {"groups": 24, "layout": torch.channels_last}, "aten"),
        ((2, 24, 9, 9), (24, 1, 3, 4), {"groups": 24, "layout": torch.channels_last}, "aten"),
        ((2, 24, 9, 9), (24, 1, 3, 3), {"groups": 24, "layout": torch.channels_last, "stride": 3}, "aten"),
        ((2, 24, 9, 9), (24, 1, 3, 3), {"groups": 24, "layout": torch.channels_last, "dilation": 2}, "aten"),
        ((2, 8, 9, 9), (8, 1, 3, 3), {"groups": 8, "layout": torch.channels_last}, "aten"),
        ((2, 24, 9, 9), (24, 1, 3, 3), {"groups": 24, "layout": torch.channels_last, "dtype": torch.float64}, "aten"),
    ],
)
def test_algorithm(shape, weight, options, expected):
    from pyfused.backends.cpu.conv2d_relu import algorithm

    dtype = options.get("dtype", torch.float32)
    pairs = [(options.get(name, default),) * 2 for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    x, w = torch.empty(shape, dtype=dtype), torch.empty(weight, dtype=dtype)
    x = x.contiguous(memory_format=options.get("layout", torch.contiguous_format))
    w.requires_grad_(options.get("training", False))
    assert algorithm(x, w, None, *pairs, options.get("groups", 1)) == expected


@pytest.mark.parametrize(
    "channels, outputs, size, dtype, groups, own",
    [
        (1, 32, 3, torch.float32, 1, True),
        (3, 32, 3, torch.bfloat16, 1, True),
        (64, 64, 3, torch.bfloat16, 1, False),
        (64, 256, 1, torch.bfloat16, 1, True),
        (512, 512, 1, torch.float16, 1, False),
        (32, 32, 1, torch.float64, 1, True),
        (64, 64, 3, torch.float64, 1, False),
        (8, 8, 1, torch.float32, 8, False),
    ],
)
def test_tritons_rule(channels, outputs, size, dtype, groups, own):
    """Own products where memory is the bound, PyTorch's convolution where arithmetic is."""
    pytest.importorskip("triton")
    from pyfused.backends.triton import conv2d_relu

    on_gpu = SimpleNamespace(is_cuda=True, dtype=dtype)
    weight = torch.empty(outputs, channels // groups, size, size, dtype=dtype)
    assert conv2d_relu._ways(on_gpu, weight, groups)[0] == own


@needs_cpu
def test_what_eager_does_as_well_is_left_to_it(monkeypatch):
    """No autograd.Function of ours where PyTorch's convolution would run, unless forced; the same values."""
    monkeypatch.setattr(dispatch, "may_hand_over", may_hand_over)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 32, 20, 20, generator=g), torch.randn(32, 32, 5, 5, generator=g, requires_grad=True)
    out, expected = PF.conv2d_relu(x, w, padding=2), eager("conv2d_relu")(x, w, padding=2)
    assert "Conv2dReLU" not in type(out.grad_fn).__name__ and torch.equal(out, expected)
    with pyfused.use_backend("cpu"):
        forced = PF.conv2d_relu(x, w, padding=2)
    assert "Conv2dReLU" in type(forced.grad_fn).__name__ and torch.equal(out, forced)
    assert "Conv2dReLU" in type(PF.conv2d_relu(x, w[..., :3, :3]).grad_fn).__name__  # Winograd
    for layout, size in itertools.product(LAYOUTS, (3, 7)):  # first layers, which oneDNN computes no faster
        first = torch.empty(2, 3, 40, 40).contiguous(memory_format=layout), torch.empty(8, 3, size, size)
        assert not dispatch.cedes("conv2d_relu", (*first, None, (1, 1), (0, 0), (1, 1), 1))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        pooled = PF.conv2d_relu_max_pool2d(x, w, padding=2)
    torch.testing.assert_close(pooled, eager("conv2d_relu_max_pool2d")(x, w, padding=2))


@needs_cpu
def test_set_conv_algorithm():
    x, w = torch.randn(8, 32, 9, 9), torch.randn(32, 32, 3, 3)
    results = {}
    try:
        for name in ("auto", "direct", "winograd"):
            pyfused.set_conv_algorithm(name)
            results[name] = PF.conv2d_relu(x, w)
    finally:
        pyfused.set_conv_algorithm("auto")
    assert torch.equal(results["auto"], results["winograd"])
    assert not torch.equal(results["direct"], results["winograd"]), "two algorithms never round alike"
    with pytest.raises(ValueError, match="no convolution algorithm is called 'fft'"):
        pyfused.set_conv_algorithm("fft")


@pytest.mark.parametrize(
    "channels, outputs, size, kernel", list(itertools.product((1, 3, 16), (1, 16), (1, 3, 5), (1, 3)))
)
def test_strides_are_eagers(channels, outputs, size, kernel):
    """People call .view() on what comes out: it must be laid out as eager PyTorch lays it out."""
    for layout, weight_layout, batch in itertools.product(LAYOUTS, LAYOUTS, (1, 2)):
        x = torch.randn(batch, channels, size, size).to(memory_format=layout)
        w = torch.randn(outputs, channels, kernel, kernel).to(memory_format=weight_layout)
        for got, expected in (
            (PF.conv2d_relu(x, w, padding=1), eager("conv2d_relu")(x, w, padding=1)),
            (PF.conv2d_relu_max_pool2d(x, w, padding=2), eager("conv2d_relu_max_pool2d")(x, w, padding=2)),
        ):
            matters = [d for d in range(4) if got.shape[d] > 1]
            assert [got.stride(d) for d in matters] == [expected.stride(d) for d in matters]


def run(function, x, w, b, upstream=None, **options):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    out = function(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out) if upstream is None else upstream(out))
    return [out.detach(), *grads]


@pytest.mark.op("conv2d_relu", "conv2d_relu_max_pool2d")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "pool", [{"pool_size": 2}, {"pool_size": 3, "pool_stride": 2}, None], ids=["2x2", "3x3", "none"]
)
@pytest.mark.parametrize("channels", [1, 6, 20], ids=["direct", "aten", "implicit_gemm"])
def test_special_values(variant, channels, pool, layout):
    """NaN, infinities, -0 and ties as in eager PyTorch, in outputs and in gradients: implicit GEMM keeps them apart."""
    x = exact(2, channels, 13, 11)
    for at, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        x[0, 0, 2 + at, 3 + 2 * at] = x[1, 0, 4, 2 * at] = value
    x[1, 0, 8:10, 4:6] = float("nan")  # a window of NaN only: the last one counts
    x = x.to(memory_format=layout)
    w = torch.ones(18, channels, 1, 1)
    w[1::2] = -1
    op = "conv2d_relu_max_pool2d" if pool else "conv2d_relu"
    pool = pool or {}
    got, expected = run(public(op), x, w, exact(18), **pool), run(eager(op), x, w, exact(18), **pool)
    for name, g, e in zip(("output", "d_input", "d_weight", "d_bias"), got, expected):
        assert torch.equal(g.nan_to_num(nan=123.0), e.nan_to_num(nan=123.0)), name


@pytest.mark.op("conv2d_relu_max_pool2d")
def test_ties_after_rounding(variant):
    """Of those that round to the maximum in bfloat16 the first, as in eager PyTorch. Sums are exact in float32."""
    if dispatch._forced != "triton":
        pytest.skip("compares before it rounds")
    x, w, b = (exact(*shape, high=9).bfloat16() for shape in ((2, 40, 9, 9), (16, 40, 3, 3), (16,)))
    op = "conv2d_relu_max_pool2d"
    for name, g, e in zip(
        ("output", "d_input", "d_weight", "d_bias"), run(public(op), x, w, b), run(eager(op), x, w, b)
    ):
        assert torch.equal(g, e), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(3, 1, 9, 8), (3, 6, 9, 8), (8, 16, 9, 8)], ids=["direct", "aten", "winograd"])
def test_expanded_upstream(variant, op, shape):
    """Strides of 0 in the upstream gradient, as out.sum() sends them."""
    # Not exact values: Winograd would round a sum that is exactly 0, where ReLU's gradient jumps.
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g) for s in (shape, (16, shape[1], 3, 3), (16,)))

    def expanded(out):
        return torch.full((), 0.5).expand(out.shape)

    for g, e in zip(run(public(op), x, w, b, expanded), run(eager(op), x, w, b, expanded)):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [2, 7, 20], ids=["direct", "aten", "winograd"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_same_bits_for_any_number_of_threads(op, channels, layout):
    x = torch.randn(5, channels, 24, 19).to(memory_format=layout)
    w, b = torch.randn(24, channels, 3, 3), torch.randn(24)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            x.requires_grad_(False)
            leaves = [x, w.clone().requires_grad_(), b.clone().requires_grad_()]
            out = public(op)(*leaves)
            upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
            results.append([out.detach(), *torch.autograd.grad(out, leaves[1:], upstream)])
    finally:
        torch.set_num_threads(before)
    ours = (
        slice(0, 3) if channels != 7 else slice(2, 3)
    )  # in between PyTorch's convolution runs, which promises nothing
    for other in results[1:]:
        for first, again in zip(results[0][ours], other[ours]):
            assert torch.equal(first, again)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [2, 7, 20], ids=["direct", "aten", "winograd"])
def test_every_subset_of_gradients(variant, op, channels):
    x, w, b = torch.randn(6, channels, 9, 9), torch.randn(17, channels, 3, 3), torch.randn(17)
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        grads = []
        for function in (public(op), eager(op)):
            leaves = [t.clone().requires_grad_(needed) for t, needed in zip((x, w, b), wanted)]
            out = function(*leaves)
            upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
            grads.append(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], upstream))
        for g, e in zip(*grads):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3)


BAD = [
    ("input is smaller than the kernel", (1, 2, 2, 2), (3, 2, 3, 3), {}, "kernel is larger than the padded input"),
    ("channels differ", (1, 2, 5, 5), (3, 4, 3, 3), {}, "input has 2 channels"),
    ("groups do not divide", (1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, "groups must divide C_out"),
    ("bias of another length", (1, 2, 5, 5), (3, 2, 3, 3), {"bias": torch.zeros(4)}, r"bias must be \(3,\)"),
    ("2-d input", (5, 5), (3, 2, 3, 3), {}, "input must be"),
    ("3-d weight", (1, 2, 5, 5), (3, 2, 3), {}, "weight must be"),
    ("stride 0", (1, 2, 5, 5), (3, 2, 3, 3), {"stride": 0}, "stride must be"),
    ("negative padding", (1, 2, 5, 5), (3, 2, 3, 3), {"padding": -1}, "padding must be"),
    ("three strides", (1, 2, 5, 5), (3, 2, 3, 3), {"stride": (1, 1, 1)}, "stride must be"),
    ("dilation 0", (1, 2, 5, 5), (3, 2, 3, 3), {"dilation": 0}, "dilation must be"),
    ("same with a stride", (1, 2, 5, 5), (3, 2, 3, 3), {"padding": "same", "stride": 2}, "needs stride 1"),
    ("unknown padding", (1, 2, 5, 5), (3, 2, 3, 3), {"padding": "full"}, "got 'full'"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape, weight, options, message", [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments(op, shape, weight, options, message):
    x, w = torch.zeros(shape), torch.zeros(weight)
    with pytest.raises(Exception) as expected:
        eager(op)(x, w, **options)
    with pytest.raises(type(expected.value), match=message) as caught:
        public(op)(x, w, **options)
    assert str(expected.value).splitlines()[0] in str(caught.value)


@pytest.mark.parametrize("pool", [{"pool_size": 9}, {"pool_size": 0}, {"pool_size": (1, 2, 3)}])
def test_bad_pools(pool):
    x, w = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3)
    with pytest.raises(Exception) as expected:
        eager("conv2d_relu_max_pool2d")(x, w, **pool)
    with pytest.raises(type(expected.value), match="pool_size"):
        PF.conv2d_relu_max_pool2d(x, w, **pool)


@pytest.mark.parametrize("op", OPS)
def test_dtypes_beyond_the_kernels_run_in_eager(op):
    w = torch.randint(-3, 3, (2, 1, 2, 2))
    x = torch.randint(-3, 3, (1, 1, 6, 6))
    assert torch.equal(public(op)(x, w), eager(op)(x, w))
    with pytest.raises(RuntimeError):  # dtypes that differ
        public(op)(torch.zeros(1, 1, 6, 6), torch.zeros(2, 1, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("op", OPS)
def test_autocast(op):
    x, w, b = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = public(op)(x, w, b)
        double = public(op)(x.double(), w.double(), b.double())
    assert out.dtype == torch.bfloat16 and double.dtype == torch.float64
    out.sum().backward()
    assert w.grad.dtype == torch.float32


def test_saves_one_byte_per_pooled_output():
    saved = []
    x, w, b = torch.randn(4, 6, 10, 10), torch.randn(8, 6, 3, 3), torch.randn(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = PF.conv2d_relu_max_pool2d(x, w.requires_grad_(), b)
    known = {t.data_ptr() for t in (x, w, b)}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in known) == out.numel()


MODULES = [
    lambda **o: (pyfused.nn.Conv2dReLU(3, 6, 3, **o), nn.Sequential(nn.Conv2d(3, 6, 3, **o), nn.ReLU())),
    lambda **o: (
        pyfused.nn.Conv2dReLUMaxPool2d(3, 6, 3, pool_size=3, pool_stride=2, **o),
        nn.Sequential(nn.Conv2d(3, 6, 3, **o), nn.ReLU(), nn.MaxPool2d(3, 2)),
    ),
]


@pytest.mark.parametrize("make", MODULES, ids=["Conv2dReLU", "Conv2dReLUMaxPool2d"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same", "bias": False}], ids=str
)
def test_modules(make, options):
    fused, plain = make(**options)
    assert list(fused.state_dict()) == list(plain[0].state_dict())
    fused.load_state_dict(plain[0].state_dict())
    x = torch.randn(2, 3, 9, 9)
    for module in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(module(x), plain(x))
        torch.testing.assert_close(module(x[0]), plain(x[0]))
    assert "pool_size" in repr(fused) or isinstance(fused, pyfused.nn.Conv2dReLU)


@pytest.mark.parametrize("op", OPS)
def test_gradgrad(op):
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5, 5), (2, 2, 2, 2), (2,))
    ]
    assert torch.autograd.gradcheck(public(op), leaves)
    assert torch.autograd.gradgradcheck(public(op), leaves)


@needs_cpu
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("channels", [16, 64, 200])
def test_winograd_error_bound(channels, padding):
    """The bound that the documentation states, on data of either sign and with an offset, which is its worst case."""
    g = torch.Generator().manual_seed(channels)
    for offset in (0.0, 1.0):
        x = torch.randn(2, channels, 14, 14, generator=g) + offset
        w = torch.randn(32, channels, 3, 3, generator=g) / channels**0.5 / 3
        truth = F.relu(F.conv2d(x.double(), w.double(), padding=padding))
        error = (PF.conv2d_relu(x, w, padding=padding) - truth).abs().max() / truth.abs().max()
        assert error <= 3e-5
        assert F.relu(F.conv2d(x, w, padding=padding)).sub(truth).abs().max() / truth.abs().max() < 3e-6
