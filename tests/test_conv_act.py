"""conv_act beyond the case table: what it saves, layouts, special values, modules, bad arguments."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyfused
import pyfused.functional as PF
import pyfused.nn as pnn
from pyfused import _binary
from pyfused.ops.conv_act import ACTIVATIONS, reference

needs_cpu = pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))
G = torch.Generator().manual_seed(0)
X, W, B = torch.randn(2, 3, 9, 9, generator=G), torch.randn(4, 3, 3, 3, generator=G), torch.randn(4, generator=G)
R = torch.randn(2, 4, 7, 7, generator=G)


def kept(function) -> list[tuple]:
    """Shapes that autograd keeps for the call's backward, without those of input, weight and bias."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function()
    return sorted(s for s in shapes if s not in {tuple(X.shape), tuple(W.shape), tuple(B.shape)})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_saved(activation):
    """One tensor of the output's size at most, and none for "none"; the output itself where act' follows from it."""
    x = X.clone().requires_grad_()
    assert kept(lambda: PF.conv_act(x, W, B, activation=activation)) == [R.shape] * (activation != "none")
    out = PF.conv_act(x, W, B, activation=activation)
    shares = any(isinstance(t, torch.Tensor) and t.data_ptr() == out.data_ptr() for t in out.grad_fn.saved_tensors)
    assert shares == (activation in ("relu", "leaky_relu", "relu6"))


def test_plain_relu_is_conv2d_relu():
    x = X.clone().requires_grad_()
    for out in (PF.conv_act(x, W, B), PF.conv_act(x[:, :, 0], W[:, :, 0])):
        names, node = [], out.grad_fn
        while node is not None:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        assert "_Conv2dReLUBackward" in names
    assert torch.equal(PF.conv_act(X, W, B), PF.conv2d_relu(X, W, B))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_gradients_do_not_flow_where_nothing_may(activation):
    """An infinite gradient at a dead output is 0, as in eager, not 0 · inf."""
    x = torch.linspace(-8, 8, 33).view(1, 1, 1, 33).requires_grad_()
    weight = torch.ones(1, 1, 1, 1)
    upstream = torch.full((1, 1, 1, 33), float("inf"))
    (got,) = torch.autograd.grad(PF.conv_act(x, weight, activation=activation), x, upstream)
    (expected,) = torch.autograd.grad(reference(x, weight, activation=activation), x, upstream)
    assert (got[expected == 0] == 0).all() and not got[~expected.isnan()].isnan().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation):
    x = X.clone()
    x[0, 0, 4, 4] = float("nan")
    x.requires_grad_()
    got, expected = (f(x, W, B, activation=activation) for f in (PF.conv_act, reference))
    assert torch.equal(got.isnan(), expected.isnan())
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
    assert torch.equal(grads[0].isnan(), grads[1].isnan())


