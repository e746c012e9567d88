"""cross_entropy beyond the case table: bugs found in other implementations, errors, extremes, in-place, determinism."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import check, max_error
from conftest import INTERPRETED

import pyfused
import pyfused.functional as PF
from pyfused import nn as pnn

LAYOUTS = [(6, 5), (6, 50), (6, 100), (2, 5, 4)]  # gathered, backward by row, by row, class stride not 1


@pytest.fixture
def isa(isa):
    """Each instruction set of the CPU backend; skipped without a compiled module."""
    with pyfused.use_backend("cpu"):
        yield isa


def problem(shape, dtype=torch.float32, seed=0, scale=2.0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * scale).to(device, dtype).requires_grad_()
    return x, torch.randint(shape[1], (shape[0], *shape[2:]), generator=g).to(device)


def gradient(loss, x, *upstream):
    return torch.autograd.grad(loss, x, *upstream, retain_graph=True)[0]


# --- The elementary functions, seen through the op: relative errors in units in the last place, against long double
@pytest.mark.parametrize("dtype, lowest", [(torch.float32, -87.0), (torch.float64, -700.0)])
def test_exp_log1p_and_tanh_are_within_2_ulp(isa, dtype, lowest):
    n = 20000
    g = torch.Generator().manual_seed(0)
    z = torch.zeros(n, 2, dtype=dtype)
    z[:, 1] = torch.rand(n, generator=g, dtype=torch.float64) * lowest
    z.requires_grad_()
    target = torch.zeros(n, dtype=torch.int64)
    loss, lse = PF.cross_entropy(z, target, reduction="none", return_lse=True)
    e = np.exp(z[:, 1].detach().numpy().astype(np.longdouble))
    assert ulps(gradient(lse.sum(), z)[:, 1], e / (1 + e)) < 2
    assert ulps(loss, np.log1p(e)) < 2
    x = ((torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.5) * torch.logspace(-6, 1.5, n).unsqueeze(1)).to(dtype)
    _, capped = PF.cross_entropy(x, target, return_lse=True, softcap=1.0)  # of one class: the logit itself
    assert ulps(capped, np.tanh(x[:, 0].numpy().astype(np.longdouble))) < 2


def ulps(got: torch.Tensor, truth) -> float:
    error = np.abs(got.detach().numpy().astype(np.longdouble) - truth) / np.abs(truth)
    return float(np.nanmax(error)) / torch.finfo(got.dtype).eps


# --- Confident rows
@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("classes", [3, 64])
@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0, 80.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gradient_of_a_confident_row_is_kept(variant, kind, classes, margin):
    """Past 16.6 nats float32 eager has p_t = 1 and a gradient of exactly 0."""
    x = torch.zeros(2, classes, dtype=kind)
    x[:, 1] = margin
    x.requires_grad_()
    target = torch.tensor([1, 1])
    got = gradient(PF.cross_entropy(x.to(variant), target.to(variant), reduction="sum"), x)
    # (p_t - 1), which float64 arithmetic loses too, only later
    others = (classes - 1) * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    rtol = 2e-6 if kind == torch.float32 else torch.finfo(kind).eps / 2
    torch.testing.assert_close(got[:, 1].double(), (-others / (1 + others)).expand(2), rtol=rtol, atol=0)


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("classes", [3, 64, 3000])
@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0])
def test_gradient_of_lse_at_an_improbable_label_is_kept(variant, classes, margin):
    """It is p_t, which 1 + (p_t - 1) would round to a multiple of 6e-8."""
    x = torch.zeros(2, classes)
    x[:, 1] = -margin
    x.requires_grad_()
    _, lse = PF.cross_entropy(x.to(variant), torch.tensor([1, 1]).to(variant), reduction="none", return_lse=True)
    got = gradient(lse.sum(), x)
    truth = torch.softmax(x.detach().double(), 1)
    torch.testing.assert_close(got[:, 1].double(), truth[:, 1], rtol=2e-6, atol=0)


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("classes", [300, 3000, 30000])
@pytest.mark.parametrize("classes_adjacent", [True, False])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["hard", "smooth"])
def test_many_small_terms_beside_a_large_one(variant, options, classes_adjacent, classes):
    """Each is less than half a unit in the last place of the largest, together they are many."""
    x = torch.zeros(2, classes)
    x[:, 3] = 17.5
    given = (x if classes_adjacent else x.t().contiguous().t()).to(variant)
    target = torch.tensor([5, 6])
    got = PF.cross_entropy(given, target.to(variant), reduction="none", **options).cpu()
    truth, eager = (F.cross_entropy(y, target, reduction="none", **options) for y in (x.double(), x))
    check(got, truth, eager, max_error(eager, truth), 0.0, "loss")


# --- Rows of several blocks (2048 classes on the CPU): each starts with the maximum of those before it
def ascending(row, block):
    row += torch.arange(len(row)) // block * 5


def falling(row, block):
    row -= torch.arange(len(row)) // block * 5


def masked_first(row, block):
    row[: block + 3] = -torch.inf


def masked_last(row, block):
    row[-block - 3 :] = -torch.inf


@pytest.mark.parametrize("change", [ascending, falling, masked_first, masked_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("classes", [4095, 4096, 4099, 6150, 9000])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"label_smoothing": 0.1}, {"soft": True}], ids=str)
def test_rows_of_several_blocks(isa, classes, change, options):
    x, target = problem((4, classes))
    target[:] = torch.tensor([0, classes // 2, classes - 1, 2050])
    options = dict(options)
    if options.pop("soft", False):
        target = torch.rand(4, classes, generator=torch.Generator().manual_seed(1)).softmax(1)
    with torch.no_grad():
        for row in x:
            change(row, 2048)
        if "label_smoothing" in options or target.dim() == 2:  # every class counts: -inf would make the loss infinite
            x.clamp_(min=-30)
        elif target.dim() == 1:
            x[torch.arange(4), target] = 1.0
    exact = x.detach().double().requires_grad_()
    z = options["softcap"] * torch.tanh(exact / options["softcap"]) if "softcap" in options else exact
    wide = target if target.dim() == 1 else target.double()
    expected = F.cross_entropy(z, wide, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    loss, lse = PF.cross_entropy(x, target, reduction="none", return_lse=True, **options)
    # 16 roundings of float32, for up to 9000 terms and 4 changes of the maximum
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), torch.logsumexp(z, 1), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient(loss.sum(), x).double(), gradient(expected.sum(), exact), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 2047, 2048, 8999])
def test_rows_of_several_blocks_that_are_not_finite(isa, bad, at):
    x, target = problem((2, 9000))
    with torch.no_grad():
        x[0, at] = bad
        x[1] = -torch.inf
    for given in (target, F.one_hot(target, 9000).float()):
        loss, lse = PF.cross_entropy(x, given, reduction="none", return_lse=True)
        assert loss.isnan().all() and (lse[0].isnan() or lse[0] == bad)
        assert gradient(loss.sum(), x).isnan().all()
    ignored = torch.full((2,), -100)  # where no label's logit makes it NaN; in float64 the logarithm would not either
    _, lse = PF.cross_entropy(x.double(), ignored, reduction="none", return_lse=True)
    assert lse[1].isnan()


def test_loss_of_a_confident_row_is_kept():
    x = torch.zeros(1, 64)
    x[0, 5] = 40.0
    exact = torch.log1p(63 * torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
    torch.testing.assert_close(PF.cross_entropy(x, torch.tensor([5])).double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_a_common_offset_loses_no_digits(variant, shape):
    """lse = 30000.7 has 2e-3 between neighbours in float32; maximum and sum are saved apart."""
    x, target = problem(shape, device=variant)
    x = (x.detach() * 64).round().div(64).requires_grad_()  # so that the sum below is exact
    shifted = (x.detach() + 30000).requires_grad_()
    torch.testing.assert_close(
        gradient(PF.cross_entropy(shifted, target), shifted), gradient(PF.cross_entropy(x, target), x), rtol=0, atol=0
    )


# --- Upstream gradients, other users of the logits; second backwards and expanded upstream gradients: test_backward.py
@pytest.mark.parametrize("shape", LAYOUTS)
def test_an_auxiliary_loss_on_the_same_logits(variant, shape):
    """Its gradient is of the logits themselves, whatever was done to them for ours."""
    x, target = problem(shape, device=variant)
    logits = x * 1
    ours = gradient(PF.cross_entropy(logits, target) + logits.square().sum(), x)
    logits = x * 1
    torch.testing.assert_close(ours, gradient(F.cross_entropy(logits, target) + logits.square().sum(), x))


# --- In place
@pytest.mark.parametrize("shape", [*LAYOUTS, (2, 5, 3, 4), (40, 10), (40, 21), (3000, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_writes_the_gradient_over_the_logits(variant, shape, dtype):
    if INTERPRETED and shape == (3000, 10):
        pytest.skip("half a minute in the interpreter, for the tiles of (40, 10)")
    x, target = problem(shape, dtype, device=variant)
    expected = gradient(PF.cross_entropy(x, target), x)
    logits = x * 1
    memory = logits.data_ptr()
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    seen = []
    loss = PF.cross_entropy(logits, target, inplace=True)
    loss.backward()
    assert seen == [memory]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("classes", [10, 21, 50])
def test_inplace_leaves_what_lies_between_the_rows(isa, classes):
    """Whole vectors are written where a row is shorter, over the next row, which is still to come; not over gaps."""
    x, target = problem((40, classes + 3))
    target.remainder_(classes)
    memory = x * 1
    before = memory.detach().clone()
    logits = memory[:, 2:-1]
    expected = gradient(PF.cross_entropy(logits, target), logits)
    PF.cross_entropy(logits, target, inplace=True).backward()
    assert torch.equal(logits, expected)
    for gap in (slice(0, 2), slice(-1, None)):
        assert torch.equal(memory[:, gap], before[:, gap])


def test_inplace_second_backward_raises():
    x, target = problem((6, 50))
    loss = PF.cross_entropy(x * 1, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_makes_other_users_of_the_logits_raise():
    x, target = problem((6, 50))
    logits = x * 1
    other = logits.square().sum()  # saves the logits
    PF.cross_entropy(logits, target, inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_refuses_leaves_and_expanded_tensors():
    x, target = problem((6, 50))
    with pytest.raises(RuntimeError, match="leaf"):
        PF.cross_entropy(x, target, inplace=True)
    with pytest.raises(RuntimeError, match="leaf"):
        PF.cross_entropy(x[1:], target[1:], inplace=True)
    with pytest.raises(RuntimeError, match="expanded"):
        PF.cross_entropy((x[:1] * 1).expand(6, 50), target, inplace=True)
    with torch.no_grad():
        before = x.clone()
        PF.cross_entropy(x, target, inplace=True)
    assert torch.equal(x, before)


# --- Bad input
@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("bad", [-1, -101, 10**9, 2**40])
def test_label_out_of_range_names_row_and_value(shape, bad):
    """Elsewhere: out-of-bounds reads, a loss of 0 or inf, or the next row's loss and gradient corrupted."""
    x, target = problem(shape)
    target.view(-1)[4] = bad
    before = x.detach().clone()
    with pytest.raises(IndexError, match=rf"target {bad} is out of bounds.*\[4\].*{shape[1]}"):
        PF.cross_entropy(x, target)
    assert torch.equal(x, before)


