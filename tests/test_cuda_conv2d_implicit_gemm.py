"""The CUDA convolutions beyond the case table: instructions, tiles, precision, special values, large offsets; emulated,
and on a GPU where there is one.

Inputs are small integers where not said otherwise: sums are exact in any order, so that results are equal bit for bit.
"""

import re
from pathlib import Path

import emulated
import pytest
import torch
import torch.nn.functional as F

import pyfused
import pyfused.functional as PF
from pyfused import _binary
from pyfused.ops import conv2d_relu as op

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def adapter(device, monkeypatch):
    adapter = pyfused.backends.cuda.conv2d_relu
    monkeypatch.setattr(adapter, "forced", "own")
    return adapter


def integers(*shape, dtype=torch.float32, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("how", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_emulated_fragments(dtype, how):
    """mma, ldmatrix and cp.async against the tables of the PTX ISA and a plain product."""
    if how == 2 and dtype == torch.float32:
        pytest.skip("ldmatrix transposes 16-bit numbers only")
    k = 32 // dtype.itemsize
    a, b, d = integers(16, k, dtype=dtype), integers(8, k, dtype=dtype, seed=1), torch.empty(16, 8)
    emulated.cuda_module().fragments(d, a, b, how)
    if how:
        a[3] = 0
    c = torch.tensor([1.0, 2, 3, 4]).view(2, 1, 1, 2).expand(2, 8, 4, 2).reshape(16, 8)
    assert torch.equal(d, a.float() @ b.float().T + c)


def problem(device, shape, c_out, kernel, dtype=torch.float32, make=integers):
    """Input, weight and bias that require gradients, in channels_last."""
    x, w = make(*shape, seed=1), make(c_out, shape[1], *kernel, seed=2)
    leaves = [t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (x, w)]
    return [t.requires_grad_() for t in (*leaves, make(c_out, seed=3).to(device, dtype))]


def step(run, given, **options):
    """The output and the gradients, for an upstream gradient of small integers."""
    out = run(*given, **options)
    return [out, *torch.autograd.grad(out, given, integers(*out.shape, dtype=out.dtype, seed=4).to(out.device))]


def check_exact(given, **options):
    exact = [t.detach().double().requires_grad_() for t in given]
    for got, expected in zip(step(PF.conv2d_relu, given, **options), step(op.reference, exact, **options), strict=True):
        assert torch.equal(got, expected.to(got.dtype))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, c_out, kernel", [((1, 8, 12, 13), 136, (3, 3)), ((3, 130, 5, 11), 67, (1, 2))])
def test_several_tiles(device, adapter, monkeypatch, shape, c_out, kernel, dtype, large, precision):
    """Of both sizes, rows and columns, in all three products; 130 and 67 channels: number by number."""
    if precision == "tf32" and dtype != torch.float32:
        pytest.skip("TF32 is for float32")
    monkeypatch.setattr(adapter, "_large", lambda *args, **options: large)
    with emulated.float32_as(torch.backends.cudnn.conv, precision):
        check_exact(problem(device, shape, c_out, kernel, dtype), padding=1)


@pytest.mark.parametrize(
    "kernel, options",
    [
        ((1, 1), {"stride": 2}),  # three of four pixels meet no tap
        ((2, 2), {"stride": (3, 2)}),
        ((3, 3), {"stride": 2, "dilation": 2, "padding": 1}),  # all taps meet one residue
        ((3, 2), {"stride": (4, 3), "dilation": (2, 3), "padding": (3, 1)}),
        ((4, 4), {"stride": (1, 2), "dilation": (1, 3), "padding": (0, 5)}),
    ],
)
def test_strides_and_the_taps_that_meet_them(device, adapter, kernel, options):
    check_exact(problem(device, (2, 8, 11, 12), 8, kernel), **options)


@pytest.mark.parametrize("splits", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_of_the_weight_gradient(device, adapter, monkeypatch, splits, dtype):
    """3 share 121 pixels unevenly, most of 100 have none."""
    monkeypatch.setattr(adapter, "_splits", lambda *args: splits)
    check_exact(problem(device, (1, 8, 11, 11), 8, (2, 2), dtype), padding=(1, 0))


@pytest.mark.parametrize("which", [0, 1])
def test_addresses_that_are_not_multiples_of_16(device, adapter, which):
    given = problem(device, (1, 8, 5, 6), 8, (3, 3))
    shape, stride = given[which].shape, given[which].stride()
    moved = (
        torch.empty(given[which].numel() + 1, device=device).as_strided(shape, stride, 1).copy_(given[which].detach())
    )
    given[which] = moved.requires_grad_()
    check_exact(given)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, c_out", [((2, 8, 9, 12), 16), ((1, 5, 17, 18), 69)])
def test_2x2_pooling(device, adapter, monkeypatch, shape, c_out, dtype, large):
    """In the same kernels: ties, an odd row that no window covers, channels number by number; forward and backward."""
    monkeypatch.setattr(adapter, "_large", lambda *args: large)
    x, w, bias = (t.detach() for t in problem(device, shape, c_out, (3, 3), dtype))
    args = (x, w, bias, (1, 1), (1, 1), (1, 1), 1, (2, 2), (2, 2))
    results = []
    with pyfused.use_backend("reference"):
        expected = torch.ops.pyfused.conv2d_relu_max_pool2d(*args)
        grad = integers(*expected[0].shape, dtype=dtype, seed=4).to(device)
        exact = [t.double() for t in (grad, x, w)]
        expected += torch.ops.pyfused.conv2d_relu_max_pool2d_backward(*exact, expected[1], *args[3:], [True] * 3)
    results = [torch.empty_like(t) for t in expected[:2]]
    adapter.gemm(*results, *args[:6])
    results += adapter.gemm_backward(grad, x, w, results[1], *args[3:6], [True] * 3)
    for got, truth in zip(results, expected, strict=True):
        assert torch.equal(got, truth.to(got.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_any_order_of_threads(device, adapter, monkeypatch, dtype):
    monkeypatch.setattr(adapter, "_splits", lambda *args: 3)
    given = problem(device, (2, 12, 9, 10), 12, (3, 3), dtype, make=lambda *shape, seed: torch.randn(shape))
    results = []
    for seed in range(3):
        if device == "cpu":
            emulated.cuda_module().set_seed(seed)
        results.append(step(PF.conv2d_relu, given))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_precision_of_float32(device, adapter):
    """3xTF32 loses what float32 loses, TF32 10 bits' worth and only where PyTorch is told so."""
    given = problem(device, (1, 64, 6, 6), 16, (3, 3), make=lambda *shape, seed: torch.randn(shape))
    truth = step(op.reference, [t.detach().double().requires_grad_() for t in given])
    errors = {}
    for precision in ("ieee", "tf32"):
        with emulated.float32_as(torch.backends.cudnn.conv, precision):
            results = step(PF.conv2d_relu, given)
        errors[precision] = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, truth, strict=True)]
    assert max(errors["ieee"]) < 1e-6, errors
    assert all(1e-5 < e < 2e-3 for e in errors["tf32"][:3]), errors


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_special_values(device, adapter, dtype, value, which):
    """Of input, weight and bias: NaN and infinity where eager PyTorch has them."""
    given = problem(device, (1, 8, 4, 5), 8, (2, 2), dtype)
    with torch.no_grad():
        for t in given:
            t += 0.25  # no zeros: infinity times them is NaN
        given[which][tuple(size // 2 for size in given[which].shape)] = value
    got, expected = step(PF.conv2d_relu, given), step(op.reference, given)
    for a, b in zip(got, expected, strict=True):
        if b is expected[1] and which == 1:  # there the weight also meets zeros around the gradient
            a, b = a[:, :, 1:-1, 1:-1], b[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-2, atol=2e-2)


def test_nothing_flows_back_through_what_relu_cleared(device, adapter):
    """Not even NaN or infinity."""
    given = problem(device, (1, 8, 4, 5), 8, (2, 2))
    with torch.no_grad():
        given[2].fill_(-1000)
    out = PF.conv2d_relu(*given)
    for grad in torch.autograd.grad(out, given, torch.full_like(out, float("nan"))):
        assert not grad.any()


def test_offsets_beyond_32_bits(device, adapter):
    """Images of almost 2^31 numbers, of which nine pixels are read; the rest is never touched and so, on the CPU, takes
    no memory."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    like = {"dtype": torch.float16, "device": device, "memory_format": torch.channels_last}
    x, out = torch.empty(2, 8, 16383, 16384, **like), torch.empty(2, 8, 3, 3, **like)
    x[:, :, ::8191, ::8191] = integers(2, 8, 3, 3, dtype=torch.float16).to(device)
    w = integers(8, 8, 1, 1, dtype=torch.float16, seed=1).to(device)
    _binary._C.cuda_conv2d_implicit_gemm(out, None, x, w, None, 8191, 8191, 0, 0, 1, 1, False, False)
    assert torch.equal(out, F.relu(F.conv2d(x[:, :, ::8191, ::8191].float(), w.float())).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, c_out", [((2, 8, 20, 20), 16), ((2, 3, 7, 6), 5), ((1, 4, 3, 3), 300)])
def test_passes_around_cudnn(device, adapter, monkeypatch, shape, c_out, dtype):
    """Bias and ReLU after its convolution, mask and bias gradient before its gradients."""
    monkeypatch.setattr(adapter, "forced", "cudnn")
    check_exact(problem(device, shape, c_out, (3, 3), dtype), padding=1)
    given = problem(device, shape, c_out, (3, 3), dtype)
    for t in given[:2]:
        t.requires_grad_(False)  # the bias gradient alone
    out = PF.conv2d_relu(*given)
    (grad,) = torch.autograd.grad(out, given[2], torch.ones_like(out))
    assert torch.equal(grad, (out > 0).sum((0, 2, 3)).to(dtype))


def test_passes_around_cudnn_keep_nan_and_take_any_address(device, adapter, monkeypatch):
    """A channel of NaN: its output, and all that flows back through it. The bias and the upstream gradient lie next to
    a multiple of 16 bytes."""
    monkeypatch.setattr(adapter, "forced", "cudnn")
    given = problem(device, (2, 8, 9, 10), 16, (3, 3))
    with torch.no_grad():
        given[2][5] = torch.nan
        given[2] = torch.empty(17, device=device)[1:].copy_(given[2]).requires_grad_()
    results = []
    for run in (PF.conv2d_relu, op.reference):
        out = run(*given)
        upstream = torch.empty(out.numel() + 1, device=device).as_strided(out.shape, out.stride(), 1)
        upstream.copy_(integers(*out.shape, seed=4))
        results.append([out, *torch.autograd.grad(out, given, upstream)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_more_channels_than_a_grid_has_rows_for(device):
    """Named, and not left to a launch that fails."""
    x = torch.zeros(1, 65535 * 32 + 1, device=device)
    with pytest.raises(ValueError, match="too many channels"):
        _binary._C.cuda_conv2d_bias_relu(x, x[0])


# --- Which algorithm
@pytest.mark.parametrize(
    "shape, c_out, kernel, options, expected",
    [
        ((8, 32, 56, 56), 64, 3, {}, "implicit_gemm"),
        ((8, 64, 56, 56), 64, 3, {}, "cudnn, cuDNN's faster arithmetic"),
        ((8, 512, 7, 7), 512, 1, {}, "implicit_gemm"),
        ((8, 32, 56, 56), 64, 3, {"layout": torch.contiguous_format}, "cudnn, .* convert to channels_last"),
        ((8, 32, 56, 56), 64, 3, {"groups": 2}, "cudnn, .* no groups"),
        ((8, 32, 56, 56), 64, 3, {"dtype": torch.float64}, "cudnn, .* no float64"),
        ((8, 32, 56, 56), 64, 3, {"dtype": torch.float32}, "cudnn, cuDNN's faster"),  # TF32 is off in the tests
        ((8, 32, 56, 56), 64, 3, {"stride": 5}, "cudnn, .* a launch for each"),
        ((1, 8, 16384, 8192), 8, 3, {}, "cudnn, .* 2\\^30"),
        ((1, 8, 1, 1), 8, 1, {"padding": 8192}, "cudnn, .* 2\\^30"),
        ((2**28, 5, 1, 1), 8, 1, {}, "cudnn, .* 2\\^28"),
        ((8, 3, 32, 32), 64, 3, {}, "direct"),
        ((8, 1, 32, 32), 64, 7, {}, "direct"),
        ((8, 3, 32, 32), 64, 7, {"stride": 2}, "cudnn, few input channels, but"),
        ((8, 3, 32, 32), 64, 7, {"stride": 2, "dtype": torch.float32}, "direct"),
    ],
)
def test_the_rule_and_how_explain_tells_it(device, adapter, monkeypatch, shape, c_out, kernel, options, expected):
    monkeypatch.setattr(adapter, "forced", None)
    layout, dtype = options.get("layout", torch.channels_last), options.get("dtype", torch.bfloat16)
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    w = torch.empty(c_out, shape[1] // options.get("groups", 1), kernel, kernel, dtype=dtype, device=device)
    pairs = [(options.get("stride", 1),) * 2, (options.get("padding", 0),) * 2, (1, 1)]
    answer = pyfused.explain("conv2d_relu", x, w, None, *pairs, options.get("groups", 1))
    assert re.match("chosen: " + expected, answer["cuda"]), answer
    out = torch.empty(1, device=device)
    answer = pyfused.explain("conv2d_relu_backward", out, x, w, out, *pairs, options.get("groups", 1), [True] * 3)
    assert answer["cuda"].startswith("chosen: direct" if expected == "direct" else "chosen: cudnn")


@pytest.mark.parametrize("asks", ["PYFUSED_AUTOTUNE", "cudnn.benchmark"])
@pytest.mark.parametrize("faster", ["implicit_gemm", "cudnn"])
def test_measured_choice(device, adapter, monkeypatch, faster, asks):
    """Once for sizes, strides and dtype; forward and backward apart."""
    asked = []

    def seconds(run):
        asked.append(run())
        return 1.0 if (len(asked) % 2 == 0) == (faster == "implicit_gemm") else 2.0  # cudnn is asked first

    monkeypatch.setattr(adapter, "forced", None)
    monkeypatch.setattr(adapter, "AUTOTUNE", asks == "PYFUSED_AUTOTUNE")
    # Not of the module itself, whose flags PyTorch's own test helpers freeze.
    monkeypatch.setattr(type(torch.backends.cudnn), "benchmark", asks == "cudnn.benchmark")
    monkeypatch.setattr(adapter, "_measured", {})
    monkeypatch.setattr(adapter, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_exact(problem(device, (1, 8, 5, 6), 8, (3, 3)))
    assert not asked, "within a CUDA graph nothing can be measured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        check_exact(problem(device, (1, 8, 5, 6), 8, (3, 3)))
    assert len(asked) == 4 and set(adapter._measured.values()) == {faster}
    check_exact(problem(device, (1, 8, 5, 7), 8, (3, 3)))
    assert len(asked) == 8


def test_a_measurement_holds_for_one_device():
    adapter = pyfused.backends.cuda.conv2d_relu
    plans = [adapter.Plan({}, ("cudnn", ""), (torch.empty(2, device=d), [1, 1])) for d in ("cpu", "cpu", "meta")]
    first, same, other = (plan._measurement() for plan in plans)
    assert first == same != other


@pytest.mark.parametrize("measured", [None, "direct", "implicit_gemm", "cudnn"])
@pytest.mark.parametrize("pool", [None, (2, 2), (3, 2), (2, 1)])
@pytest.mark.parametrize("c_in", [3, 8, 80])
def test_what_explain_names_is_what_runs(device, adapter, monkeypatch, c_in, pool, measured):
    """Forward and backward, by the rule and measured; 80 channels: cuDNN's, but for what pools itself. First layers are
    measured, too."""
    ran = []

    def recorded(name):
        run = getattr(_binary._C, name)
        return lambda *args: (ran.append(name), run(*args))[1]

    for name in [n for n in dir(_binary._C) if n.startswith(("cuda_conv2d_direct", "cuda_conv2d_implicit_gemm"))]:
        monkeypatch.setattr(_binary._C, name, recorded(name))

    def algorithm():
        (found,) = {"direct" if "direct" in name else "implicit_gemm" for name in ran} or {"cudnn"}
        return found

    def seconds(run):
        ran.clear()
        run()
        return 1.0 if algorithm() == measured else 2.0

    def check(op, *args):
        getattr(torch.ops.pyfused, op)(*args)  # measures
        ran.clear()
        results = getattr(torch.ops.pyfused, op)(*args)
        said = re.match(r"chosen: (\w+), ", pyfused.explain(op, *args)["cuda"])[1]
        assert said == algorithm()
        assert said == measured or measured is None or c_in > 4 or (pool and pool != (2, 2) and "backward" in op)
        return results

    settings = {"forced": None, "AUTOTUNE": measured is not None, "_measured": {}, "seconds": seconds}
    for name, value in settings.items():
        monkeypatch.setattr(adapter, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, w, bias = (t.detach().bfloat16() for t in problem(device, (1, c_in, 6, 7), 8, (3, 3)))
    name, more = ("conv2d_relu_max_pool2d", ((pool[0],) * 2, (pool[1],) * 2)) if pool else ("conv2d_relu", ())
    options = ((1, 1), (1, 1), (1, 1), 1, *more)
    results = check(name, x, w, bias, *options)
    out, saved = results if pool else (results, results)
    check(f"{name}_backward", torch.ones_like(out), x, w, saved, *options, [True] * 3)


def test_the_benchmark_of_the_algorithms(device, adapter, monkeypatch):
    """bench/conv_algorithms.py: all that can run a layer, and the rule's choice among them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    import conv_algorithms

    monkeypatch.setattr(adapter, "forced", None)
    monkeypatch.setattr(adapter, "seconds", lambda run, repetitions: (run(), 0.5)[1])
    for channels, names in ((3, {"cudnn", "direct", "implicit_gemm"}), (8, {"cudnn", "implicit_gemm"})):
        rows = conv_algorithms.measure((1, channels, 6, 6), 8, 3, 1, torch.bfloat16, device)
        assert [row["direction"] for row in rows] == ["forward", "backward"]
        for row in rows:
            assert {name for name in conv_algorithms.ALGORITHMS if row[f"{name} ms"] == 500} == names
            assert row["rule"] in names and row["faster"] == "cudnn"
