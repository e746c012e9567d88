"""linear_cross_entropy beyond the case table: memory, precision, errors, the module."""

import pytest
import torch
import torch.nn.functional as F

import pyfused.functional as PF
from pyfused import nn as pnn
from pyfused.ops import linear_cross_entropy as page


def problem(rows=9, dim=8, classes=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(classes, dim, generator=g) * 0.5).to(dtype).requires_grad_()
    b = torch.randn(classes, generator=g).to(dtype).requires_grad_()
    return x, w, b, torch.randint(classes, (rows,), generator=g)


def test_fp16_under_loss_scaling_keeps_its_gradient(variant):
    """p is 1.2e-4 but at the label: divided by the rows before the loss scale is applied, fp16 has a digit left."""
    target = torch.arange(64) % 16
    given = [torch.eye(16)[target] * 3, torch.eye(16) * 3]
    scaled, exact = ([t.to(dtype).requires_grad_() for t in given] for dtype in (torch.float16, torch.float64))
    loss = PF.linear_cross_entropy(*(t.to(variant) for t in scaled), target.to(variant))
    got = torch.autograd.grad(loss, scaled, torch.tensor(1024.0, dtype=torch.float16, device=variant))
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target) * 1024, exact)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=4e-3, atol=1e-7)


def test_only_the_gradients_asked_for():
    x, w, b, target = problem()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), (x, w, b))
    for i, wanted in enumerate((x, w, b)):
        given = [t if t is wanted else t.detach() for t in (x, w, b)]
        loss = PF.linear_cross_entropy(given[0], given[1], target, linear_bias=given[2])
        torch.testing.assert_close(torch.autograd.grad(loss, wanted)[0], expected[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_agree_with_all_rows_at_once(dtype):
    x, w, b, target = problem(rows=10, dtype=dtype)
    target[3] = -100
    args = (x.detach(), w.detach(), b.detach(), target, None, [True] * 3, 1, -100, 0.1, 0.01, 0.0)
    whole = page.run_forward(page.all_rows(*args[:2]), *args)
    for rows in (1, 3, 5, 9):
        for a, e in zip(page.run_forward(x.new_empty(rows, 50), *args), whole):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weight_gradients_accumulate_in_float32(dtype):
    """2000 chunks of one row: summed in bfloat16, additions of less than 1/256 of the sum would be lost."""
    x, w, b, target = problem(rows=2000, dtype=dtype)
    args = (x.detach(), w.detach(), b.detach(), target, None, [True] * 3, 2, -100, 0.0, 0.0, 0.0)
    *_, d_weight, d_bias = page.run_forward(x.new_empty(1, 50), *args)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target, reduction="sum"), exact)
    assert d_weight.dtype == d_bias.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for got, t in zip((d_weight, d_bias), truth[1:]):
        assert (got - t).abs().max() < 2 * torch.finfo(dtype).eps * t.abs().max()


def test_fp16_mean_over_many_rows_does_not_underflow():
    x, w, b, target = problem(rows=4096, dtype=torch.float16)
    loss = PF.linear_cross_entropy(x, w, target, linear_bias=b)
    (got,) = torch.autograd.grad(loss.float() * 4096, b)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target) * 4096, exact)[2]
    torch.testing.assert_close(got.double(), truth, rtol=5e-3, atol=5e-3 * truth.abs().max().item())


def test_memory_is_a_chunk_not_all_logits():
    """The largest tensors alive at once, counted by the profiler: logits of all rows would be 100 MB."""
    x, w, b, target = problem(rows=2500, dim=4, classes=10000)
    del b
    with torch.profiler.profile(profile_memory=True) as profile:
        PF.linear_cross_entropy(x, w, target).backward()
    largest = max((e.cpu_memory_usage for e in profile.events()), default=0)
    assert largest < 25e6, f"{largest} bytes at once"


def test_no_gradient_wanted_no_gradient_made():
    x, w, b, target = problem()
    with torch.no_grad():
        args = (x, w, b, target, None, [False] * 3, 1, -100, 0.0, 0.0, 0.0)
        _, _, _, *grads = torch.ops.pyfused.linear_cross_entropy(*args)
    assert all(g.numel() == 0 for g in grads)


@pytest.mark.parametrize("bad", [-1, 50])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_out_of_range(bad, reduction):
    x, w, b, target = problem()
    target[4] = bad
    with pytest.raises(IndexError, match=f"target {bad} is out of bounds"):
        PF.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_out_of_range_in_a_later_chunk(reduction):
    """Its position is that in the whole target."""
    x, w, b, target = problem(rows=770, classes=9001)
    target[700] = 9001
    with pytest.raises(IndexError, match=r"target 9001 is out of bounds: target\[700\] must lie in \[0, 9001\)"):
        PF.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)


def test_bad_class_weights_and_labels_raise_what_eager_raises():
    x, w, b, target = problem()
    for options in ({"weight": torch.ones(3)}, {"reduction": "average"}, {"label_smoothing": 2.0}):
        with pytest.raises(Exception) as eager:
            F.cross_entropy(F.linear(x, w, b), target, **options)
        with pytest.raises(type(eager.value)) as ours:
            PF.linear_cross_entropy(x, w, target, linear_bias=b, **options)
        assert str(eager.value) in str(ours.value)