def test_label_equal_to_the_number_of_classes():
    with pytest.raises(IndexError, match="target 5"):
        PF.cross_entropy(torch.zeros(3, 5), torch.tensor([5, 0, 0]))


@pytest.mark.parametrize(
    "shape, target, options",
    [
        ((4, 5), torch.zeros(3, dtype=torch.int64), {}),
        ((4, 5), torch.zeros(4, 1, dtype=torch.int64), {}),
        ((4, 5), torch.zeros(4, dtype=torch.int32), {}),
        ((4, 5), torch.zeros(4), {}),
        ((4, 5), torch.zeros(4, 5, dtype=torch.int64), {}),
        ((4, 5, 2), torch.zeros(4, 3, dtype=torch.int64), {}),
        ((4, 5, 2), torch.zeros(4, 2, dtype=torch.uint8), {}),
        ((), torch.tensor(0), {}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(4)}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(5, dtype=torch.float64)}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"reduction": "average"}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"label_smoothing": 1.5}),
        ((4, 5), torch.full((4, 5), 0.2), {"ignore_index": 0}),
    ],
)
def test_errors_are_eagers(shape, target, options):
    x = torch.randn(shape)
    with pytest.raises(Exception) as eager:
        F.cross_entropy(x, target, **options)
    with pytest.raises(type(eager.value)) as ours:
        PF.cross_entropy(x, target, **options)
    assert str(eager.value) in str(ours.value)


