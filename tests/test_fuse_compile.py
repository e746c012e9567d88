"""torch.compile(model, backend="pyfused"): the same patterns in captured graphs."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, loss_of
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import pyfused
from pyfused.fusion import measure, rival
from pyfused.fusion.backend import compile_graph, fuse_graph
from pyfused.fusion.post_grad import Pass


@pytest.fixture(autouse=True)
def everything_pays(fused_wins, monkeypatch):
    monkeypatch.setattr(rival, "LEAST_LOGITS", 0)
    monkeypatch.setattr(rival, "LEAST_GATHERED", 0)


class Backend:
    """The graphs as rewritten, run by AOTAutograd without Inductor, which takes long to compile."""

    def __init__(self):
        torch._dynamo.reset()
        self.calls = []

    def __call__(self, gm, example_inputs):
        fuse_graph(gm)
        ours = [n for n in gm.graph.nodes if getattr(n.target, "__module__", "").startswith("pyfused.")]
        self.calls += [n.target.__name__ for n in ours]
        return aot_eager(gm, example_inputs)


CALLS = {
    "mnist tutorial": ["conv2d_relu_max_pool2d"] * 2,
    "vgg": ["conv2d_relu_max_pool2d", "conv2d_relu", "conv2d_relu_max_pool2d"],
    "resnet": ["conv2d_relu", *["conv_act"] * 4],  # before norms in training mode
    "resnet without norm": ["conv2d_relu", *["conv2d_relu", "conv_add_act"] * 2],
    "inception": ["conv2d_relu"] * 4 + ["conv2d_relu_max_pool2d"],
    "unet": ["conv2d_relu"] * 3 + ["conv_act", "cross_entropy"],
    "mobilenet": ["conv_act", "conv2d_relu", "conv2d_relu"],
    "frozen": ["conv2d_batch_norm_relu_max_pool2d", "conv2d_relu"],
    "matrix factorization": ["embedding_dot"],
    "ranker": ["embedding_dot", "cross_entropy"],
    "speech": ["conv_act", "conv_add_act"],
    "activations": ["conv2d_batch_norm_act", "conv_add_act", "conv_add_act", *["conv_act"] * 3],
    "language model": [],  # a branch on values, and a GRU, which TorchDynamo does not capture
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_training(architecture):
    torch.manual_seed(0)
    model, example, backend = architecture.make(), architecture.example(torch.float32), Backend()
    plain, compiled = copy.deepcopy(model), torch.compile(model, backend=backend)
    losses = []
    for run in (plain, compiled):
        torch.manual_seed(1)
        losses.append(loss_of(run(*example)))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert backend.calls == CALLS[architecture.name]


@pytest.mark.parametrize("name", ["vgg", "resnet", "frozen", "matrix factorization"])
def test_inference(name):
    """BatchNorm joins the convolution; an embedding product that is not trained is Inductor's."""
    torch.manual_seed(0)
    architecture, backend = next(a for a in ARCHITECTURES if a.name == name), Backend()
    model, example = architecture.make().eval(), architecture.example(torch.float32)
    with torch.no_grad():
        expected = model(*example)
        got = torch.compile(model, backend=backend)(*example)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if name == "resnet":
        assert backend.calls == ["conv2d_relu"] + ["conv2d_batch_norm_relu", "conv2d_batch_norm_add_act"] * 2
    assert ("embedding_dot" in backend.calls) is False


