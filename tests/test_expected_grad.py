"""cross_entropy that computes its gradient in the forward: it has the bits that the backward would give it, it is used
where the guess was right, and nothing holds it that should not."""

import importlib

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import pyfused
from pyfused import dispatch
from pyfused.functional import cross_entropy

op = importlib.import_module("pyfused.ops.cross_entropy")
ExpectedGrad = importlib.import_module("pyfused.ops.expected_grad").ExpectedGrad
may_hand_over = dispatch.may_hand_over  # which conftest.py switches off

pytestmark = pytest.mark.skipif(bool(pyfused.available_backends()["cpu"]), reason="no CPU backend")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows shorter than a vector, in tiles, in tiles of the forward only, of one block, of several; last groups not whole.
SHAPES = [(37, 3), (37, 17), (50, 45), (70, 130), (19, 801), (3, 5000), (5, 7, 11), (2, 60, 9)]
SETTINGS = {
    "labels": {},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "softcap": {"softcap": 3.0},
    "probabilities": {"label_smoothing": 0.1},
}


def problem(shape, dtype, probabilities=False):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if probabilities:
        return x, torch.randn(shape, generator=generator).softmax(1).to(dtype)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels.view(-1)[1::5] = -100
    return x, labels


def packed(reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None):
    return op.packed_options(reduction, -100, label_smoothing, z_loss, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_bit_by_bit_what_forward_and_backward_give(isa, setting, shape, dtype):
    x, target = problem(shape, dtype, setting == "probabilities")
    same_bits(x, target, packed(**SETTINGS[setting]))


@pytest.mark.parametrize("case", ["NaN", "inf", "-inf", "all ignored", "transposed", "no rows"])
def test_edges(isa, case):
    x, labels = problem((33, 210), torch.float32)
    if case == "all ignored":
        labels.fill_(-100)
    elif case == "transposed":
        x = x.t().contiguous().t()
    elif case == "no rows":
        x, labels = x[:0], labels[:0]
    else:
        x[3, 7], x[4], x[6, int(labels[7])] = float(case), float(case), float(case)  # row 6 is ignored
    same_bits(x, labels, packed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_the_caches(isa, dtype):
    """More than 64 MiB, in rows that begin anywhere within a cache line."""
    x, labels = problem(((65 << 20) // (50257 * dtype.itemsize) + 1, 50257), dtype)
    same_bits(x, labels, packed())
    grad = op._forward_with_grad(1.0, x, labels, *packed("sum"))[3]
    for rows in torch.arange(len(x)).split(40):  # too few for that
        assert torch.equal(op._forward_with_grad(1.0, x[rows], labels[rows], *packed("sum"))[3], grad[rows])


def same_bits(x, target, options):
    grad = torch.tensor(0.37, dtype=op.arithmetic_dtype(x))
    loss, _, stats, total = op._forward(x, target, None, False, *options)
    expected = (loss, stats, total, op._backward(grad, None, x, target, None, stats, total, *options))
    with pyfused.use_backend("cpu"):
        got = op._forward_with_grad(grad.item(), x, target, *options)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) and torch.equal(a.isnan(), b.isnan())


def test_the_reference_has_the_same_signature_and_values():
    x, labels = problem((19, 801), torch.float64)
    given = (0.37, x, labels, *packed(label_smoothing=0.1, z_loss=1e-3, softcap=3.0))
    with pyfused.use_backend("reference"):
        expected = op._forward_with_grad(*given)
    got = op._forward_with_grad(*given)
    for i in (0, 2, 3):  # but the statistics, which ignored rows may have any
        torch.testing.assert_close(got[i], expected[i])


@pytest.mark.parametrize("shape", [(19, 801), (2, 60, 9)])
def test_registration(shape):
    x, labels = problem(shape, torch.float32)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.pyfused.cross_entropy_with_grad.default, (0.37, x, labels, *packed()))


# --- In training
@pytest.fixture
def ran(monkeypatch):
    """The registered ops that training runs, in order; guesses start anew, and nothing is patched for the tests."""
    monkeypatch.setattr(dispatch, "may_hand_over", may_hand_over)
    monkeypatch.setattr(op, "_expected", ExpectedGrad())
    names = []
    for name in ("_forward", "_backward", "_forward_with_grad"):
        monkeypatch.setattr(op, name, spy(getattr(op, name), name, names))
    return names


def spy(call, name, names):
    def run(*args):
        names.append(name)
        return call(*args)

    return run


SHORT, LONG = ["_forward_with_grad"], ["_forward", "_backward"]


def logits(rows=1200):
    x, labels = problem((rows, 200), torch.float32)
    return x.requires_grad_(), labels


def step(x, labels, factor=1.0, **options):
    (grad,) = torch.autograd.grad(cross_entropy(x, labels, **options) * factor, x)
    return grad


def test_from_the_second_step_on_the_gradient_comes_with_the_loss(ran):
    x, labels = logits()
    expected = step(x, labels)
    assert ran == LONG
    for rows in (1200, 900):  # the last batch of an epoch may be smaller
        del ran[:]
        assert torch.equal(step(x[:rows], labels[:rows]), expected if rows == 1200 else step(x[:rows], labels[:rows]))
        assert ran[:1] == SHORT and "_backward" not in ran


def test_accumulated_in_the_gradient_of_a_leaf(ran):
    x, labels = logits()
    for _ in range(4):
        cross_entropy(x, labels).backward()
    assert ran == LONG + 3 * SHORT
    torch.testing.assert_close(x.grad, 4 * step(x, labels))


def test_another_factor_gives_its_own_gradient_and_becomes_the_guess(ran):
    x, labels = logits()
    wrong = [*SHORT, "_backward"]  # and after that one rest, since a guess was right before it
    steps = [(1, LONG), (1, SHORT), (0.25, wrong), (0.25, LONG), (0.25, SHORT), (3, wrong), (3, LONG), (3, SHORT)]
    for factor, runs in steps:
        del ran[:]
        grad = step(x, labels, factor)
        assert ran == runs, factor
        with pyfused.use_backend("cpu"):
            assert torch.equal(grad, step(x, labels, factor))


def test_factors_that_always_change_cost_ever_less(ran):
    x, labels = logits()
    for i in range(300):
        step(x, labels, 1 + i)
    # With rests of 1, 2, 4, ..., 64, 64 and 64 forwards between them
    assert ran.count("_forward_with_grad") == 10 and ran.count("_backward") == 300


def test_losses_of_other_classes_types_and_options_have_guesses_of_their_own(ran):
    x, labels = logits()
    kinds = [({}, x, 1), ({"reduction": "sum"}, x, 2), ({"label_smoothing": 0.1}, x, 3), ({"ignore_index": 5}, x, 4)]
    kinds += [({}, x.detach().double().requires_grad_(), 5), ({}, x.detach()[:, :190].contiguous().requires_grad_(), 6)]
    labels = labels.clamp(0, 189)
    for _ in range(2):
        del ran[:]
        for options, z, factor in kinds:
            step(z, labels, factor, **options)
    assert ran == len(kinds) * SHORT


def test_forwards_without_backward_are_guessed_for_only_a_few_times(ran):
    x, labels = logits()
    step(x, labels)
    del ran[:]
    for _ in range(12):
        cross_entropy(x, labels)
    assert ran == 8 * SHORT + 4 * LONG[:1]
    step(x, labels)
    del ran[:]
    step(x, labels)
    assert ran == SHORT


def test_a_second_backward_computes_the_gradient_again(ran):
    x, labels = logits()
    step(x, labels)
    loss = cross_entropy(x, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()  # it belongs to the caller
    del ran[:]
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected) and ran == ["_backward"]


def test_gradients_of_gradients_go_the_way_that_can_be_differentiated(ran):
    x, labels = problem((600, 200), torch.float64)
    x.requires_grad_()
    step(x, labels)

    def second(loss):
        (grad,) = torch.autograd.grad(loss(x, labels), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(second(cross_entropy), second(F.cross_entropy))


def test_batched_gradients(ran):
    x, labels = logits()
    step(x, labels)
    loss, factors = cross_entropy(x, labels), torch.tensor([1.0, 2.0])
    (grads,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    torch.testing.assert_close(grads, factors.view(2, 1, 1) * step(x, labels))


@pytest.mark.parametrize(
    "hooks",
    [torch.autograd.graph.save_on_cpu, lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)],
)
def test_where_saved_tensors_are_not_to_be_held_none_is(ran, hooks):
    x, labels = logits()
    step(x, labels)
    del ran[:]
    with hooks():
        step(x, labels)
    assert ran == LONG


def test_activation_checkpoints_hold_no_gradient(ran):
    x, labels = logits()
    expected = step(x, labels)
    loss = torch.utils.checkpoint.checkpoint(cross_entropy, x, labels, use_reentrant=False)
    assert ran[2:] == ["_forward"]
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_a_profiler_sees_what_runs_without_it(ran):
    x, labels = logits()
    step(x, labels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        step(x, labels)
    assert ran == LONG + SHORT


@pytest.mark.parametrize("options", [{"z_loss": 1e-3}, {"softcap": 3.0, "reduction": "sum"}])
def test_options_that_eager_lacks(ran, options):
    x, labels = logits(12)  # so few would go to eager without them
    assert torch.equal(*(step(x, labels, **options) for _ in range(2)))
    assert ran == LONG + SHORT


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"weight": torch.ones(200)}, {"inplace": True}])
def test_what_is_never_guessed(ran, options):
    x, labels = logits()
    for _ in range(3):
        cross_entropy(x + 0, labels, **options).sum().backward()
        loss, _ = cross_entropy(x + 0, labels, return_lse=True)
        loss.backward()
    assert "_forward_with_grad" not in ran


def test_the_graph_lets_go_of_the_gradient(ran):
    x, labels = logits()
    step(x, labels)
    pyfused.empty_cache()
    loss = cross_entropy(x, labels)
    loss.backward()
    kept, x.grad = x.grad.data_ptr(), None
    loss = cross_entropy(x, labels)  # while the former graph is alive, its gradient's memory is free again
    loss.backward()
    assert x.grad.data_ptr() == kept


def test_threads_do_not_disturb_each_other(ran):
    from concurrent.futures import ThreadPoolExecutor

    x, labels = logits()
    expected = {factor: step(x, labels, factor) for factor in (1.0, 2.0)}

    def run(i):
        factor = 1.0 + i % 2
        z = x.detach().clone().requires_grad_()
        return torch.equal(step(z, labels, factor), expected[factor])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))
