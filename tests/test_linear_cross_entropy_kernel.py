"""The CPU kernel of linear_cross_entropy: every edge of its blocks and tiles, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, max_error

import pyfused.functional as PF
from pyfused import _C
from pyfused.backends.cpu import linear_cross_entropy as adapter
from pyfused.ops import cross_entropy as ce

pytestmark = pytest.mark.skipif(_C is None, reason="pyfused was built without its extension")

# rows, dims, classes, rows of a chunk. A block has 96 classes, a part 512 dims, a tile 12 or 6 rows or classes by 2
# vectors.
SHAPES = {
    "one of everything": (1, 1, 1, 32),
    "whole tiles": (64, 64, 192, 64),
    "fewer rows than a chunk": (40, 64, 200, 192),
    "a last chunk of one row": (65, 33, 97, 32),  # and a last block of one class, a last vector of one dim
    "tails of 4 and 1": (107, 49, 101, 64),
    "a last vector without a dim": (34, 17, 130, 32),
    "two parts of the dims": (50, 1030, 100, 32),  # of 544 and 486
    "dims of whole parts": (40, 1024, 97, 32),
    "more threads than blocks": (33, 8, 100, 32),
}
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "no bias": {"bias": False},
    "z_loss": {"z_loss": 0.02},
    "weights": {"weights": True, "ignored": True},
    "ignored": {"ignored": True},
    "smoothing": {"ignored": True, "label_smoothing": 0.1, "z_loss": 0.01},
    "all smoothing": {"label_smoothing": 1.0, "bias": False},
}


def problem(shape, bias=True, weights=False, ignored=False, **options):
    rows, dims, classes, chunk = shape
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, dims, generator=g), torch.randn(classes, dims, generator=g) * 2 / dims**0.5
    target = torch.randint(classes, (rows,), generator=g)
    target[:: max(rows // 3, 2)] = -100 if ignored else 0
    leaves = [x, w, torch.randn(classes, generator=g)] if bias else [x, w]
    given = {"weight": torch.rand(classes, generator=g) + 0.1} if weights else {}
    return [t.requires_grad_() for t in leaves], target, given | options, chunk


def eager(leaves, target, weight=None, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """Loss and gradients, in the dtype of `leaves`."""
    weight = None if weight is None else weight.to(leaves[0].dtype)
    loss = ce.reference(F.linear(*leaves), target, weight, -100, reduction, label_smoothing, z_loss=z_loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]


def in_kernel(leaves, target, chunk, weight=None, reduction="mean", label_smoothing=0.0, z_loss=0.0, needed=None):
    x, w, b = (*leaves, None)[:3]
    needed = [True, True, b is not None] if needed is None else needed
    options = (needed, ce.REDUCTIONS.index(reduction), -100, label_smoothing, z_loss, 0.0)
    return adapter.forward_in_kernel(chunk, x, w, b, target, weight, *options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(isa, shape, options):
    leaves, target, given, chunk = problem(shape, **options)
    truth = eager([t.detach().double().requires_grad_() for t in leaves], target, **given)
    expected = eager(leaves, target, **given)
    loss, _, _, *grads = in_kernel(leaves, target, chunk, **given)
    for i, (got, t, e) in enumerate(zip([loss, *grads], truth, expected)):
        check(got, t, e, max_error(e, t), 0.0, f"output {i}")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_the_same_number_of_threads(isa, threads):
    leaves, target, given, chunk = problem((70, 40, 500, 32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (in_kernel(leaves, target, chunk, **given) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_what_is_needed(isa, needed):
    leaves, target, given, chunk = problem((70, 40, 200, 32))
    whole = in_kernel(leaves, target, chunk, **given)[3:]
    part = in_kernel(leaves, target, chunk, needed=[bool(n) for n in needed], **given)[3:]
    for wanted, got, full in zip(needed, part, whole):
        assert torch.equal(got, full) if wanted else got.numel() == 0


def test_a_confident_row_keeps_the_digits_of_its_loss(isa):
    """p at the label is 1 - 1e-9: log p is nothing but rounding if it is taken from a log-sum-exp."""
    x, w = torch.eye(4)[:2], torch.full((300, 4), -8.0)
    w[7, 0] = w[9, 1] = 18.0
    target = torch.tensor([7, 9])
    truth = eager([t.double().requires_grad_() for t in (x, w)], target)
    loss, _, _, _, d_weight, _ = in_kernel([x, w], target, 32)
    for got, t in ((loss, truth[0]), (d_weight, truth[2])):
        torch.testing.assert_close(got.double(), t, rtol=1e-5, atol=0)


def test_masked_classes(isa):
    """-inf in the bias: no probability, no gradient, and whole blocks of it."""
    leaves, target, _, chunk = problem((40, 16, 400, 32))
    target %= 50
    leaves[2].data[50:390] = -torch.inf
    truth = eager([t.detach().double().requires_grad_() for t in leaves], target)
    for got, t in zip(in_kernel(leaves, target, chunk)[3:], truth[1:]):
        torch.testing.assert_close(got.double(), t, rtol=1e-4, atol=1e-6)
        assert got.isfinite().all()


@pytest.mark.parametrize("place", ["input", "weight", "label", "all"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_left_to_the_other_way(isa, bad, place):
    leaves, target, _, chunk = problem((70, 16, 200, 32))
    at = {
        "input": leaves[0].data[3],
        "weight": leaves[1].data[5],
        "label": leaves[2].data[target[69]],
        "all": leaves[2].data,
    }
    at[place].fill_(bad)
    found = in_kernel(leaves, target, chunk)
    if found is not None:  # a class of probability 0
        assert place == "weight" and eager(leaves, target)[0].isfinite()


@pytest.mark.parametrize("kinds", [1, 4, 1000])
@pytest.mark.parametrize("with_grads", [True, False])
def test_rows_and_classes_of_one_id(isa, kinds, with_grads):
    """All of them, which leaves the label alone; a quarter; hardly any."""
    leaves, target, _, chunk = problem((70, 16, 200, 32))
    ids = [torch.randint(kinds, (n,), generator=torch.Generator().manual_seed(n)).to(torch.int32) for n in (70, 200)]
    x, w, b = (t.detach().double().requires_grad_() for t in leaves)
    hit = (ids[0][:, None] == ids[1]) & (torch.arange(200) != target[:, None])
    truth = F.cross_entropy(F.linear(x, w, b).masked_fill(hit, -torch.inf), target, reduction="none")
    needed = (True,) * 3 if with_grads else (False,) * 3
    given = (*(t.detach() for t in leaves), target, None, needed, ce.REDUCTIONS.index("sum"), -100, 0.0, 0.0, 0.0)
    loss, _, stats, *grads = adapter.forward_in_kernel(chunk, *given, ids=ids)
    torch.testing.assert_close(loss.double(), truth.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[2].double(), torch.expm1(truth), rtol=1e-4, atol=1e-6)
    for got, t in zip(grads, torch.autograd.grad(truth.sum(), (x, w, b)) if with_grads else ()):
        torch.testing.assert_close(got.double(), t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_loss_alone(isa, shape, reduction):
    """Without gradients no logits are kept: a block's at a time."""
    leaves, target, given, chunk = problem(shape, weights=True, ignored=True, z_loss=0.01, reduction=reduction)
    truth, expected = (
        eager([t.detach().to(d).requires_grad_() for t in leaves], target, **given)[0]
        for d in (torch.float64, torch.float32)
    )
    loss, _, _, *grads = in_kernel(leaves, target, chunk, needed=(False,) * 3, **given)
    check(loss, truth, expected, max_error(expected, truth), 0.0, "loss")
    assert not any(g.numel() for g in grads)


