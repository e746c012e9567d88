"""pyfused.optim: the step in embedding_dot's backward against torch's optimizers, and what must be refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import _binary, dispatch, optim
from pyfused.functional import embedding_dot
from pyfused.nn import EmbeddingDot
from pyfused.ops.embedding_dot import reference
from pyfused.ops.embedding_dot_update import arithmetic_dtype

native = pytest.mark.skipif(bool(_binary.why_not), reason=str(_binary.why_not))


class TorchRowwiseAdagrad(torch.optim.Optimizer):
    """Written down independently, over dense rows: PyTorch has none."""

    def __init__(self, params, lr, initial_accumulator_value=0.0, eps=1e-8):
        super().__init__(params, {"lr": lr, "eps": eps, "initial": initial_accumulator_value})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                sums = self.state[p].setdefault("sum", torch.full((len(p),), group["initial"], dtype=p.dtype))
                grads = p.grad.coalesce()
                for row, grad in zip(grads.indices()[0], grads.values(), strict=True):
                    sums[row] += (grad**2).sum() / grad.numel()
                    p[row] -= group["lr"] / (sums[row] ** 0.5 + group["eps"]) * grad


RULES = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.3}),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.05}),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, TorchRowwiseAdagrad, {"lr": 0.3, "initial_accumulator_value": 0.05}),
    "Adam": (optim.Adam, torch.optim.SparseAdam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
}
SHAPES = {
    "pairs": dict(),
    "per user": dict(per_user=5),
    "padding": dict(padding_idx=(3, -1), batch=60),
    "padding per user": dict(padding_idx=2, per_user=3, batch=60),
    "int32": dict(ids=torch.int32),
    "hot": dict(users=1, batch=1500, dim=9),
    "wide": dict(dim=264, batch=60),
    "wide tail": dict(dim=131, batch=60, per_user=2),
    "chunks": dict(users=5, items=700, batch=1100, dim=33),
    "no bias": dict(bias=False),
    "dim 1": dict(dim=1),
    "empty": dict(batch=0),
}


@pytest.fixture
def device(variant):
    """That of `variant`, where its backend has the update."""
    if dispatch._forced not in dispatch.TABLE["embedding_dot_update"]:
        pytest.skip(f"the {dispatch._forced} backend has no kernel for embedding_dot_update")
    return variant


class Setting:
    """Tables with rows of a scale that keeps Adagrad's first steps away from gradients of rounding noise, and ids."""

    def __init__(self, dtype, users=30, items=40, batch=200, per_user=None, dim=20, bias=True, ids=torch.int64,
                 padding_idx=None):  # fmt: skip
        g = torch.Generator().manual_seed(0)
        shapes = [(users, dim), (items, dim), *([(users,), (items, 1)] if bias else [])]
        self.tables = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
        item = (batch,) if per_user is None else (batch, per_user)
        self.ids = [
            (torch.randint(users, (batch,), generator=g).to(ids), torch.randint(items, item, generator=g).to(ids))
            for _ in range(3)
        ]
        self.grads = [torch.randn(item, generator=g, dtype=torch.float64).to(dtype) for _ in self.ids]
        self.padding_idx = padding_idx

    def train(self, optimizer_class, options, fused, dtype=None, device="cpu"):
        """Tables and optimizer after three steps with fixed gradients of the scores."""
        tables = [t.to(device, dtype or t.dtype).detach().clone().requires_grad_() for t in self.tables]
        if not fused:  # F.embedding has sparse gradients for tables of two dimensions only
            tables = [t.detach().view(len(t), -1).requires_grad_() for t in tables]
        optimizer = optimizer_class(tables, **options)
        for (user, item), grad in zip(self.ids, self.grads):
            if not fused:
                user, item = user.long(), item.long()
            user, item, grad = user.to(device), item.to(device), grad.to(device, tables[0].dtype)
            extra = {"optimizer": optimizer} if fused else {"sparse": True}
            function = embedding_dot if fused else reference
            optimizer.zero_grad()
            function(user, item, *tables, padding_idx=self.padding_idx, **extra).backward(grad)
            assert not fused or all(t.grad is None for t in tables)
            optimizer.step()
        return tables, optimizer


