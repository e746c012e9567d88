"""The ops and fused models under the rest of PyTorch: each works as eager does, or raises one clear sentence."""

import copy
import gc
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from architectures import ARCHITECTURES, LanguageModel, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused
import pyfused.functional as PF
import pyfused.nn as pnn
from pyfused.fusion import measure
from pyfused.fusion.put_off import PutOff

G = torch.Generator().manual_seed(0)
X, W, B = torch.randn(2, 3, 9, 9, generator=G), torch.randn(4, 3, 3, 3, generator=G), torch.randn(4, generator=G)
LOGITS, LABELS = torch.randn(6, 5, generator=G), torch.randint(5, (6,), generator=G)
ROWS, HEAD = torch.randn(6, 8, generator=G), torch.randn(5, 8, generator=G)
USER, ITEM = torch.randint(7, (6,), generator=G), torch.randint(7, (6,), generator=G)
TABLE, OTHER = torch.randn(7, 8, generator=G), torch.randn(7, 8, generator=G)

# (fused, eager, the tensors that both take and that may need a gradient)
OPS = {
    "conv2d_relu": (PF.conv2d_relu, lambda *a: F.relu(F.conv2d(*a)), (X, W, B)),
    "conv_act": (lambda *a: PF.conv_act(*a, activation="gelu"), lambda *a: F.gelu(F.conv2d(*a)), (X, W, B)),
    "conv1d + residual": (
        lambda x, w, r: PF.conv_act(x, w, activation="silu", residual=r),
        lambda x, w, r: F.silu(F.conv1d(x, w) + r),
        (X[..., 0], W[..., 0], torch.randn(2, 4, 7, generator=G)),
    ),
    "conv2d_relu_max_pool2d": (
        PF.conv2d_relu_max_pool2d,
        lambda *a: F.max_pool2d(F.relu(F.conv2d(*a)), 2),
        (X, W, B),
    ),
    "cross_entropy": (lambda z: PF.cross_entropy(z, LABELS), lambda z: F.cross_entropy(z, LABELS), (LOGITS,)),
    "linear_cross_entropy": (
        lambda x, w: PF.linear_cross_entropy(x, w, LABELS),
        lambda x, w: F.cross_entropy(F.linear(x, w), LABELS),
        (ROWS, HEAD),
    ),
    "embedding_dot": (
        lambda u, v: PF.embedding_dot(USER, ITEM, u, v),
        lambda u, v: (F.embedding(USER, u) * F.embedding(ITEM, v)).sum(-1),
        (TABLE, OTHER),
    ),
    "in_batch_cross_entropy": (
        lambda u, v: PF.in_batch_cross_entropy(USER, ITEM, u, v, mask_accidental_hits=False),
        lambda u, v: F.cross_entropy(u[USER] @ v[ITEM].T, torch.arange(6)),
        (TABLE, OTHER),
    ),
}
ops = pytest.mark.parametrize("op", OPS)


class Layers(nn.Module):
    """One module per op family, on one example."""

    def __init__(self, fused=True):
        super().__init__()
        self.conv = pnn.Conv2dReLUMaxPool2d(3, 4, 3)
        self.conv2 = pnn.Conv2dReLU(4, 4, 3, padding=1)
        self.loss = pnn.LinearCrossEntropyLoss(4 * 9, 5, bias=True)

    def forward(self, x, y):
        return self.loss(self.conv2(self.conv(x)).flatten(1), y)


EXAMPLE = (torch.randn(2, 3, 8, 8, generator=G), torch.tensor([1, 3]))


def leaves(tensors):
    return [t.clone().requires_grad_() for t in tensors]


def same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=1e-4, atol=1e-5)))


def trained(function, tensors):
    given = leaves(tensors)
    out = function(*given)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in given)]