def test_autocast():
    x, w, b, target = problem(rows=64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = PF.linear_cross_entropy(x, w, target, linear_bias=b)
        eager = F.cross_entropy(F.linear(x, w, b), target)
    assert ours.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(ours, w)[0].dtype == torch.float32


def test_k_dimensional_loss():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=g, requires_grad=True)
    w = torch.randn(5, 2, 2, 3, generator=g, requires_grad=True)
    target = torch.randint(5, (4, 2, 2), generator=g)
    expected = F.cross_entropy(F.linear(x, w.reshape(-1, 3)).reshape(4, 5, 2, 2), target)
    torch.testing.assert_close(PF.linear_cross_entropy(x, w, target), expected)


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch.nn.LinearCrossEntropyLoss: torch >= 2.13"
)
@pytest.mark.parametrize("options", [{}, {"bias": True, "label_smoothing": 0.1}, {"out_features": (2,), "bias": True}])
def test_module(options):
    torch.manual_seed(0)
    eager = torch.nn.LinearCrossEntropyLoss(8, 50, **options)
    ours = pnn.LinearCrossEntropyLoss(8, 50, **options)
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(6, 8)
    target = torch.randint(50, (6, *options.get("out_features", ())))
    torch.testing.assert_close(ours(x, target), eager(x, target))
    with pytest.raises(RuntimeError, match="weight"):
        pnn.LinearCrossEntropyLoss(8, 50, weight=torch.ones(3))


# --- Blocks of classes, whatever the CPU would choose
def by_classes(x, w, b, target, *, class_weights=None, reduction=1, z_loss=0.0, softcap=0.0):
    """(loss, d_input, d_weight, d_bias) from the CPU backend's blocks of classes, for upstream gradients of 1."""
    cpu = pytest.importorskip("pyfused.backends.cpu.linear_cross_entropy")
    given = (x.detach(), w.detach(), b.detach(), target, class_weights)
    done = cpu._forward_by_classes(*given, [True] * 3, reduction, -100, 0.0, z_loss, softcap)
    if done is None or reduction != 0:
        return done and (done[0], *done[3:])
    upstream = torch.ones(len(x), dtype=done[0].dtype)
    return done[0], *cpu._backward_by_classes(upstream, *given, done[2], [True] * 3, -100, 0.0, z_loss, softcap)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01, "softcap": 3.0, "class_weights": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_of_classes_agree_with_eager(dtype, options, reduction, monkeypatch):
    cpu = pytest.importorskip("pyfused.backends.cpu.linear_cross_entropy")
    monkeypatch.setattr(cpu, "_BLOCK", 1)  # 256 classes: two whole blocks and a part
    x, w, b, target = problem(rows=40, classes=600, dtype=dtype)
    target[3] = -100
    weights = torch.rand(600, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.1
    options = {**options, "class_weights": weights if options else None}
    got = by_classes(x, w, b, target, reduction=reduction, **options)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    options["weight"] = options.pop("class_weights")
    options |= {"weight": weights.double()} if options["weight"] is not None else {}
    options |= {"linear_bias": exact[2], "reduction": page.ce.REDUCTIONS[reduction]}
    loss = page.reference(*exact[:2], target, **options)
    truth = (loss, *torch.autograd.grad(loss.sum(), exact))
    for g, t in zip(got, truth, strict=True):
        # The logits are rounded to bfloat16 first, as they are in eager.
        tolerance = 16 * torch.finfo(dtype).eps * t.abs().max().item()
        torch.testing.assert_close(g.double(), t, rtol=0, atol=tolerance)


def test_blocks_of_classes_keep_a_confident_rows_loss():
    """The label's logit is 30 above all others': 1 - p rounds to 0, the loss is 599 e^-30."""
    x, w, b = torch.zeros(4, 8), torch.zeros(600, 8), torch.zeros(600)
    b[599] = 30.0
    loss, _, _, d_bias = by_classes(x, w, b, torch.full((4,), 599), reduction=2)
    expected = 4 * 599 * torch.exp(torch.tensor(-30.0))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(d_bias[599], -expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_blocks_of_classes_leave_nan_and_blocks_of_inf_to_the_rows(bad, monkeypatch):
    cpu = pytest.importorskip("pyfused.backends.cpu.linear_cross_entropy")
    monkeypatch.setattr(cpu, "_BLOCK", 1)
    monkeypatch.setattr(cpu, "_by_classes", lambda *args: True)
    x, w, b, target = problem(rows=40, classes=600)
    b = b.detach().clone()
    b[256:512] = bad
    target[:] = 3
    assert by_classes(x, w, b, target) is None
    loss = PF.linear_cross_entropy(x.detach(), w.detach(), target, linear_bias=b)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), target).detach(), equal_nan=True)


def test_blocks_of_classes_are_chosen(monkeypatch):
    cpu = pytest.importorskip("pyfused.backends.cpu.linear_cross_entropy")
    target = torch.zeros(1900, dtype=torch.int64)
    for dtype, fast, with_grads, expected in (
        (torch.float32, False, False, True),
        (torch.float32, True, True, False),
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, False, True, False),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        x, w = torch.empty(1900, 4, dtype=dtype), torch.empty(9001, 4, dtype=dtype)
        assert cpu._by_classes(cpu._chunk(x, w), x, target, 0.0, with_grads) == expected
    small = torch.empty(16, 4), torch.empty(100, 4)
    assert not cpu._by_classes(cpu._chunk(*small), small[0], target[:16], 0.0, False)


@pytest.mark.parametrize("bad", [-1, 600])
def test_blocks_of_classes_name_a_label_out_of_range(bad):
    x, w, b, target = problem(rows=40, classes=600)
    target[7] = bad
    with pytest.raises(IndexError, match=rf"target {bad} is out of bounds: target\[7\]"):
        by_classes(x, w, b, target)