# --- When it is chosen
@pytest.fixture
def calls(monkeypatch):
    """What the kernel returned, call by call."""
    found, run = [], adapter.run_kernel
    monkeypatch.setattr(adapter, "run_kernel", lambda *args: found.append(run(*args)) or found[-1])
    return found


LARGE = (200, 40, 512 * torch.get_num_threads() + 7000, 64)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_training_in_float32_goes_to_the_kernel(calls, reduction, label_smoothing):
    if _C.isa() == "baseline":
        pytest.skip("this CPU has neither AVX2 nor AVX-512")
    leaves, target, given, _ = problem(LARGE, ignored=True, weights=not label_smoothing, z_loss=0.01)
    given["label_smoothing"] = label_smoothing
    truth = eager([t.detach().double().requires_grad_() for t in leaves], target, reduction=reduction, **given)
    x, w, b = leaves
    loss = PF.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, **given)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    for got, t in zip([loss.detach(), *grads], truth):
        torch.testing.assert_close(got.double(), t, rtol=1e-4, atol=1e-6 * t.abs().max().item())
    assert None not in calls
    # Smoothed, without a reduction, it is not the kernel's.
    assert len(calls) == (1 if reduction != "none" else 0 if label_smoothing else 2)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "weight": torch.ones(LARGE[2])},
        {"softcap": 5.0},
        {"dtype": torch.float64},
        {"rows": 40},
        {"dims": 1537},
        {"rows": 1000, "classes": 400},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_the_kernel_is_not_for(calls, options):
    options = dict(options)
    rows, classes = options.pop("rows", 200), options.pop("classes", LARGE[2])
    dims, dtype = options.pop("dims", 40), options.pop("dtype", torch.float32)
    leaves, target, _, _ = problem((rows, dims, classes, 64))
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    PF.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], **options).backward()
    assert not calls


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_that_is_not_finite_is_what_eager_makes_it(calls, reduction):
    leaves, target, _, _ = problem(LARGE)
    leaves[0].data[150, 3] = torch.inf
    expected = eager(leaves, target, reduction=reduction)
    x, w, b = leaves
    loss = PF.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    for got, e in zip([loss.detach(), *grads], expected):
        torch.testing.assert_close(got, e, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert all(found is None for found in calls)


def test_arguments_that_do_not_fit_are_refused():
    f = torch.zeros
    good = {
        "loss": f(4), "stats": f(3, 4), "d_input": f(4, 8), "d_weight": f(5, 8), "d_bias": f(5), "logits": f(5, 48),
        "input": f(4, 8), "weight": f(5, 8), "bias": f(5), "target": f(4, dtype=torch.int64),
        "row_ids": f(4, dtype=torch.int32), "class_ids": f(5, dtype=torch.int32), "upstream": f(4),
    }  # fmt: skip
    _C.linear_cross_entropy(*good.values(), 0.0, 0.0, 32, 1)
    wrong = {
        "loss": f(3), "stats": f(2, 4), "d_input": f(4, 9), "d_weight": f(8, 5).t(), "d_bias": f(4), "logits": f(5, 16),
        "input": f(4, 8, dtype=torch.float64), "weight": f(5, 7), "bias": f(4), "target": f(4),
        "row_ids": None, "class_ids": f(5, dtype=torch.int64), "upstream": f(5),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name not in ("stats", "class_ids") else None):
            _C.linear_cross_entropy(*(good | {name: value}).values(), 0.0, 0.0, 32, 1)
    for rows in (0, -32, 40):  # 40: not whole vectors
        with pytest.raises(ValueError, match="rows"):
            _C.linear_cross_entropy(*good.values(), 0.0, 0.0, rows, 1)
    with pytest.raises(ValueError, match="logits"):  # needed for gradients
        _C.linear_cross_entropy(*(good | {"logits": None}).values(), 0.0, 0.0, 32, 1)