@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(op, dtype):
    fused, eager, tensors = OPS[op]
    if op == "in_batch_cross_entropy":
        eager = lambda u, v: F.cross_entropy((u[USER] @ v[ITEM].T).float(), torch.arange(6))  # noqa: E731
    with torch.autocast("cpu", dtype):
        got, expected = trained(fused, tensors), trained(eager, tensors)
    if op != "in_batch_cross_entropy":
        assert [g.dtype for g in got] == [e.dtype for e in expected]
    same([g.float() for g in got], [e.float() for e in expected], rtol=5e-2, atol=5e-2)


@ops
def test_func_grad(op):
    fused, eager, tensors = OPS[op]
    argnums = tuple(range(len(tensors)))
    same(
        torch.func.grad(lambda *a: fused(*a).square().sum(), argnums)(*tensors),
        torch.func.grad(lambda *a: eager(*a).square().sum(), argnums)(*tensors),
    )


@ops
@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_other_functorch_transforms(op, transform):
    fused, eager, tensors = OPS[op]
    if transform == "vmap":
        stacked = [torch.stack([t, 2 * t]) for t in tensors]
        same([torch.vmap(fused)(*stacked)], [torch.vmap(eager)(*stacked)])
    else:
        tangents = tuple(torch.ones_like(t) for t in tensors)
        same(torch.func.jvp(fused, tensors, tangents), torch.func.jvp(eager, tensors, tangents))


@ops
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(op, reentrant):
    fused, eager, tensors = OPS[op]
    got = trained(lambda *a: checkpoint(fused, *a, use_reentrant=reentrant), tensors)
    same(got, trained(eager, tensors))


