"""The tiled in-batch softmax on CUDA beyond the case table: tiles, splits, precision, special values; emulated, and
on a GPU where there is one."""

import itertools
from dataclasses import dataclass

import accuracy
import emulated
import pytest
import torch

import pyfused
import pyfused.functional as PF
from pyfused import _binary, dispatch
from pyfused.ops import in_batch_cross_entropy as op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float32 as TF32, see `tf32`


@pytest.fixture
def adapter():
    return pyfused.backends.cuda.in_batch_cross_entropy


@pytest.fixture(autouse=True)
def tf32():
    """float32 by tiles. `Problem` has numbers that TF32 holds, so that only the gradients lose by it: 2^-11 a term."""
    with emulated.float32_as(torch.backends.cuda.matmul, "tf32"):
        yield


@dataclass(frozen=True)
class Problem:
    """Has what the functions of accuracy.py want of a case."""

    batch: int
    dim: int
    users: int = 9
    items: int = 12
    bias: bool = True
    options: tuple = (("reduction", "none"), ("scale", 0.75))

    @property
    def grad(self):
        return ("user_weight", "item_weight", *(("item_bias", "log_q") if self.bias else ()))

    def arguments(self, dtype):
        g = torch.Generator().manual_seed(0)
        ids = {n: torch.randint(r, (self.batch,), generator=g) for n, r in (("user", self.users), ("item", self.items))}
        shapes = {"user_weight": (self.users, self.dim), "item_weight": (self.items, self.dim)}
        shapes |= {"item_bias": (self.items,), "log_q": (self.batch,)} if self.bias else {}
        numbers = {n: torch.randn(s, generator=g) * (self.dim**-0.25 if len(s) == 2 else 1) for n, s in shapes.items()}
        return {**ids, **{n: x.bfloat16().to(dtype).requires_grad_() for n, x in numbers.items()}, **dict(self.options)}


def results(function, problem, arguments):
    grads = accuracy.gradients_of(function, arguments, problem.grad)
    return [accuracy.outputs_of(function, arguments)[0], *grads]


def check(device, problem, dtype):
    """As test_forward.py and test_backward.py judge the case table."""
    got = results(PF.in_batch_cross_entropy, problem, accuracy.on(device, problem.arguments(dtype)))
    truth = results(op.reference, problem, accuracy.to_float64(problem.arguments(dtype)))
    at_dtype = results(op.reference, problem, problem.arguments(dtype))
    rounding = accuracy.eager_rounding(lambda a: results(op.reference, problem, a), problem, dtype)
    for name, *given in zip(("loss", *problem.grad), got, truth, at_dtype, rounding, strict=True):
        slack = 2**-10 if dtype == torch.float32 and name != "loss" else 0
        accuracy.check(*given, slack, f"{problem} {name}")