def test_softcap_must_be_positive():
    with pytest.raises(ValueError, match="softcap must be positive"):
        PF.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), softcap=-1.0)


def test_uint8_labels(variant):
    x, target = problem((6, 50), device=variant)
    assert torch.equal(PF.cross_entropy(x, target.byte()), PF.cross_entropy(x, target))


# --- Edges
@pytest.mark.parametrize("shape", LAYOUTS)
def test_nan_in_an_ignored_row_poisons_nothing(variant, shape):
    """Unlike eager, whose gradient of an ignored row is NaN where its logits are: 0 x NaN."""
    if pyfused.dispatch._forced == "reference":
        pytest.skip("eager")
    x, target = problem(shape, device=variant)
    row = torch.zeros(target.shape, dtype=torch.bool, device=variant)
    row.view(-1)[2] = True
    target[row] = -100
    x.data.movedim(1, -1)[row] = torch.nan
    loss = PF.cross_entropy(x, target)
    assert loss.isfinite()
    grad = gradient(loss, x)
    assert grad.isfinite().all() and not grad.movedim(1, -1)[row].any()


@pytest.mark.parametrize("shape", [(300, 17), (300, 64), (3, 17, 100)])
def test_fp16_under_loss_scaling_keeps_its_gradient(variant, shape):
    """Softmax minus target, divided by the rows and stored in fp16 before the loss scale is applied, is often 0."""
    x, target = problem(shape, torch.float16, scale=4.0, device=variant)
    scaled = gradient(PF.cross_entropy(x, target), x, torch.tensor(1024.0, dtype=torch.float16, device=variant))
    exact = x.detach().double().requires_grad_()
    truth = gradient(F.cross_entropy(exact, target) * 1024, exact)
    torch.testing.assert_close(scaled.double(), truth, rtol=2e-3, atol=1e-7)