@pytest.mark.op("embedding_dot_update")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_as_torchs_optimizer(rule, shape, dtype, device):
    """Three steps on the same score gradients against the torch optimizer in float64.

    A 16-bit table rounds its rows in every step, and the next step's gradient sees them rounded: three half units, and
    as much again through the gradients.
    """
    ours, theirs, options = RULES[rule]
    setting = Setting(dtype, **SHAPES[shape])
    truth, _ = setting.train(theirs, options, fused=False, dtype=torch.float64)
    tables, optimizer = setting.train(ours, options, fused=True, device=device)
    for found, expected, before in zip(tables, truth, setting.tables, strict=True):
        assert found.dtype == dtype
        found = found.detach().cpu().double().view_as(expected)
        scale = expected.abs().max().item()
        ulps = {torch.float64: 64, torch.float32: 64}.get(dtype, 6)
        assert (found - expected).abs().max() <= ulps * torch.finfo(dtype).eps * scale
        untouched = (expected == before.double().view_as(expected)).all(-1)
        assert torch.equal(found[untouched], before.double().view_as(expected)[untouched])
        if shape not in ("empty", "hot") and len(expected) > 1:
            assert not untouched.all(), "nothing was trained"
    for table in tables:
        for value in optimizer.state[table].values():
            assert not isinstance(value, torch.Tensor) or value.dtype == arithmetic_dtype(table)


@native
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_for_any_number_of_threads(rule):
    before, results = torch.get_num_threads(), []
    setting = Setting(torch.float32, users=3000, items=2000, batch=40_000)
    for user, item in setting.ids:
        user[::3] = 7  # a hot id, in every chunk
        item[: len(item) // 2] = 11
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tables, optimizer = setting.train(RULES[rule][0], RULES[rule][2], fused=True)
        state = [v for t in tables for v in optimizer.state[t].values() if isinstance(v, torch.Tensor)]
        results.append([*tables, *state])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def small(rule="SGD", **options):
    torch.manual_seed(0)
    model = EmbeddingDot(20, 30, 8, bias=True)
    model.optimizer = RULES[rule][0](model.parameters(), **{**RULES[rule][2], **options})
    return model


USER, ITEM = torch.arange(12) % 5, torch.arange(12) % 7


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_table_stays_and_the_others_learn(frozen):
    model, names = small(), ("user.weight", "item.weight", "user_bias.weight", "item_bias.weight")
    twin = copy.deepcopy(model)
    dict(model.named_parameters())[names[frozen]].requires_grad_(False)
    for m in (model, twin):
        m(USER, ITEM).square().sum().backward()
    for name, p in model.named_parameters():
        expected = small().get_parameter(name) if name == names[frozen] else twin.get_parameter(name)
        torch.testing.assert_close(p, expected)


def test_param_groups_and_schedulers():
    model = small()
    model.optimizer = optim.SGD([{"params": [model.user.weight], "lr": 1.0}, {"params": [
        model.item.weight, model.user_bias.weight, model.item_bias.weight]}], lr=0.0)  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.0)
    for changes in (True, False):
        model(USER, ITEM).sum().backward()
        model.optimizer.step()
        scheduler.step()
        assert torch.equal(model.item.weight, before["item.weight"])
        assert torch.equal(model.user.weight, before["user.weight"]) != changes
        before = copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_training_goes_on_after_saving(rule, way, dtype):
    model = small(rule).to(dtype)

    def train(m):
        m(USER, ITEM).square().mean().backward()
        m.optimizer.step()

    train(model)
    if way == "state_dict":
        twin = small(rule).to(dtype)
        twin.load_state_dict(model.state_dict())
        twin.optimizer.load_state_dict(pickle.loads(pickle.dumps(model.optimizer.state_dict())))
    else:
        twin = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    for m in (model, twin):
        train(m)
    assert list(model.state_dict()) == ["user.weight", "user_bias.weight", "item.weight", "item_bias.weight"]
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, small(rule).to(dtype).get_parameter(name)), name


@pytest.mark.op("embedding_dot_update")
@pytest.mark.parametrize("bad", [-1, 30])
def test_ids_out_of_range_leave_everything_as_it_was(bad, device):
    if dispatch._forced == "cuda":
        pytest.skip("a GPU is not waited for: its step leaves out the bad id")
    model = small("Adam")
    item = ITEM.clone()
    item[3] = bad
    with pytest.raises(IndexError):
        model(USER, item).sum().backward()
    tables = (model.user.weight, model.item.weight, model.user_bias.weight, model.item_bias.weight)
    state = [torch.ones_like(t) for t in tables for _ in "mv"]
    for ids in ((USER, item), (item, USER)):
        with torch.no_grad(), pytest.raises(IndexError):
            torch.ops.pyfused.embedding_dot_update(
                torch.ones(12), *ids, *tables, state, [-1, -1], [True] * 4, "adam", [0.1, 0.1, 0.1, 0.1] * 4
            )
    for name, p in small("Adam").named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    assert all((s == 1).all() for s in state)


