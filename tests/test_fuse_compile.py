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
from pyfused.fusion.backend import compile_graph, fuse_graph


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
    "resnet": ["conv2d_relu"],
    "resnet without norm": ["conv2d_relu", *["conv2d_relu", "conv_add_act"] * 2],
    "inception": ["conv2d_relu"] * 4 + ["conv2d_relu_max_pool2d"],
    "unet": ["conv2d_relu"] * 3 + ["cross_entropy"],
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


@pytest.mark.parametrize("training", [False, True])
def test_as_a_pass_of_inductor(training):
    """After AOTAutograd: the forward convolution and its ReLU are one call, and Inductor fuses the rest."""
    from pyfused.fusion.post_grad import Pass

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
    assert seen[0] == ["pyfused::conv2d_relu"]
    if training:
        for y in (got, expected):
            y.square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert Pass().uuid() == f"pyfused {pyfused.__version__}"


def test_a_fused_model_compiles_whole(fused_wins):
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
