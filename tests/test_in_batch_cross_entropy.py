"""in_batch_cross_entropy beyond the case table: the correction's sign, the mask, memory, exact sums, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, max_error
from cases import IN_BATCH_CROSS_ENTROPY
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused.functional as PF
from pyfused import dispatch
from pyfused.backends.cpu import in_batch_cross_entropy as cpu
from pyfused.ops import in_batch_cross_entropy as page


def problem(batch=40, users=9, items=12, dim=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    user, item = (torch.randint(n, (batch,), generator=g) for n in (users, items))
    tables = [torch.randn(n, dim, generator=g).to(dtype).requires_grad_() for n in (users, items)]
    return user, item, *tables


def test_log_q_makes_the_sampled_softmax_unbiased():
    """Of 3 items, one is drawn as a negative 8 times as often. With log q subtracted the loss is that of the softmax
    over the three items, up to the row's own log q; uncorrected, or with the other sign, it is not."""
    item = torch.tensor([0] * 8 + [1, 2])
    q = torch.tensor([0.8] * 8 + [0.1, 0.1])
    score = torch.tensor([[0.3, -1.0, 0.9]])
    user, user_weight, item_weight = torch.zeros(10, dtype=torch.int64), torch.ones(1, 1), score.t().contiguous()
    options = {"mask_accidental_hits": False, "reduction": "none"}
    corrected = PF.in_batch_cross_entropy(user, item, user_weight, item_weight, log_q=q.log(), **options)
    # -log of (e^s / q) over the sum over columns of e^s / q; every item has 10 q columns, so the sum is 10 ∑ e^s
    expected = F.cross_entropy(score.expand(10, 3), item, reduction="none") + q.log() + math.log(10)
    torch.testing.assert_close(corrected, expected)
    for wrong in (None, -q.log()):
        other = PF.in_batch_cross_entropy(user, item, user_weight, item_weight, log_q=wrong, **options)
        assert (other - expected).abs().max() > 0.1