@needs_cpu
@pytest.mark.parametrize("isa", _binary._C.isas() if _binary._C else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_derivatives_far_and_near(activation, dtype, isa):
    """From -30 to 30, against eager PyTorch in float64, whose derivatives of SiLU are off by 16 units themselves."""
    before = _binary._C.isa()
    _binary._C.set_isa(isa)
    try:
        z = torch.linspace(-30, 30, 24_001, dtype=dtype).view(1, 1, 1, -1)
        out, g, one = torch.empty_like(z), torch.empty_like(z), torch.ones_like(z)
        number = ACTIVATIONS.index(activation)
        _binary._C.conv_act(out, z, None, number, 0.01, 1)
        truth = z.double().requires_grad_()
        value = reference(truth, torch.ones(1, 1, 1, 1, dtype=torch.float64), activation=activation)
        _binary._C.conv_act_grad(g, None, one, z if activation != "none" else one, number, 0.01, 1)
        (slope,) = torch.autograd.grad(value.sum(), truth)
        eps = torch.finfo(dtype).eps
        assert ((out - value).abs() <= 4 * eps * value.abs().clamp_min(1)).all()
        assert ((g - slope).abs() <= (4 if dtype == torch.float32 else 64) * eps).all()
    finally:
        _binary._C.set_isa(before)


@needs_cpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_bits(layout):
    g = torch.Generator().manual_seed(0)
    grad, z = (torch.randn(5, 24, 31, 33, generator=g).to(memory_format=layout) for _ in range(2))
    found = []
    for threads in (1, 2, 5):
        d, bias, out = torch.empty_like(z), torch.empty(24), torch.empty_like(z)
        _binary._C.conv_act_grad(d, bias, grad, z, ACTIVATIONS.index("gelu"), 0.0, threads)
        _binary._C.conv_act(out, z, None, ACTIVATIONS.index("gelu"), 0.0, threads)
        found.append((d, bias, out))
    for a, b in itertools.pairwise(found):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_nothing_given_is_changed():
    given = [X.clone(), W.clone(), B.clone(), R.clone()]
    for activation in ACTIVATIONS:
        with torch.no_grad():
            PF.conv_act(*given[:3], activation=activation, residual=given[3])
        leaves = [t.clone().requires_grad_() for t in given]
        out = PF.conv_act(*leaves[:3], activation=activation, residual=leaves[3])
        before, upstream = out.detach().clone(), torch.ones_like(out)
        out.backward(upstream, retain_graph=True)
        first = [t.grad.clone() for t in leaves]
        out.backward(upstream)
        assert torch.equal(out, before) and torch.equal(upstream, torch.ones_like(out))
        for t, original, g in zip(leaves, (X, W, B, R), first):
            assert torch.equal(t, original) and torch.equal(t.grad, 2 * g)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 19, 11, 14), (2, 5, 11, 14)], ids=["winograd", "oneDNN"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients(activation, shape, layout):
    """In one pass or in place: the same as where z is kept."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(memory_format=layout)
    weight, bias = torch.randn(24, shape[1], 3, 3, generator=g) / 10, torch.randn(24, generator=g)
    for residual in (None, torch.randn(2, 24, 9, 12, generator=g).to(memory_format=layout)):
        options = dict(activation=activation, residual=residual)
        with torch.no_grad():
            got = PF.conv_act(x, weight, bias, **options)
        assert got.is_contiguous(memory_format=layout)
        torch.testing.assert_close(got, reference(x, weight, bias, **options), rtol=1e-4, atol=1e-4)
        kept = PF.conv_act(x.clone().requires_grad_(), weight, bias, **options)
        torch.testing.assert_close(got, kept.detach(), rtol=1e-5, atol=1e-6)


def test_other_residuals_run_in_eager_pytorch():
    """Those that broadcast or promote."""
    for residual in (torch.randn(4, 1, 1), torch.randn(2, 4, 7, 7).double(), 2.0):
        got = PF.conv_act(X, W, B, activation="silu", residual=residual)
        expected = F.silu(F.conv2d(X, W, B) + residual)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)))
def test_gradients_of_any_subset(needed):
    given = [t.clone().requires_grad_(n) for t, n in zip((X, W, B, R), needed)]
    out = PF.conv_act(*given[:3], activation="hardswish", residual=given[3])
    expected = reference(*given[:3], activation="hardswish", residual=given[3])
    wanted = [t for t in given if t.requires_grad]
    assert out.requires_grad == bool(wanted)
    if wanted:
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (out, expected))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


ROWS, MAPS = torch.randn(2, 4, 30, generator=G), torch.randn(2, 4, 8, 9, generator=G)
MODULES = {
    "1d": (pnn.ConvAct1d, nn.Conv1d, ROWS, dict(padding=1, stride=2)),
    "1d circular": (pnn.ConvAct1d, nn.Conv1d, ROWS, dict(padding=1, padding_mode="circular")),
    "2d": (pnn.ConvAct2d, nn.Conv2d, MAPS, dict(groups=2, bias=False)),
    "2d reflect": (pnn.ConvAct2d, nn.Conv2d, MAPS, dict(padding=1, padding_mode="reflect")),
}


@pytest.mark.parametrize("kind, plain, x, options", MODULES.values(), ids=MODULES)
def test_modules(kind, plain, x, options):
    torch.manual_seed(0)
    module = kind(4, 6, 3, activation="leaky_relu", negative_slope=0.2, **options)
    twin = plain(4, 6, 3, **options)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), F.leaky_relu(twin(x), 0.2), rtol=1e-4, atol=1e-5)
    residual = torch.randn_like(twin(x))
    torch.testing.assert_close(module(x, residual), F.leaky_relu(twin(x) + residual, 0.2), rtol=1e-4, atol=1e-5)
    assert "activation=leaky_relu, negative_slope=0.2" in repr(module)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


BAD = {
    "activation": (lambda: PF.conv_act(X, W, activation="selu"), "activation must be one of none, relu, .* got 'selu'"),
    "channels": (lambda: PF.conv_act(X, W[:, :2], activation="gelu"), "input has 3 channels"),
    "rank": (lambda: PF.conv_act(X, W[..., 0], activation="gelu"), r"input must be|Expected 2D"),
    "stride": (lambda: PF.conv_act(X[..., 0], W[..., 0], stride=0), "stride must be"),
    "pairs for rows": (lambda: PF.conv_act(X[..., 0], W[..., 0], padding=(1, 1)), "padding must be"),
    "kernel": (lambda: PF.conv_act(X[..., :2, 0], W[..., 0], activation="silu"), "kernel is larger"),
    "residual": (lambda: PF.conv_act(X, W, residual=R[:, :3]), "The size of tensor"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_other_dtypes_run_in_eager_pytorch():
    x, w = torch.randn(1, 2, 6, 6, dtype=torch.complex64), torch.randn(2, 2, 3, 3, dtype=torch.complex64)
    torch.testing.assert_close(PF.conv_act(x, w, activation="silu"), F.silu(F.conv2d(x, w)))


def test_explain():
    options = [[1, 1], [0, 0], [1, 1], 1, ACTIVATIONS.index("gelu"), 0.0, False]
    answer = pyfused.explain("conv_act", X, W, B, None, *options)
    assert answer["cpu" if _binary._C else "reference"] == "chosen"