def test_16_bit_losses_are_computed_in_float32():
    x, target = problem((64, 1000), torch.bfloat16)
    loss = PF.cross_entropy(x, target)
    exact = F.cross_entropy(x.double(), target)
    assert loss.dtype == torch.bfloat16 and loss == exact.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_float32(dtype):
    x, target = problem((6, 50), dtype)
    weight = torch.rand(50)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = PF.cross_entropy(x, target, weight), F.cross_entropy(x, target, weight)
    assert ours.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(gradient(ours, x), gradient(eager, x))


@pytest.mark.parametrize("shape", [(3000, 10), (300, 1000), (3, 33000), (2, 21, 40, 50)])
def test_same_bits_on_any_number_of_threads(shape):
    x, target = problem(shape)
    before = torch.get_num_threads()
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = PF.cross_entropy(x, target)
        seen.append((loss.detach(), gradient(loss, x)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_gradients_of_probabilities_and_their_weights():
    x, _ = problem((6, 5))
    target = torch.rand(6, 5, requires_grad=True)
    weight = torch.rand(5, requires_grad=True)
    ours = torch.autograd.grad(PF.cross_entropy(x, target, weight), (x, target, weight))
    eager = torch.autograd.grad(F.cross_entropy(x, target, weight), (x, target, weight))
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_lse_is_the_softmax(variant):
    x, target = problem((6, 50), device=variant)
    target[:] = -100  # ignored rows have a log-sum-exp all the same
    _, lse = PF.cross_entropy(x, target, return_lse=True)
    torch.testing.assert_close(gradient(lse.sum(), x), x.softmax(1))


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_of_masked_classes(variant, softcap):
    """-inf becomes -softcap, a finite logit, as the formula says; lanes past the last class must not."""
    x, target = problem((6, 43), device=variant)
    x.data[:, 40:] = -torch.inf
    expected = F.cross_entropy(softcap * torch.tanh(x / softcap), target)
    torch.testing.assert_close(PF.cross_entropy(x, target, softcap=softcap), expected)


def test_dense_strides_that_do_not_collapse(variant):
    """(N, C, H, W) with H and W swapped in memory: positions are no single dimension, so the logits are copied once."""
    x = torch.randn(2, 5, 3, 4, device=variant).transpose(2, 3).requires_grad_()
    target = torch.randint(5, (2, 4, 3), device=variant)
    torch.testing.assert_close(PF.cross_entropy(x, target), F.cross_entropy(x, target))
    torch.testing.assert_close(gradient(PF.cross_entropy(x, target), x), gradient(F.cross_entropy(x, target), x))


def test_expanded_logits(variant):
    x = torch.randn(1, 50, device=variant, requires_grad=True)
    target = torch.randint(50, (6,), device=variant)
    wide = x.expand(6, 50)
    torch.testing.assert_close(gradient(PF.cross_entropy(wide, target), x), gradient(F.cross_entropy(wide, target), x))


def test_offsets_beyond_32_bits():
    """Two rows 2^31 elements apart; the 4 GiB in between are never touched and so take no memory."""
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 50), (2**31, 1))
    x.copy_(torch.randn(2, 50))
    target = torch.tensor([3, 7])
    torch.testing.assert_close(PF.cross_entropy(x, target), F.cross_entropy(x.contiguous(), target))


def test_module():
    x, target = problem((6, 50))
    weight = torch.rand(50)
    ours = pnn.CrossEntropyLoss(weight, label_smoothing=0.1, z_loss=0.01, softcap=3.0)
    eager = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert ours.state_dict().keys() == eager.state_dict().keys()
    expected = PF.cross_entropy(x, target, weight, label_smoothing=0.1, z_loss=0.01, softcap=3.0)
    assert torch.equal(ours(x, target), expected)
    torch.testing.assert_close(pnn.CrossEntropyLoss(weight)(x, target), F.cross_entropy(x, target, weight))