def test_popular_items_are_pushed_down_less_with_log_q():
    """The correction lowers the probability, and so the downward gradient, of a negative that is drawn often."""
    user, item = torch.tensor([0, 0]), torch.tensor([0, 1])
    user_weight, item_weight = torch.ones(1, 1), torch.zeros(2, 1, requires_grad=True)

    def push(q):
        log_q = torch.tensor([0.5, q]).log()
        loss = PF.in_batch_cross_entropy(user, item, user_weight, item_weight, log_q=log_q, reduction="none")
        return torch.autograd.grad(loss[0], item_weight)[0][1].item()

    assert push(0.9) < push(0.1) and push(0.1) == pytest.approx(1 / 0.1 / (1 / 0.5 + 1 / 0.1))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_mask_kernel(isa, dtype, ids):
    from pyfused import _C

    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    before = _C.isa()
    _C.set_isa(isa)
    try:
        for batch, first, rows in ((1, 0, 1), (63, 60, 3), (64, 0, 64), (65, 1, 64), (200, 70, 130), (5000, 4900, 100)):
            item = torch.randint(max(batch // 3, 1), (batch,)).to(ids)
            if ids == torch.int64:
                item += 1 << 40  # differ in the low half only
                item[::7] += 1 << 32  # and in the high half only
            scores = torch.randn(rows, batch, dtype=dtype)
            scores[0, -1] = torch.nan
            expected = scores.clone()
            for r in range(rows):
                hit = item == item[first + r]
                hit[first + r] = False
                expected[r, hit] = -torch.inf
            _C.mask_accidental_hits(scores, item, first, 2)
            assert torch.equal(scores.nan_to_num(9), expected.nan_to_num(9))
    finally:
        _C.set_isa(before)


def test_mask_kernel_checks_what_it_is_given():
    from pyfused import _C

    scores, item = torch.zeros(2, 5), torch.zeros(5, dtype=torch.int64)
    for bad in ((scores.t(), item, 0), (scores.half(), item, 0), (scores, item[:4], 0), (scores, item.float(), 0)):
        with pytest.raises(ValueError):
            _C.mask_accidental_hits(*bad, 1)
    for first in (-1, 4):
        with pytest.raises(ValueError, match="first"):
            _C.mask_accidental_hits(scores, item, first, 1)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any PyTorch operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_the_full_matrix_is_never_stored(reduction):
    """The kernels are called past the dispatcher, which would hide from the mode what they allocate."""
    batch, dim = 4096, 16
    tensors = [x.detach() for x in problem(batch, 500, 700, dim)]
    options = ([True, True, False, False], 1.0, True, reduction)
    run = {name: dispatch.TABLE[f"in_batch_cross_entropy{name}"]["cpu"].run for name in ("", "_backward")}
    with Largest() as largest:
        loss, *saved = run[""](*tensors, None, None, *options)
        run["_backward"](torch.ones_like(loss), *tensors, None, None, *saved, *options)
    assert 96 * batch <= largest.elements <= 128 * batch  # seen at all, so the mode does look inside
    with Largest() as largest:
        page.reference(*tensors)
    assert largest.elements == batch * batch


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 65, 512, 513, 5000, 100_000])
def test_chunks_cover_the_batch_in_equal_parts(batch):
    rows, columns = cpu._chunk(torch.empty(1, 1), batch).shape
    chunks = -(-batch // rows)
    assert columns == batch and 1 <= rows <= max(128, (1 << 19) // batch) and rows * chunks - batch < chunks


def test_the_cases_called_chunks_have_several():
    for case in IN_BATCH_CROSS_ENTROPY:
        table = case.arguments(case.dtypes[0])["user_weight"]
        batch = len(case.arguments(case.dtypes[0])["user"])
        rows = len(cpu._chunk(table, batch))
        assert (rows < batch and batch % rows != 0) == case.name.startswith("chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_accidental_hits", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_large_batch_goes_to_the_kernel(isa, dtype, mask_accidental_hits, reduction, monkeypatch):
    """Against float64: 300 items, so a few hits a row. bfloat16's gradients are rounded once, by 2^-9."""
    if isa == "baseline":
        pytest.skip("the BLAS may have vectors that baseline has not")
    calls, run = [], cpu.linear.run_kernel
    monkeypatch.setattr(cpu.linear, "run_kernel", lambda *args: calls.append(run(*args)) or calls[-1])
    batch = 512 * torch.get_num_threads() + 77
    user, item, *tables = problem(batch, 90, 300, 24, dtype)
    leaves = [*tables, torch.randn(300).to(dtype).requires_grad_(), torch.rand(batch).log().requires_grad_()]
    results = []
    for function, wide in ((PF.in_batch_cross_entropy, False), (page.reference, True)):
        u, v, bias, log_q = (t.detach().double().requires_grad_() for t in leaves) if wide else leaves
        options = {"scale": 1.3, "mask_accidental_hits": mask_accidental_hits, "reduction": reduction}
        loss = function(user, item, u, v, bias, log_q=log_q, **options)
        results.append([loss, *torch.autograd.grad(loss.sum(), (u, v, bias, log_q))])
    for got, truth in zip(*results):
        scale = truth.detach().abs().max().item()
        torch.testing.assert_close(
            got.double(), truth, rtol=1e-4, atol=scale * (2**-8 if got.dtype == torch.bfloat16 else 1e-5)
        )
    assert len(calls) == (2 if reduction == "none" else 1) and None not in calls


@pytest.mark.parametrize("items", [3, 300])
@pytest.mark.parametrize("mask_accidental_hits", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_sums_in_float64(items, mask_accidental_hits, reduction):
    """Hundreds of terms that cancel; in float64 eager rounds as often, so a few times its own rounding is allowed."""
    user, item, *tables = problem(901, 90, items, 16, torch.float64)
    bias, log_q = torch.randn(items, dtype=torch.float64), torch.rand(901, dtype=torch.float64).log()
    leaves = [t.requires_grad_() for t in (*tables, bias, log_q)]
    results = []
    for function in (PF.in_batch_cross_entropy, page.reference):
        options = {"mask_accidental_hits": mask_accidental_hits, "reduction": reduction}
        loss = function(user, item, *tables, bias, log_q=log_q, **options)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, leaves, upstream)))
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=100 * torch.finfo(torch.float64).eps * scale)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_gives_the_same(reduction):
    user, item, *tables = problem()
    loss = PF.in_batch_cross_entropy(user, item, *tables, reduction=reduction)
    upstream = torch.full(loss.shape, 3.0)
    first = [g.clone() for g in torch.autograd.grad(loss, tables, upstream, retain_graph=True)]
    for a, b in zip(first, torch.autograd.grad(loss, tables, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_asked_for(reduction):
    user, item, *tables = problem()
    g = torch.Generator().manual_seed(1)
    bias, log_q = (torch.randn(shape, generator=g).requires_grad_() for shape in ((12, 1), (40,)))
    every = [*tables, bias, log_q]
    in_float64 = [t.detach().double().requires_grad_() for t in every]

    def loss_of(function, tensors):
        loss = function(user, item, *tensors[:3], log_q=tensors[3], reduction=reduction)
        return (loss * torch.arange(1.0, 1 + loss.numel()).view(loss.shape)).sum()

    truth = torch.autograd.grad(loss_of(page.reference, in_float64), in_float64)
    expected = torch.autograd.grad(loss_of(page.reference, every), every)
    for i, (wanted, t, e) in enumerate(zip(every, truth, expected, strict=True)):
        loss = loss_of(PF.in_batch_cross_entropy, [t if t is wanted else t.detach() for t in every])
        check(torch.autograd.grad(loss, wanted)[0], t, e, max_error(e, t), 0.0, f"gradient {i}")


def test_expanded_upstream_gradient():
    user, item, *tables = problem()
    losses = PF.in_batch_cross_entropy(user, item, *tables, reduction="none")
    stride_0 = torch.autograd.grad(losses, tables, torch.ones(()).expand(40), retain_graph=True)
    for a, b in zip(stride_0, torch.autograd.grad(losses, tables, torch.ones(40)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_hot_id_are_summed_in_float32(dtype):
    """One user in 5000 pairs with one of two items: a running sum in 16 bits would stop growing far below."""
    user, item = torch.zeros(5000, dtype=torch.int64), torch.arange(5000) % 2
    user_weight = torch.tensor([[1.0]], dtype=dtype, requires_grad=True)
    item_weight = torch.tensor([[0.0], [1.0]], dtype=dtype)
    grads = []
    for double in (False, True):
        tables = [t.detach().double() if double else t for t in (user_weight, item_weight)]
        tables[0].requires_grad_()
        loss = PF.in_batch_cross_entropy(user, item, *tables, reduction="sum", mask_accidental_hits=False)
        grads.append(torch.autograd.grad(loss, tables[0])[0].double())
    torch.testing.assert_close(grads[0], grads[1], rtol=torch.finfo(dtype).eps, atol=0)


def test_fp16_under_loss_scaling_keeps_its_gradient(variant):
    """p is 1.2e-4 but at the pair: divided by the batch before the loss scale is applied, fp16 has a digit left."""
    ids = torch.arange(96)
    scaled, exact = (
        [(torch.eye(96) * 3).to(dtype).requires_grad_() for _ in "ui"] for dtype in (torch.float16, torch.float64)
    )
    loss = PF.in_batch_cross_entropy(ids.to(variant), ids.to(variant), *(t.to(variant) for t in scaled))
    got = torch.autograd.grad(loss, scaled, torch.tensor(1024.0, dtype=torch.float16, device=variant))
    truth = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].t(), ids) * 1024, exact)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=4e-3, atol=1e-7)