@pytest.mark.parametrize("blocks", [1, 5, 100])
@pytest.mark.parametrize("batch", [64, 65, 150, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_splits(device, adapter, monkeypatch, dtype, batch, blocks):
    """Whole tiles, one that has a single row; all tiles in one block, two or three, one each; a split without any."""
    monkeypatch.setattr(adapter, "BLOCKS", blocks)
    check(device, Problem(batch, 24, items=60), dtype)


@pytest.mark.parametrize("splits", [3, 7])
def test_a_split_may_have_no_tiles(device, adapter, monkeypatch, splits):
    """4 tiles: 2, 2 and none; one each and three without."""
    monkeypatch.setattr(adapter, "_splits", lambda batch: splits)
    check(device, Problem(200, 8), torch.float32)


@pytest.mark.parametrize("dim", [1, 16, 17, 33, 64, 65, 97, 128, 129, 160, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_number_of_panels(device, adapter, monkeypatch, dtype, dim):
    """1 to 8, of 16 or 32 numbers, and what is between; float32 rows of more than 512 bytes go by chunks."""
    monkeypatch.setattr(adapter, "BLOCKS", 1)
    problem = Problem(70, dim)
    arguments = problem.arguments(dtype)
    reason = adapter.cannot_tile(*(arguments[n] for n in ("user", "user_weight", "item_weight")))
    assert bool(reason) == (dim * dtype.itemsize > 512)
    check(device, problem, dtype)


@pytest.mark.parametrize("options", [{}, {"mask_accidental_hits": False}, {"reduction": "sum"}, {"scale": 30.0}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(device, dtype, options):
    """Without bias and log_q; scale 30: a row's softmax is that of its largest scores."""
    check(device, Problem(100, 16, bias=False, options=tuple(options.items())), dtype)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_asked_for(device, needed, reduction):
    problem = Problem(70, 8, options=(("reduction", reduction),))
    names = [n for n, need in zip(problem.grad, needed) if need]
    arguments = accuracy.on(device, problem.arguments(torch.float32))
    every = accuracy.gradients_of(PF.in_batch_cross_entropy, arguments, problem.grad)
    for name in set(problem.grad) - set(names):
        arguments[name].requires_grad_(False)
    got = accuracy.gradients_of(PF.in_batch_cross_entropy, arguments, names)
    for name, grad in zip(names, got, strict=True):
        assert torch.equal(grad, every[problem.grad.index(name)]), name


def test_float32_is_tf32_only_where_torch_allows_it(device):
    arguments = accuracy.on(device, Problem(150, 40).arguments(torch.float32))
    with torch.no_grad():
        arguments["user_weight"] *= 1.001  # no longer numbers that TF32 holds
    truth = op.reference(**accuracy.to_float64(arguments))
    errors = []
    for precision in ("none", "ieee", "tf32"):
        with emulated.float32_as(torch.backends.cuda.matmul, precision):
            errors.append((PF.in_batch_cross_entropy(**arguments) - truth).abs().max().item())
    assert errors[0] == errors[1] < 1e-5 and 20 * errors[1] < errors[2] < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order_of_threads(device, adapter, monkeypatch, dtype):
    monkeypatch.setattr(adapter, "BLOCKS", 8)
    problem, seen = Problem(200, 40), []
    for seed in (1, 2):
        if device == "cpu":
            emulated.cuda_module().set_seed(seed)
        arguments = accuracy.on(device, problem.arguments(dtype))
        seen.append(results(PF.in_batch_cross_entropy, problem, arguments))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_hits_in_any_tile_but_the_pair_itself(device, adapter, monkeypatch, mask, ids):
    """The diagonal and one other tile hold the same items; rows beyond the last have no id that could be hit."""
    monkeypatch.setattr(adapter, "BLOCKS", 1)
    item = torch.arange(130, dtype=ids).remainder(64).to(device)
    user = torch.arange(130, dtype=ids).to(device)
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, 8, generator=g).bfloat16().float().to(device).requires_grad_() for n in (130, 64)]
    options = {"mask_accidental_hits": mask, "reduction": "none"}
    pairs = []
    for function in (PF.in_batch_cross_entropy, op.reference):
        losses = function(user, item, *tables, **options)
        pairs.append((losses, *torch.autograd.grad(losses, tables, torch.linspace(1, 2, 130).to(device))))
    for a, b, tolerance in zip(*pairs, (1e-5, 2e-3, 2e-3), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_ids_that_differ_in_the_highest_of_32_bits_only(device):
    """Of a table whose rows are all the same."""
    table = torch.randn(1, 8, device=device).expand(2**31 + 9, 8)
    item, user = torch.tensor([5, 5 + 2**31, 6], device=device), torch.arange(3, device=device)
    loss = PF.in_batch_cross_entropy(user, item, torch.randn(3, 8, device=device), table, reduction="none")
    torch.testing.assert_close(loss.cpu(), torch.full((3,), 3.0).log())


@pytest.mark.parametrize("name", ["user", "item"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [-1, 9, 2**40])
def test_an_id_out_of_range_makes_nan_and_no_gradient(device, adapter, monkeypatch, name, reduction, value):
    bad = adapter._bad
    monkeypatch.setattr(adapter, "_bad", lambda *args: bad(*args[:-1], False))  # else the next kernel's call raises
    ids = {n: torch.arange(70).remainder(9) for n in ("user", "item")}
    ids[name][[2, 66]] = value
    tables = [torch.randn(9, 8, device=device, requires_grad=True) for _ in range(2)]
    loss = PF.in_batch_cross_entropy(*(i.to(device) for i in ids.values()), *tables, reduction=reduction)
    assert loss.isnan().all()
    for grad in torch.autograd.grad(loss.sum(), tables):
        assert not grad.any() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["user nan", "user inf", "item inf", "item -inf", "bias -inf", "bias nan", "own -inf"])
def test_special_values(device, adapter, monkeypatch, what, dtype):
    """Finite where float64 is, on 70 pairs, so that the missing rows of tiles are met. (Eager's products of bfloat16 on
    a CPU spread an infinity over a row.)"""
    monkeypatch.setattr(adapter, "BLOCKS", 1)
    problem = Problem(70, 8, users=70, items=70)
    arguments = problem.arguments(dtype)
    arguments["user"] = arguments["item"] = torch.arange(70)
    kind, value = what.split()
    with torch.no_grad():
        if kind == "own":  # every user's score of item 3 is -inf, its own too: its gradient is that of the own score
            arguments["user_weight"][:, 0] = arguments["user_weight"][:, 0].abs() + 1
            arguments["item_weight"][3, 0] = -torch.inf
        elif kind == "bias":
            arguments["item_bias"][3] = float(value)
        else:
            arguments[f"{kind}_weight"][3, 0] = float(value)
    expected = results(op.reference, problem, accuracy.to_float64(arguments))
    got = results(PF.in_batch_cross_entropy, problem, accuracy.on(device, arguments))
    for name, a, b in zip(("loss", *problem.grad), got, expected, strict=True):
        assert torch.equal(a.isfinite().cpu(), b.isfinite()), name


def test_small_float16_gradients(device):
    """Probabilities of 1e-7, which float16 rounds to a multiple of 6e-8; large upstream gradients, of both signs."""
    user, item = torch.arange(3, device=device), torch.arange(3, device=device)
    tables = [torch.eye(3, 8).to(device, torch.float16).requires_grad_() for _ in range(2)]
    scale, upstream = 16.0, torch.tensor([6e4, -3e4, 2e3], device=device)
    grads = []
    for double in (False, True):
        given = [t.detach().double().requires_grad_() if double else t for t in tables]
        loss = (op.reference if double else PF.in_batch_cross_entropy)(
            user, item, *given, scale=scale, reduction="none"
        )
        grads.append(torch.autograd.grad(loss, given, upstream.to(loss.dtype)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("upstream", [0.0, 1e-30, 1e30])
def test_upstream_gradients_of_any_size(device, upstream):
    """None at all, and very small and large ones."""
    arguments = accuracy.on(device, Problem(70, 8).arguments(torch.float32))
    wanted = [arguments[n] for n in ("user_weight", "item_weight", "item_bias")]
    grads = []
    for function in (PF.in_batch_cross_entropy, op.reference):
        loss = function(**arguments)
        grads.append(torch.autograd.grad(loss, wanted, torch.linspace(-1, 1, 70, device=device) * upstream))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3 * upstream)


def test_explain(device, adapter):
    given = list(Problem(70, 8).arguments(torch.float32).values())[:6]
    options = ([True] * 4, 1.0, True, 0)
    assert dispatch.explain("in_batch_cross_entropy", *given, *options)["cuda"] == "chosen: tiles"
    backward = (given[4], *given, *given[:4], *options)
    assert dispatch.explain("in_batch_cross_entropy_backward", *backward)["cuda"] == "chosen: tiles"
    with emulated.float32_as(torch.backends.cuda.matmul, "ieee"):
        assert "fp32_precision does not" in dispatch.explain("in_batch_cross_entropy", *given, *options)["cuda"]
    given[2:4] = [t.double() for t in given[2:4]]
    assert "float64" in dispatch.explain("in_batch_cross_entropy", *given, *options)["cuda"]
    table, many = torch.empty(1, 1, device="meta"), torch.empty(0, device="meta").new_empty(2**31)
    assert "pairs" in adapter.cannot_tile(many, table, table)
    assert "32 bits" in adapter.cannot_tile(many[:5], table, table.expand(2**32, 1))


def test_the_kernels_check_what_they_are_given(device):
    def call(name, **change):
        sizes = {"rows": (5, 16), "items": (5, 16), "offset": (5,), "stats": (3, 5), "grad": (5,), "most": ()}
        given = {n: torch.ones(s, device=device) for n, s in sizes.items()}
        given |= {"item": torch.arange(5, device=device), "loss": given["grad"], "workspace": torch.ones(3, 5)}
        given |= {"workspace": given["workspace"].to(device), "d_rows": torch.ones(2, 5, 9, device=device)}
        given |= {"d_offset": torch.ones(2, 5, device=device), "by_item": True}
        given |= {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in change.items()}
        operands, options = [given[n] for n in ("rows", "items", "offset", "item")], (1.0, True)
        if name == "in_batch_cross_entropy":
            return _binary._C.cuda_in_batch_cross_entropy(
                *(given[n] for n in ("loss", "stats", "workspace")), *operands, *options
            )
        return _binary._C.cuda_in_batch_cross_entropy_backward(
            given["d_rows"], given["d_offset"], *operands, *(given[n] for n in ("stats", "grad", "most")), *options,
            given["by_item"],
        )  # fmt: skip

    both = [
        {"rows": torch.ones(5, 15)}, {"rows": torch.ones(5, 144), "items": torch.ones(5, 144)},
        {"rows": torch.ones(16, 5).t()}, {"items": torch.ones(5, 32)}, {"items": torch.ones(5, 16).half()},
        {"offset": torch.ones(4)}, {"item": torch.arange(4)}, {"stats": torch.ones(3, 4)},
    ]  # fmt: skip
    one = {
        "in_batch_cross_entropy": [{"loss": torch.ones(4)}, {"workspace": torch.ones(2, 5)},
                                   {"workspace": torch.ones(1, 5)}],
        "in_batch_cross_entropy_backward": [{"d_rows": torch.ones(5, 9)}, {"d_rows": torch.ones(2, 5, 17)},
                                            {"d_offset": torch.ones(5)}, {"by_item": False},
                                            {"grad": torch.ones(4)}, {"most": torch.ones(2)}],
    }  # fmt: skip
    for name in one:
        call(name)
        for change in both + one[name]:
            with pytest.raises(ValueError, match=f": {'d_offset' if 'by_item' in change else next(iter(change))}: "):
                call(name, **change)
