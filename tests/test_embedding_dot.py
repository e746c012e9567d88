"""embedding_dot beyond the case table: determinism, half-precision sums, sparse gradients, bad ids and arguments."""

import copy
import math

import pytest
import torch

from pyfused import _binary
from pyfused.functional import embedding_dot
from pyfused.nn import EmbeddingDot
from pyfused.ops.embedding_dot import reference

BOTH = (embedding_dot, reference)
native = pytest.mark.skipif(bool(_binary.why_not), reason=str(_binary.why_not))


def tables(users=50, items=60, dim=16, dtype=torch.float32, bias=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(users, dim), (items, dim), *([(users, 1), (items, 1)] if bias else [])]
    return [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in shapes]


def ids(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def grads(function, user, item, parameters, **options):
    scores = function(user, item, *parameters, **options)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(scores.dtype)
    return torch.autograd.grad(scores, parameters, upstream)


@native
@pytest.mark.parametrize("skew", ["uniform", "hot", "one id"])
@pytest.mark.parametrize("sparse", [False, True])
def test_same_bits_for_any_number_of_threads(skew, sparse):
    n = 40_000  # more than one part in the sort and in every loop
    user = ids(3000, n)
    user = torch.where(torch.arange(n) % 3 == 0, user, 7) if skew == "hot" else user * 0 if skew == "one id" else user
    item, parameters = ids(2000, n), tables(3000, 2000, dim=20, bias=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        with torch.no_grad():
            scores = embedding_dot(user, item, *parameters)
        found = [g.coalesce() if sparse else g for g in grads(embedding_dot, user, item, parameters, sparse=sparse)]
        results.append([scores, *(part for g in found for part in ((g.indices(), g.values()) if sparse else (g,)))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    truth = grads(reference, user, item, [p.detach().double().requires_grad_() for p in parameters])
    for g, t in zip(grads(embedding_dot, user, item, parameters), truth, strict=True):
        assert (g - t).abs().max() < 1e-5 * t.abs().max()


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_in_float(dtype):
    """5000 gradients of 1 on one id: PyTorch adds them in the table's dtype and stops at 256 (2048)."""
    user, item = torch.zeros(5000, dtype=torch.int64), ids(4, 5000)
    user_weight = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    item_weight = torch.ones(4, 8, dtype=dtype)
    user_bias = torch.zeros(2, dtype=dtype, requires_grad=True)
    scores = embedding_dot(user, item, user_weight, item_weight, user_bias)
    for grad in torch.autograd.grad(scores.sum(), [user_weight, user_bias]):
        assert (grad[0] == torch.tensor(5000.0).to(dtype)).all()
        assert (grad[1] == 0).all()


@native
def test_float64_against_exact_sums():
    """Long sums err by less than n/8 (lanes, chunks) roundings of the sum of magnitudes; math.fsum is exact."""
    (user_weight, item_weight), n = tables(1, 3, dim=4096, dtype=torch.float64), 1500
    products = (user_weight[0] * item_weight[1]).tolist()
    score = embedding_dot(torch.tensor(0), torch.tensor(1), user_weight, item_weight).item()
    assert abs(score - math.fsum(products)) <= 4096 / 8 * 2**-53 * math.fsum(map(abs, products))
    item = ids(3, n)
    (grad,) = grads(embedding_dot, torch.zeros_like(item), item, [user_weight, item_weight])[:1]
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1)).double()
    for d in (0, 7, 4095):
        terms = (upstream * item_weight[item, d]).tolist()
        assert abs(grad[0, d].item() - math.fsum(terms)) <= n / 8 * 2**-53 * math.fsum(map(abs, terms))


@pytest.mark.parametrize("padding_idx", [None, 3, -1, (None, 5), (2, None)])
@pytest.mark.parametrize("shape", [(40,), (20, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sparse_gradients_are_pytorchs_coalesced(shape, padding_idx, dtype):
    user, item, parameters = ids(50, shape[0]).to(dtype), ids(60, *shape), tables(bias=True)
    ours = grads(embedding_dot, user, item, parameters, padding_idx=padding_idx, sparse=True)
    eager = grads(reference, user.long(), item, parameters, padding_idx=padding_idx, sparse=True)
    for a, b in zip(ours, eager, strict=True):
        b = b.coalesce()
        assert a.is_coalesced() and a.shape == b.shape
        assert torch.equal(a.indices(), b.indices())
        torch.testing.assert_close(a.values(), b.values())


@native
@pytest.mark.parametrize(
    "dtype, dim", [(torch.float32, 64), (torch.float64, 32), (torch.bfloat16, 128), (torch.float32, 72)]
)
def test_large_sparse_gradients_are_the_rows_of_the_dense_ones(dtype, dim):
    """More than 4 MiB of rows that are whole cache lines (not those of 72 numbers) are written past the caches."""
    n = 20_000
    user, item, parameters = ids(100_000, n), ids(90_000, n), tables(100_000, 90_000, dim, dtype)
    sparse = grads(embedding_dot, user, item, parameters, sparse=True)
    for a, b in zip(sparse, grads(embedding_dot, user, item, parameters), strict=True):
        assert a.values().shape[0] * dim * dtype.itemsize > 4 << 20
        assert torch.equal(a.values(), b[a.indices()[0]])


def test_sparse_gradients_train_with_the_sparse_optimizers():
    model = EmbeddingDot(50, 60, 8, bias=True, sparse=True)
    twin = copy.deepcopy(model)
    user, item = ids(50, 30), ids(60, 30)
    for m, score in ((model, model), (twin, lambda u, v: reference(u, v, *parameters_of(twin), sparse=True))):
        optimizer = torch.optim.SparseAdam(list(m.parameters()), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            score(user, item).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def parameters_of(model):
    return model.user.weight, model.item.weight, model.user_bias.weight, model.item_bias.weight


def test_dense_gradients_are_zero_where_no_id_points():
    user, item = torch.tensor([1, 1, 4]), torch.tensor([[0], [2], [2]])
    for grad, used in zip(grads(embedding_dot, user, item, tables()), ({1, 4}, {0, 2}), strict=True):
        assert grad.layout == torch.strided
        assert {i for i, row in enumerate(grad) if row.any()} == used


def test_expanded_upstream_gradient():
    parameters = tables()
    user, item = ids(50, 12), ids(60, 12, 5)
    ours, eager = (
        torch.autograd.grad(f(user, item, *parameters).sum(), parameters) for f in (embedding_dot, reference)
    )
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_wanted_gradients():
    parameters = tables(bias=True)
    for wanted in range(4):
        given = [p.detach().requires_grad_(i == wanted) for i, p in enumerate(parameters)]
        (grad,) = torch.autograd.grad(embedding_dot(ids(50, 9), ids(60, 9), *given).sum(), [given[wanted]])
        (truth,) = torch.autograd.grad(reference(ids(50, 9), ids(60, 9), *given).sum(), [given[wanted]])
        torch.testing.assert_close(grad, truth)


def test_one_table_for_both_sides():
    (table,) = tables()[:1]
    user, item = ids(50, 30), ids(49, 30)
    ours, eager = (torch.autograd.grad(f(user, item, table, table).square().sum(), [table])[0] for f in BOTH)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("user_shape, item_shape", [((), ()), ((), (7,)), ((4, 3), (4, 3)), ((4, 3), (4, 3, 5))])
def test_other_shapes(user_shape, item_shape):
    parameters = tables(bias=True)
    user, item = ids(50, *user_shape), ids(60, *item_shape)
    torch.testing.assert_close(*(f(user, item, *parameters) for f in BOTH))
    for a, b in zip(*(grads(f, user, item, parameters) for f in BOTH), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(1027,), (171, 6)], ids=["pairs", "per-user"])
@pytest.mark.parametrize("users, items", [(10_000, 10), (10, 70_000)])
def test_tables_beyond_the_caches(users, items, shape):
    """Their rows are prefetched: into the first cache, or from more than 16 MB into the second."""
    parameters = tables(users, items, dim=64)
    user, item = ids(users, shape[0]), ids(items, *shape)
    expected = reference(user, item, *(p.double() for p in parameters))
    torch.testing.assert_close(embedding_dot(user, item, *parameters).double(), expected, rtol=1e-5, atol=1e-4)


def test_nan_and_inf_stay_where_they_are():
    for dim in (5, 20, 33):
        user_weight, item_weight = (t.detach().clone() for t in tables(dim=dim)[:2])
        user_weight[3, dim - 1], user_weight[4, 0], user_weight[5, dim // 2] = float("nan"), float("inf"), float("-inf")
        user, item = torch.arange(50), torch.arange(50)
        torch.testing.assert_close(*(f(user, item, user_weight, item_weight) for f in BOTH), equal_nan=True)


@native
@pytest.mark.parametrize("bad", [-1, 60, 2**40])
@pytest.mark.parametrize("argument", ["user", "item"])
def test_ids_out_of_range(argument, bad):
    given = {"user": ids(50, 100), "item": ids(50, 100, 2)}
    given[argument].view(-1)[37] = bad
    parameters = tables()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(IndexError, match=rf"{argument} {bad} .*{argument}\[37\]"):
        embedding_dot(given["user"], given["item"], *parameters).sum().backward()
    assert all((p.grad == 1).all() for p in parameters)


@native
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(1027,), (171, 6)], ids=["pairs", "per-user"])
def test_ids_out_of_range_wherever_they_stand(shape, dtype):
    """The forward checks a chunk of scores at a time, some ids where they lie and some in a copy."""
    tables = torch.ones(50, 4), torch.ones(60, 4)
    good = {"user": ids(50, shape[0]).to(dtype), "item": ids(60, *shape).to(dtype)}
    for argument, bad in (("user", 50), ("item", 60), ("item", -1)):
        last = good[argument].numel() - 1
        for at in (0, 1, last // 2, last - 1, last):
            given = {name: tensor.clone() for name, tensor in good.items()}
            given[argument].view(-1)[at:] = bad
            with torch.no_grad(), pytest.raises(IndexError, match=rf"{argument} {bad} .*{argument}\[{at}\]"):
                embedding_dot(given["user"], given["item"], *tables)


@native
def test_user_ids_out_of_range_without_items():
    with pytest.raises(IndexError, match=r"user 50 .*user\[1\]"):
        embedding_dot(torch.tensor([0, 50]), torch.empty(2, 0, dtype=torch.int64), torch.ones(50, 4), torch.ones(60, 4))


@native
def test_the_backward_op_checks_ids_itself():
    grad, good = torch.ones(3), torch.tensor([0, 1, 2])
    weight = torch.ones(5, 4)
    for name, pair in (("ids", (good + 3, good)), ("other_ids", (good, -good))):
        with pytest.raises(IndexError, match=name):
            torch.ops.pyfused.embedding_dot_backward(grad, *pair, weight, 5, -1, True, True, False)


U, V = torch.ones(5, 4), torch.ones(6, 4)
I5 = torch.zeros(5, dtype=torch.int64)
BAD = {
    "float ids": (dict(user=I5.float()), RuntimeError, "user must be int64 or int32"),
    "byte ids": (dict(item=I5.byte()), RuntimeError, "item must be int64 or int32"),
    "widths": (dict(item_weight=torch.ones(6, 3)), RuntimeError, "D = 4.*D = 3"),
    "batches": (dict(item=I5[:3]), RuntimeError, "item must have the shape of user"),
    "broadcast": (dict(user=I5[:1]), ValueError, "item must have the shape of user"),
    "1-d table": (dict(user_weight=torch.ones(5)), RuntimeError, r"user_weight must be \[rows, D\]"),
    "integer table": (dict(user_weight=U.int(), item_weight=V.int()), ValueError, "float32"),
    "dtypes": (dict(item_weight=V.double()), ValueError, "one dtype"),
    "bias dtype": (dict(item_bias=torch.ones(6).double()), ValueError, "one dtype"),
    "bias size": (dict(item_bias=torch.ones(5)), ValueError, r"item_bias must be \[6\]"),
    "padding": (dict(padding_idx=5), AssertionError, "padding_idx 5 is not a row of user_weight"),
    "negative padding": (dict(padding_idx=(None, -7)), AssertionError, "padding_idx -7 is not a row of item_weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    arguments = {"user": I5, "item": I5, "user_weight": U, "item_weight": V, **change}
    with pytest.raises(error, match=message):
        embedding_dot(**arguments)
    if error is not ValueError:
        with pytest.raises(error):
            reference(**arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_for_several_batches(dynamic):
    torch._dynamo.reset()
    parameters = tables(bias=True)

    def function(user, item, *parameters):
        return embedding_dot(user, item, *parameters, padding_idx=-1).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (11, 23):
        user, item = ids(50, batch), ids(60, batch, 3)
        for a, b in zip(*(grads(f, user, item, parameters) for f in (compiled, function)), strict=True):
            assert torch.equal(a, b)


def test_double_backward_of_sparse_gradients_is_pytorchs():
    """Eager PyTorch has no second derivative of sparse embedding gradients: an error, never a wrong number."""
    parameters = tables()
    (grad,) = torch.autograd.grad(
        embedding_dot(ids(50, 9), ids(60, 9), *parameters, sparse=True).square().sum(),
        parameters[:1],
        create_graph=True,
    )
    assert grad.is_sparse
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.to_dense().square().sum(), parameters[1])


def test_module():
    torch.manual_seed(0)
    model = EmbeddingDot(50, 60, 8, bias=True, padding_idx=(1, -1))
    torch.manual_seed(0)
    user, user_bias = torch.nn.Embedding(50, 8, 1), torch.nn.Embedding(50, 1, 1)
    assert list(model.state_dict()) == ["user.weight", "user_bias.weight", "item.weight", "item_bias.weight"]
    assert torch.equal(model.user.weight, user.weight) and torch.equal(model.user_bias.weight, user_bias.weight)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    u, v = ids(50, 40), ids(60, 40, 2)
    v[0, 0], u[1] = 59, 1
    model(u, v).square().sum().backward()
    rows = twin.user(u).unsqueeze(1) * twin.item(v)
    (rows.sum(-1) + twin.user_bias(u) + twin.item_bias(v).squeeze(-1)).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert not model.item.weight.grad[59].any() and not model.user_bias.weight.grad[1].any()
    assert torch.equal(EmbeddingDot(50, 60, 8)(u, v).isfinite(), torch.ones(40, 2, dtype=torch.bool))