def test_confident_rows_keep_their_gradient():
    """A margin of 20: 1 - p rounds to 0 in float32, the gradient e^-20 does not."""
    user, item = torch.arange(2), torch.arange(2)
    user_weight = torch.eye(2).requires_grad_()
    loss = PF.in_batch_cross_entropy(user, item, user_weight, torch.eye(2), scale=20.0, reduction="none")
    assert loss[0].item() == pytest.approx(math.exp(-20), rel=1e-5)
    grad = torch.autograd.grad(loss[0], user_weight)[0][0]
    torch.testing.assert_close(grad, torch.tensor([-20.0, 20.0]) * math.exp(-20), rtol=1e-5, atol=0)


def test_same_bits_every_time():
    user, item, *tables = problem(1500, 50, 60)
    for reduction in ("mean", "none"):
        runs = []
        for _ in range(3):
            loss = PF.in_batch_cross_entropy(user, item, *tables, reduction=reduction)
            runs.append((loss, *torch.autograd.grad(loss.sum(), tables)))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("name", ["user", "item"])
@pytest.mark.parametrize("value", [-1, 9, 1 << 40])
def test_id_out_of_range(name, value):
    user, item, *tables = problem(items=9)
    ids = {"user": user, "item": item}
    ids[name][[5, 8]] = value
    with pytest.raises(IndexError, match=rf"{name}\[5\] must lie in \[0, 9\)") as error:
        PF.in_batch_cross_entropy(*ids.values(), *tables)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": torch.zeros(39, dtype=torch.int64)}, "39 users and 40 items"),
        ({"item": torch.zeros(40)}, "item must be int64 or int32"),
        ({"item": torch.zeros(20, 2, dtype=torch.int64)}, "item must be .* of shape"),
        ({"user_weight": torch.zeros(9, 7)}, "D = 7, but item_weight has D = 8"),
        ({"user_weight": torch.zeros(9, 8, dtype=torch.float64)}, "one dtype"),
        ({"item_weight": torch.zeros(12)}, "item_weight must be a floating-point matrix"),
        ({"item_bias": torch.zeros(11)}, r"item_bias must be floating-point \(12,\)"),
        ({"log_q": torch.zeros(12)}, r"log_q must be floating-point \(40,\)"),
        ({"log_q": torch.zeros(40, dtype=torch.int64)}, "log_q must be"),
        ({"reduction": "max"}, "reduction must be"),
        ({"scale": torch.ones(())}, "scale must be a number"),
    ],
)
def test_bad_arguments(change, words):
    good = dict(zip(("user", "item", "user_weight", "item_weight"), problem()))
    with pytest.raises((ValueError, RuntimeError, IndexError), match=rf"(?s)pyfused.in_batch_cross_entropy: .*{words}"):
        PF.in_batch_cross_entropy(**{**good, **change})