def test_a_backward_happens_once():
    model = small()
    loss = model(USER, ITEM).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a table was changed after this forward"):
        loss.backward()
    loss = model(USER, ITEM).sum() + model(USER, ITEM).sum()
    with pytest.raises(RuntimeError, match="a table can be in one"):
        loss.backward()


def test_autograd_sees_that_the_tables_change():
    model = small()
    loss = (model.user.weight**2).sum()
    model(USER, ITEM).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_refused():
    model = small()
    with pytest.raises(RuntimeError, match="create_graph"):
        model(USER, ITEM).sum().backward(create_graph=True)
    table = model.item.weight
    with pytest.raises(ValueError, match="share memory"):
        embedding_dot(USER, ITEM, table, table, optimizer=model.optimizer)
    with pytest.raises(ValueError, match="item_weight requires a gradient but is none"):
        embedding_dot(USER, ITEM, table, torch.randn(30, 8, requires_grad=True), optimizer=model.optimizer)
    F.mse_loss(model.user.weight, torch.zeros(20, 8)).backward()
    with pytest.raises(RuntimeError, match=r"shape \(20, 8\) has a gradient"):
        model.optimizer.step()
    for bad in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            optim.Adam(model.parameters(), **bad)


def test_no_grad_and_evaluation_do_not_train():
    model = small()
    with torch.no_grad():
        scores = model(USER, ITEM)
    assert not scores.requires_grad
    assert torch.equal(scores, small()(USER, ITEM))


def test_compile_breaks_the_graph_and_trains():
    torch._dynamo.reset()
    model, twin = small(), small()
    compiled = torch.compile(lambda user, item: model(user, item).square().mean(), backend="aot_eager")
    compiled(USER, ITEM).backward()
    twin(USER, ITEM).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="changes the tables in its backward"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(USER, ITEM)


def test_saved_tensor_hooks():
    """They hand back copies of what was saved, which must not be what is trained."""
    model, twin = small("Adam"), small("Adam")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = model(USER, ITEM).square().mean()
    loss.backward()
    twin(USER, ITEM).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_changed_table_is_seen_through_checkpointing_too():
    """Autograd does not compare versions of what saved tensor hooks hand back."""
    model = small()
    loss = sum(checkpoint(model, USER, ITEM, use_reentrant=False).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="a table can be in one"):
        loss.backward()


def test_checkpointing():
    model, twin = small(), small()
    checkpoint(model, USER, ITEM, use_reentrant=False).square().mean().backward()
    twin(USER, ITEM).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@native
def test_tables_with_gaps_run_the_reference():
    tables = [torch.randn(2 * n, 8)[::2].requires_grad_() for n in (20, 30)]  # rows apart: still native
    columns = torch.randn(8, 20).t().requires_grad_()  # numbers of a row apart
    arguments = ([], [-1, -1], [True, True, False, False], "sgd", [0.1, 0.1])
    grad = torch.ones(12)
    answer = pyfused.explain("embedding_dot_update", grad, USER, ITEM, *tables, None, None, *arguments)
    assert answer["cpu"] == "chosen"
    answer = pyfused.explain("embedding_dot_update", grad, USER, ITEM, columns, tables[1], None, None, *arguments)
    assert answer["reference"] == "chosen" and "gaps" in answer["cpu"]
    results = []
    for layout in (lambda t: t.contiguous(), lambda t: t, lambda t: t.t().contiguous().t()):
        given = [layout(t.detach()).clone(memory_format=torch.preserve_format).requires_grad_() for t in tables]
        embedding_dot(USER, ITEM, *given, optimizer=optim.SGD(given, lr=0.1)).sum().backward()
        results.append(given)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck():
    tables = (torch.randn(20, 8), torch.randn(30, 8), None, torch.randn(30))
    state = [torch.zeros_like(t) for t in tables if t is not None for _ in "mv"]
    arguments = (state, [-1, 3], [True, True, False, True], "adam", [0.1, 0.1, 0.1, 1e-3] * 3)
    torch.library.opcheck(
        torch.ops.pyfused.embedding_dot_update.default,
        (torch.randn(12), USER, ITEM, *tables, *arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
