"""Tiny calls on a CPU: eager PyTorch's, bit for bit; with our errors, and only where eager can do what is asked."""

import inspect
from functools import partial

import pytest
import torch
from accuracy import eager, gradients_of, outputs_of, public
from cases import CASES

import pyfused
import pyfused.functional as PF
from pyfused import dispatch
from pyfused._library import SIGNATURES
from pyfused.ops import conv_act

OPS = sorted({case.op for case in CASES})
may_hand_over, pick = dispatch.may_hand_over, dispatch.pick


@pytest.fixture(autouse=True)
def picked(tiny_calls_reach_kernels, monkeypatch):
    """Tiny calls are handed over. Gives the names of the registered ops that were called all the same."""
    names = []
    monkeypatch.setattr(dispatch, "may_hand_over", may_hand_over)
    monkeypatch.setattr(dispatch, "pick", lambda name, args: (names.append(name), pick(name, args))[1])
    monkeypatch.setattr(dispatch, "_forced", None)
    return names


def same(got, expected):
    return all(torch.equal(g.to_dense().nan_to_num(), e.to_dense().nan_to_num()) for g, e in zip(got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_tiny_cases_are_eagers_bit_for_bit(op, dtype, picked):
    handed_over = 0
    for case in CASES:
        if case.op != op or dtype not in case.dtypes or not case.grad:
            continue
        picked.clear()
        arguments = case.arguments(dtype)
        got = [*outputs_of(public(op), arguments), *gradients_of(public(op), arguments, case.grad)]
        if not picked:
            handed_over += 1
            assert same(got, [*outputs_of(eager(op), arguments), *gradients_of(eager(op), arguments, case.grad)]), case
    assert handed_over


def problem(rows=6, classes=5):
    return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHORT_ROWS = ((201, 15, False), (190, 15, True), (2100, 24, False), (2000, 24, True))
LONG_ROWS = ((1800, 100, False), (1700, 100, True), (5, 18000, False), (4, 18000, True), (4, 125_100, False))


@pytest.mark.parametrize(("rows", "classes", "tiny"), SHORT_ROWS)
def test_what_is_tiny_depends_on_the_length_of_a_row(rows, classes, tiny, picked, threads):
    PF.cross_entropy(*problem(rows, classes))
    assert bool(picked) != tiny


@pytest.mark.parametrize(("rows", "classes", "tiny"), LONG_ROWS)
def test_what_is_tiny_depends_on_threads_and_the_number_of_rows(rows, classes, tiny, picked, threads):
    PF.cross_entropy(*problem(rows if rows < 10 else rows * threads // 2, classes))
    assert bool(picked) != (tiny or (rows == 5 and threads == 2))


def test_what_is_tiny_without_a_gradient_is_smaller(picked, threads):
    logits, target = problem(450 * threads, 100)
    PF.cross_entropy(logits, target)
    assert not picked
    PF.cross_entropy(logits.detach(), target)
    assert picked


@pytest.mark.parametrize("function", [PF.conv2d_relu, PF.conv2d_relu_max_pool2d])
def test_a_remembered_way_follows_whatever_changes(function, picked):
    """The convolutions remember how a call of a signature goes: to eager or to the kernels."""
    layout, _C = torch.channels_last, pytest.importorskip("pyfused._C")
    x, stem = torch.randn(2, 32, 30, 30).to(memory_format=layout), torch.randn(1, 3, 64, 64).to(memory_format=layout)
    weight, large = torch.randn(32, 32, 3, 3, requires_grad=True), torch.randn(64, 3, 7, 7, requires_grad=True)
    few, wide = torch.randn(1, 32, 14, 14).to(memory_format=layout), torch.randn(64, 32, 3, 3, requires_grad=True)
    reaches = []

    def call(*args, **options):
        for _ in range(3):
            picked.clear()
            function(*args, **options)
            reaches.append(bool(picked))
        assert len(set(reaches[-3:])) == 1
        return reaches[-1]

    @torch.no_grad()
    def inference(*args, **options):
        return call(*args, **options)

    for _ in range(2):  # all of it once more, with everything remembered
        assert call(x, weight) and inference(x, weight)
        assert not inference(x, weight, dilation=2) and inference(x, weight, padding=1)
        assert call(x, weight, torch.zeros(32)) and call(x[:1], weight)
        assert not inference(x.double(), weight.detach().double())
        assert call(stem, large) and inference(stem, large)
        # Winograd pays where the weight's transform is remembered, which is in inference.
        assert inference(few, wide) and call(few, wide) == (function is PF.conv2d_relu_max_pool2d)
        with pyfused.use_backend("reference"):
            assert inference(x, weight, dilation=2)
        pyfused.set_conv_algorithm("direct")
        assert not inference(x, weight)
        pyfused.set_conv_algorithm("auto")
        before = _C.isa()
        _C.set_isa("baseline")
        assert not inference(x, weight)
        _C.set_isa(before)
        with pytest.raises(RuntimeError, match="input has 32 channels"):
            inference(x, large)
        for other in (weight.detach().to_sparse(), weight.detach().to_mkldnn()):
            with pytest.raises(RuntimeError, match="weight type"):
                inference(x, other)
        assert not inference(x, weight.detach().to("meta"))  # PyTorch takes it


def test_remembered_ways_are_bounded(picked):
    from pyfused.ops.conv2d_relu import _way

    for width in range(3, 3 + SIGNATURES + 10):
        PF.conv2d_relu(torch.zeros(1, 1, 3, width), torch.zeros(1, 1, 3, 3))
    assert len(inspect.getclosurevars(_way).nonlocals["answers"]) <= SIGNATURES


def test_conv_act_reaches_its_kernels_for_winograd_and_for_gelu_in_channels_last(picked, monkeypatch):
    pytest.importorskip("pyfused._C")
    from pyfused.backends.cpu import widen

    monkeypatch.setattr(widen, "SLOW", frozenset())

    def runs(shape, weight, layout=torch.channels_last, dtype=torch.float32, train=True, **options):
        picked.clear()
        x, weight = torch.randn(shape, dtype=dtype), torch.randn(weight, dtype=dtype, requires_grad=train)
        if x.dim() == 4:
            x = x.to(memory_format=layout)
        output = PF.conv_act(x, weight, **options)
        if train:
            output.sum().backward()
        return picked == ["conv_act", "conv_act_backward"][: 1 + train]

    large, three, one = (4, 64, 42, 42), (64, 64, 3, 3), (64, 64, 1, 1)
    nchw = torch.contiguous_format
    for layout in (torch.channels_last, nchw):
        assert runs(large, three, layout, activation="silu")
        assert not runs(large, one, layout, activation="silu")
        assert runs(large, one, layout, train=False, activation="silu")
        assert runs((4, 64, 70, 70), one, layout, train=False, activation="silu") == (layout == torch.channels_last)
        assert not runs((1, 64, 8, 8), three, layout, activation="silu")
    residual = torch.randn(4, 64, 40, 40)
    assert runs(large, three, activation="relu", residual=residual)
    assert not runs((4, 64, 40, 40), one, activation="relu", residual=residual)
    assert runs(large, one, activation="gelu")
    assert not runs(large, one, nchw, activation="gelu")
    assert not runs(large, one, dtype=torch.bfloat16, activation="gelu")
    monkeypatch.setattr(widen, "SLOW", frozenset([torch.bfloat16]))
    assert runs((4, 64, 43, 42), one, dtype=torch.bfloat16, activation="gelu")  # how `large` runs is remembered
    assert not runs((2, 256, 30, 30), (64, 256, 1, 1), activation="gelu")
    assert not runs((4, 64, 3000), (64, 64, 3), activation="gelu")
    assert runs((4, 64, 112, 112), one, activation="silu")
    assert not runs((4, 64, 112, 112), one, nchw, activation="silu")
    with pyfused.use_backend("cpu"):
        assert dispatch._forced == "cpu" and runs(large, one, activation="silu")


@pytest.mark.parametrize("activation", ["relu", "gelu", "none", "leaky_relu", "silu"])
@pytest.mark.parametrize("shape, weight", [((2, 3, 9), (4, 3, 3)), ((3, 9), (4, 3, 3)), ((3, 7, 7), (4, 3, 1, 1))])
def test_conv_act_in_eager_pytorch_changes_nothing_given(activation, shape, weight, picked):
    x, weight = (torch.randn(s, requires_grad=True) for s in (shape, weight))
    plain = PF.conv_act(x, weight, activation="none")
    residual = torch.randn_like(plain, requires_grad=True)
    given = [t.detach().clone() for t in (x, weight, residual)]
    options = {"activation": activation, "negative_slope": 0.3}
    got = PF.conv_act(x, weight, residual=residual, **options)
    expected = conv_act.reference(x, weight, residual=residual, **options)
    assert not picked and torch.equal(got, expected)
    got, expected = (torch.autograd.grad(y.square().sum(), (x, weight, residual)) for y in (got, expected))
    assert same(got, expected) and all(torch.equal(a, b) for a, b in zip(given, (x, weight, residual)))
    wide = PF.conv_act(x, weight, residual=torch.ones(()), **options)  # broadcast
    torch.testing.assert_close(wide, conv_act.EAGER[activation](plain + 1, 0.3))


@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"softcap": 2.0}, {"return_lse": True}, {"inplace": True}])
def test_what_eager_lacks_stays(picked, options):
    x, target = problem()
    PF.cross_entropy(x * 1, target, **options)
    assert picked == ["cross_entropy"]


def test_a_forced_backend_runs(picked):
    with pyfused.use_backend("reference"):
        PF.cross_entropy(*problem())
    assert picked == ["cross_entropy"]


def test_compiled_graphs_keep_the_registered_op_for_every_size(picked):
    compiled = torch.compile(PF.cross_entropy, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (6, 7, 4000):
            picked.clear()
            compiled(*problem(rows))
            assert picked == ["cross_entropy"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("function", [PF.conv2d_relu, PF.conv2d_relu_max_pool2d])
def test_traces_keep_the_registered_op(function, picked):
    x, weight = torch.randn(1, 16, 6, 6), torch.randn(16, 16, 3, 3)
    function(x, weight)
    traced = torch.jit.trace(lambda x: function(x, weight), x)
    assert f"pyfused::{function.__name__}" in [node.kind() for node in traced.graph.nodes()]
    larger = torch.randn(2, 16, 40, 40)
    torch.testing.assert_close(traced(larger), eager(function.__name__)(larger, weight), rtol=1e-4, atol=1e-3)


def test_devices_other_than_a_cpu_and_subclasses_keep_the_op():
    class Subclass(torch.Tensor):
        pass

    assert may_hand_over(torch.zeros(2))
    assert not may_hand_over(torch.zeros(2, device="meta"))
    assert not may_hand_over(torch.zeros(2).as_subclass(Subclass))


def test_errors_name_argument_and_value():
    x, target = problem()
    target[4] = 7
    ids, bad, table = torch.tensor([0, 1]), torch.tensor([0, 9]), torch.randn(3, 4, requires_grad=True)
    image, weight = torch.randn(1, 3, 5, 5), torch.randn(2, 4, 3, 3)
    with pytest.raises(IndexError, match=r"target 7 is out of bounds.*\[4\]"):
        PF.cross_entropy(x, target)
    with pytest.raises(IndexError, match=r"target 7 is out of bounds.*\[4\]"):
        PF.linear_cross_entropy(x, torch.randn(5, 5), target)
    for f in (PF.embedding_dot, PF.in_batch_cross_entropy):
        with pytest.raises(IndexError, match=r"item 9 is out of bounds.*item\[1\]"):
            f(ids, bad, table, table)
    for f in (PF.conv2d_relu, PF.conv2d_relu_max_pool2d, partial(PF.conv_act, activation="silu")):
        with pytest.raises(RuntimeError, match="input has 3 channels"):
            f(image, weight)


def test_what_eager_would_broadcast_is_refused():
    x, target = problem()
    with pytest.raises(RuntimeError, match="linear_bias"):
        PF.linear_cross_entropy(x, torch.randn(5, 5), target, linear_bias=torch.zeros(1))
    table = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="D = 4, but item_weight has D = 1"):
        PF.embedding_dot(torch.tensor([0]), torch.tensor([0]), table, torch.randn(3, 1))


def test_sparse_gradients_stay_coalesced():
    ids, table = torch.tensor([0, 1, 0]), torch.randn(3, 4, requires_grad=True)
    scores = PF.embedding_dot(ids, ids, table, torch.randn(3, 4), sparse=True)
    (grad,) = torch.autograd.grad(scores.sum(), table)
    assert grad.is_coalesced() and grad._nnz() == 2