def test_an_empty_batch_has_mean_nan_and_zero_gradients():
    user, item, *tables = problem(batch=0)
    loss = PF.in_batch_cross_entropy(user, item, *tables)
    assert loss.isnan() and page.reference(user, item, *tables).isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, tables))


def test_autocast_computes_in_float32():
    user, item, *tables = problem()
    expected = PF.in_batch_cross_entropy(user, item, *tables)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PF.in_batch_cross_entropy(user, item, *tables), expected)
        half = PF.in_batch_cross_entropy(user, item, *(t.bfloat16() for t in tables))
    assert half.dtype == torch.float32


def test_compiled_with_every_argument():
    user, item, *tables = problem(100, 20, 30)
    extra = {"item_bias": torch.randn(30, 1, requires_grad=True), "log_q": torch.rand(100).log().requires_grad_()}
    leaves = [*tables, *extra.values()]
    compiled = torch.compile(PF.in_batch_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        losses = [f(user, item, *tables, **extra, scale=3.0, reduction=reduction)
                  for f in (compiled, PF.in_batch_cross_entropy)]  # fmt: skip
        grads = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
        assert torch.equal(*losses) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_strided_tables_and_ids():
    user, item, user_weight, _ = (x.detach() for x in problem())
    wide = torch.randn(12, 24)
    tables = (user_weight.t().contiguous().t(), wide[:, ::3])
    spread = (torch.stack([user, user], 1)[:, 0], torch.stack([item, item], 1)[:, 0])
    leaves = [[t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tables],
              [t.requires_grad_() for t in tables]]  # fmt: skip
    losses = [PF.in_batch_cross_entropy(*ids, *w) for ids, w in zip(((user, item), spread), leaves)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, w) for loss, w in zip(losses, leaves)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