@ops
def test_meta_and_fake_tensors(op):
    """Shapes and dtypes without data."""
    fused, _, tensors = OPS[op]
    expected = fused(*tensors)
    if op.startswith("conv"):
        out = fused(*(t.to("meta") for t in tensors))
        assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, "meta")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = fused(*(mode.from_tensor(t) for t in tensors))
        assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors_of_losses_and_embeddings(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        meta_tensors_of_losses_and_embeddings()


def meta_tensors_of_losses_and_embeddings():
    logits, labels, rows, head, ids, table = (t.to("meta") for t in (LOGITS, LABELS, ROWS, HEAD, USER, TABLE))
    for out, shape in (
        (PF.cross_entropy(logits, labels), ()),
        (PF.linear_cross_entropy(rows, head, labels), ()),
        (PF.embedding_dot(ids, ids, table, table), (6,)),
        (PF.in_batch_cross_entropy(ids, ids, table, table), ()),
    ):
        assert (out.shape, out.dtype, out.device.type) == (shape, torch.float32, "meta")


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


@ops
def test_tensor_subclasses(op):
    fused, eager, tensors = OPS[op]
    got = fused(*(t.as_subclass(Tagged) for t in tensors))
    same([got.as_subclass(torch.Tensor)], [eager(*tensors)])


@ops
def test_deterministic_algorithms(op):
    fused, _, tensors = OPS[op]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = trained(fused, tensors), trained(fused, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    torch.manual_seed(0)
    model = nn.Sequential(pnn.Conv2dReLUMaxPool2d(3, 4, 3), pnn.Conv2dReLU(4, 4, 3, padding=1))
    x, batch = EXAMPLE[0], torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert "pyfused.conv2d_relu_max_pool2d" in program.graph_module.print_readable(print_output=False)
    for given in (x, torch.cat([x, x])):
        same([program.module()(given)], [model(given)])
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    same([torch.export.load(stream).module()(x)], [model(x)])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_of_modules(how):
    torch.manual_seed(0)
    model = Layers()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream, twin = io.BytesIO(), Layers()
        torch.save(model if how == "torch.save" else model.state_dict(), stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=how == "state_dict")
        twin.load_state_dict(loaded if how == "state_dict" else loaded.state_dict())
    assert torch.equal(model(*EXAMPLE), twin(*EXAMPLE))


def test_grad_scaler():
    """A scaled loss scales all gradients; an overflow skips the step."""
    torch.manual_seed(0)
    model = Layers()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    grads = torch.autograd.grad(model(*EXAMPLE), list(model.parameters()))
    scaler.scale(model(*EXAMPLE)).backward()
    scaler.unscale_(optimizer)
    same([p.grad for p in model.parameters()], grads)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(EXAMPLE[0] * float("inf"), EXAMPLE[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and scaler.get_scale() == 512.0


def test_data_parallel():
    """Without GPUs it runs the module; its replicas, which share parameters by attribute, on one device."""
    torch.manual_seed(0)
    model = Layers()
    assert torch.equal(nn.DataParallel(model)(*EXAMPLE), model(*EXAMPLE))
    replica = model._replicate_for_data_parallel()
    assert replica.loss is model.loss and torch.equal(replica(*EXAMPLE), model(*EXAMPLE))


# --- A model that fuse has changed
@pytest.fixture
def fused_vgg(fused_wins):
    """(unmodified, fused, example)"""
    torch.manual_seed(0)
    model = _fused_model()
    return pyfused.unfuse(copy.deepcopy(model)), model, _vgg_example()[0]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_fused_under_autocast(fused_vgg):
    plain, model, x = fused_vgg
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(x), plain(x)
    assert got.dtype == expected.dtype
    same([got.float()], [expected.float()], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_fused_under_checkpointing(fused_vgg, reentrant):
    plain, model, x = fused_vgg
    x = x.requires_grad_()
    got = checkpoint(model, x, use_reentrant=reentrant)
    got.square().sum().backward()
    same([p.grad for p in model.parameters()], gradients(plain, plain(x).square().sum()), rtol=1e-3, atol=1e-4)


def test_fused_under_torch_func(fused_vgg):
    """Transforms run the model's own forward, per-sample gradients included."""
    plain, model, x = fused_vgg
    found = []
    for m in (model, plain):
        parameters = {name: p.detach() for name, p in m.named_parameters()}

        def loss(p, one, m=m):
            return torch.func.functional_call(m, p, (one.unsqueeze(0),)).square().sum()

        found.append(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
    same(found[0].values(), found[1].values(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_fused_exports(fused_vgg, strict):
    plain, model, x = fused_vgg
    program = torch.export.export(model.eval(), (x,), strict=strict)
    same([program.module()(x)], [plain.eval()(x)])


def test_fused_is_saved_and_loaded(fused_vgg):
    plain, model, x = fused_vgg
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twin = torch.load(stream, weights_only=False)
    assert any(hasattr(m, "_pyfused_plan") for m in twin.modules()) and torch.equal(twin(x), model(x))
    plain.load_state_dict(model.state_dict())


def test_fused_in_data_parallel(fused_vgg):
    plain, model, x = fused_vgg
    same([nn.DataParallel(model)(x), model._replicate_for_data_parallel()(x)], [plain(x)] * 2)


def test_fused_with_grad_scaler_and_determinism(fused_vgg):
    plain, model, x = fused_vgg
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.use_deterministic_algorithms(True)
    try:
        scaler.scale(model(x).square().sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = gradients(plain, plain(x).square().sum())
    same([p.grad / 1024 for p in model.parameters()], expected, rtol=1e-3, atol=1e-4)


def test_fused_meta_and_fake_tensors(fused_vgg):
    _, model, x = fused_vgg
    from torch._subclasses import FakeTensorMode

    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == model(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == model(x).shape


def test_fused_takes_tensor_subclasses(fused_vgg):
    plain, model, x = fused_vgg
    same([model(x.as_subclass(Tagged)).as_subclass(torch.Tensor)], [plain(x)])


# --- Two processes
def _worker(rank, world, address, results, find, *args):
    """Saves what find(rank, world, *args) gives in the first process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    measure.seconds = lambda eager, fused: [2.0, 1.0]  # in a process of its own: as the fixture fused_wins
    measure.cache_file = lambda: Path(f"{address}.none") / "none"
    try:
        found = find(rank, world, *args)
        if rank == 0:
            torch.save(found, results)
    finally:
        gc.collect()  # a wrapper that outlives its group now and then waits for the group's thread, which waits for it
        dist.destroy_process_group()


def two_processes(folder, find, *args):
    """What find(rank, 2, *args) gives in the first of two."""
    torch.multiprocessing.spawn(
        _worker, (2, str(folder / "rendezvous"), str(folder / "found"), find, *args), nprocs=2, join=True
    )
    return torch.load(folder / "found")


def _wrapped_gradients(rank, world, kind, fused):
    torch.manual_seed(0)
    model = _fused_model() if fused else Layers()
    example = tuple(t[rank : rank + 1] for t in (_vgg_example() if fused else EXAMPLE))
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
    loss_of(wrapped(*example)).backward()
    return _whole_gradients(wrapped)


def _whole_gradients(model):
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def _vgg_example():
    return ARCHITECTURES[1].example(torch.float32)


def _fused_model():
    model = ARCHITECTURES[1].make()
    pyfused.fuse(model, _vgg_example(), verbose=False)
    assert pyfused.fuse_report(model).fused
    return model


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fuse"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, fused, tmp_path):
    """Gradients are the mean of what each process finds for its part of the batch."""
    got = two_processes(tmp_path, _wrapped_gradients, kind, fused)
    torch.manual_seed(0)
    model, example = (ARCHITECTURES[1].make(), _vgg_example()) if fused else (Layers(), EXAMPLE)
    parts = [
        torch.autograd.grad(loss_of(model(*(t[r : r + 1] for t in example))), list(model.parameters()))
        for r in range(2)
    ]
    same(got, [(a + b) / 2 for a, b in zip(*parts)])


def ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def fsdp(*units, **options):
    def wrap(model):
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for unit in units:
            fully_shard(getattr(model, unit), mesh=mesh)
        return fully_shard(model, mesh=mesh, **options)

    return wrap


# How a model with a fused head is wrapped, and whether its logits are still put off.
WRAPPERS = {
    "ddp": (ddp(), True),
    "ddp that looks for unused parameters": (ddp(find_unused_parameters=True), False),
    "ddp of a static graph": (ddp(static_graph=True), False),
    "fsdp2": (fsdp(), True),
    "fsdp2, other units": (fsdp("embedding", "body"), True),
    "fsdp2, the head a unit": (fsdp("head"), False),
    "fsdp2, weights freed after forward": (fsdp(reshard_after_forward=True), False),
}
TOKENS = torch.randint(40, (4, 7), generator=G)


def head_loss(out, read):
    return out["loss"] + out["logits"].square().mean() if read else out["loss"]


def _wrapped_heads(rank, world):
    """By (wrapper, whether the logits are read, too): whether the head's logits are put off, and the gradients."""
    found = {}
    for name, (wrap, _) in WRAPPERS.items():
        torch.manual_seed(0)
        model = LanguageModel()
        pyfused.fuse(model, (TOKENS, TOKENS), verbose=False)
        wrapped, part = wrap(model), TOKENS[2 * rank : 2 * rank + 2]
        for read in (True, False):
            wrapped.zero_grad()
            out = wrapped(part, part)
            put_off = isinstance(out["logits"], PutOff) and out["logits"].value is None
            head_loss(out, read).backward()
            found[name, read] = put_off, _whole_gradients(wrapped)
        if name == "fsdp2":
            with pytest.raises(RuntimeError, match="were put off, and what they are computed from has changed"):
                out["logits"].sum()  # backward has freed the weights
        del out, wrapped, model
        gc.collect()
    return found


def test_heads_in_two_processes(tmp_path):
    """Put off or, where a wrapper needs the logits, not: the gradients are the same."""
    got = two_processes(tmp_path, _wrapped_heads)
    torch.manual_seed(0)
    model = LanguageModel()
    for (name, read), (put_off, grads) in got.items():
        assert put_off == WRAPPERS[name][1], name
        parts = []
        for part in TOKENS.split(2):
            parts.append(torch.autograd.grad(head_loss(model(part, part), read), list(model.parameters())))
        same(grads, [(a + b) / 2 for a, b in zip(*parts)], rtol=1e-4, atol=1e-6)
    assert len(got) == 2 * len(WRAPPERS)