class Head(nn.Module):
    def __init__(self, softcap=None):
        super().__init__()
        self.body, self.head, self.softcap = nn.Linear(8, 8), nn.Linear(8, 12), softcap

    def forward(self, x, labels, keep=False):
        logits = self.head(self.body(x)).float()
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        loss = F.cross_entropy(logits[:, :-1, :].reshape(-1, 12), labels[:, 1:].reshape(-1), ignore_index=0)
        return (loss, logits) if keep else loss


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("softcap, keep", [(None, False), (5.0, False), (None, True)])
def test_heads(softcap, keep, dynamic):
    torch.manual_seed(0)
    model, backend = Head(softcap), Backend()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for length in (5, 6):
        x, labels = torch.randn(3, length, 8), torch.randint(12, (3, length))
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(x, labels, keep)
            (out[0] if keep else out).backward()
            results.append([out[0] if keep else out, *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    assert set(backend.calls) == {"cross_entropy" if keep else "head_loss"}


# --- What is left to Inductor
def compiled_calls(model, *example, **options):
    """Which fused calls torch.compile makes of a model, after one run."""
    backend = Backend()
    torch.compile(model, backend=backend, **options)(*example)
    return backend.calls


CONV = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    "seconds, recorded, kept",
    [
        ([1.0, 0.9], False, True),
        ([1.0, 1.0], False, False),
        ([1.0, 1.0], True, True),
        ([1.0, 1.1], True, False),
    ],
)
def test_convolutions_that_do_not_pay_are_left_to_inductor(seconds, recorded, kept, monkeypatch):
    """Forward it must be faster than the convolution alone; in training no slower than eager."""
    monkeypatch.setattr(measure, "seconds", lambda rival, fused: seconds)
    with torch.set_grad_enabled(recorded):
        assert compiled_calls(copy.deepcopy(CONV), IMAGE) == ["conv2d_relu_max_pool2d"] * kept


@pytest.mark.parametrize("recorded", [False, True])
def test_what_convolutions_race_against(recorded, monkeypatch):
    """Real calls on real tensors: in channels_last, with the pool, and in training with ReLU and gradients."""
    seen, race = [], measure.seconds

    def seconds(rival, fused):
        seen.append([torch.utils._pytree.tree_map(torch.clone, f()) for f in (rival, fused)])
        return race(rival, fused)

    monkeypatch.setattr(measure, "seconds", seconds)
    with torch.set_grad_enabled(recorded):
        compiled_calls(copy.deepcopy(CONV), IMAGE)
    theirs, ours = seen[0]
    assert type(theirs) is type(ours) is torch.Tensor and theirs.shape == ours.shape == (2, 4, 3, 3)
    assert theirs.is_contiguous(memory_format=torch.channels_last) and ours.is_contiguous()
    assert len(seen) == 1 + recorded
    if recorded:
        assert [g.shape for g in seen[1][0]] == [g.shape for g in seen[1][1]] == [(4, 3, 3, 3), (4,)]


def test_times_of_convolutions_are_remembered(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "seconds", lambda rival, fused: calls.append(1) or [2.0, 1.0])
    random = torch.get_rng_state()
    for _ in range(2):
        compiled_calls(copy.deepcopy(CONV), IMAGE)
    assert len(calls) == 2 and all(key.startswith("compiled conv2d") for key in measure._read())
    assert torch.equal(random, torch.get_rng_state())
    pyfused.fuse(copy.deepcopy(CONV), IMAGE, verify=False, verbose=False)
    assert len(calls) == 4  # against another rival


def test_sizes_that_change_are_not_fixed_by_measuring():
    model, backend = copy.deepcopy(CONV), Backend()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for size in (8, 9, 12):
        x = torch.randn(size, 3, size, size + 1)
        torch.testing.assert_close(compiled(x), model(x))
    assert backend.calls == ["conv2d_relu_max_pool2d"]


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_convolutions_under_autocast_are_measured_in_its_dtype(where):
    model = Autocast(*CONV) if where == "inside" else CONV
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        compiled_calls(copy.deepcopy(model), IMAGE)
    (key,) = measure._read()
    assert "bfloat16[2, 3, 8, 8]" in key


class SparseFactors(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.user, self.item = (nn.Embedding(50, 8, sparse=sparse) for _ in range(2))

    def forward(self, ids):
        return (self.user(ids) * self.item(ids)).sum(-1)


def test_small_losses_and_products_are_left_to_inductor(monkeypatch):
    ids, logits = torch.arange(32), torch.randn(32, 12, requires_grad=True)
    labels, head = ids % 12, Head()
    for least in (32 * 12 * 4, 32 * 12 * 4 + 1):
        monkeypatch.setattr(rival, "LEAST_LOGITS", least)
        kept = least == 32 * 12 * 4
        assert compiled_calls(nn.CrossEntropyLoss(), logits, labels) == ["cross_entropy"] * kept
        rows = torch.randn(4, 8, 8)
        assert compiled_calls(head, rows, labels.view(4, 8)) == ["head_loss"] * kept
    for least in (32 * 8, 32 * 8 + 1):
        monkeypatch.setattr(rival, "LEAST_GATHERED", least)
        kept = least == 32 * 8
        assert compiled_calls(SparseFactors(False), ids) == ["embedding_dot"] * kept
    monkeypatch.setattr(rival, "LEAST_GATHERED", 0)
    with torch.no_grad():
        assert compiled_calls(SparseFactors(False), ids) == []
    assert compiled_calls(SparseFactors(True), ids) == []


def test_with_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    architecture = next(a for a in ARCHITECTURES if a.name == "resnet")
    model, (x,) = architecture.make(), architecture.example(torch.float32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compile_graph, options={"epilogue_fusion": True})
    a, b = compiled(x), plain(x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for y in (a, b):
        y.square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training, pays", [(False, True), (True, True), (False, False)])
def test_as_a_pass_of_inductor(training, pays, monkeypatch):
    """After AOTAutograd: the forward convolution and its ReLU are one call, and Inductor fuses the rest."""
    if not pays:
        monkeypatch.setattr(measure, "seconds", lambda rival, fused: [1.0, 1.0])
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Sigmoid())
    plain, x, seen = copy.deepcopy(model), torch.randn(2, 3, 8, 8), []

    class Counting(Pass):
        def __call__(self, graph):
            super().__call__(graph)
            seen.append([n.target.name() for n in graph.nodes if getattr(n.target, "namespace", "") == "pyfused"])

    options = {"post_grad_custom_pre_pass": Counting(), "fx_graph_cache": False}
    compiled = torch.compile(model, options=options)
    with torch.set_grad_enabled(training):
        got, expected = compiled(x), plain(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert seen[0] == ["pyfused::conv2d_relu"] * pays
    if training:
        for y in (got, expected):
            y.square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert Pass().uuid() == f"pyfused {pyfused.__version__}"


def test_a_fused_model_compiles_whole():
    """pyfused.fuse, then torch.compile: one graph, guards and all."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    pyfused.fuse(model, x, verbose=False)
    assert pyfused.fuse_report(model).fused
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_the_entry_point_is_the_backend():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    module, function = re.search(r'torch_dynamo_backends\]\npyfused = "(.+):(.+)"', text).groups()
    assert getattr(importlib.import_module(module), function) is compile_graph
