"""Calls of registered ops: directly where PyTorch's dispatcher would change nothing, through it where it would."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyfused.functional as PF
from pyfused import _library
from pyfused.ops import cross_entropy as op

OPTIONS = op.packed_options("mean", -100, 0.0, 0.0, None)


def undisturbed(*tensors):
    return _library.undisturbed(tensors, range(len(tensors)))


class Subclass(torch.Tensor):
    pass


def lazily_negated(x: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor whose sign is flipped lazily."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize(
    "context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
@pytest.mark.parametrize(
    "make", [torch.rand, lambda *s: torch.nn.Parameter(torch.rand(*s))], ids=["tensor", "parameter"]
)
def test_plain_tensors_are_called_directly(context, make):
    with context():
        x = make(3, 4)
        assert undisturbed(x, torch.zeros(3, dtype=torch.int64), None)


def test_within_autograd_functions_too():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(undisturbed(x))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(undisturbed(grad))
            return grad

    Probe.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [True, True]


@pytest.mark.parametrize(
    "context",
    [
        FakeTensorMode,
        TorchDispatchMode,
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),  # a mode of __torch_function__
        torch.profiler.profile,
    ],
    ids=["fake", "dispatch mode", "flop counter", "function mode", "profiler"],
)
def test_modes_see_the_registered_op(context):
    x = torch.ones(2)
    with context():
        assert not undisturbed(x)
    assert undisturbed(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).as_subclass(Subclass),
        lambda: FakeTensorMode().from_tensor(torch.ones(2)),
        lambda: torch.ones(2, device="meta"),
        lambda: lazily_negated(torch.ones(2)),
    ],
    ids=["subclass", "fake", "meta", "negated"],
)
def test_other_tensors_go_to_the_registered_op(make):
    assert not undisturbed(torch.ones(2), None, make())


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(f)(torch.ones(2, 3)),
        lambda f: torch.func.functionalize(f)(torch.ones(2)),
        lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
        lambda f: torch.jit.trace(f, torch.ones(2), check_trace=False),
        lambda f: torch.fx.experimental.proxy_tensor.make_fx(f)(torch.ones(2)),
        lambda f: torch.compile(f, backend="eager", fullgraph=True)(torch.ones(2)),
    ],
    ids=["vmap", "functionalize", "jvp", "jit.trace", "make_fx", "compile"],
)
def test_transforms_see_the_registered_op(transform):
    seen = []

    def probe(x):
        seen.append(undisturbed(x))
        return x + 1

    transform(probe)
    assert seen[-1] is False


def test_a_graph_holds_the_registered_ops():
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))

    def gradient(x):
        return torch.autograd.grad(PF.cross_entropy(x, target), x)[0]

    graph = torch.fx.experimental.proxy_tensor.make_fx(gradient)(x)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"pyfused.cross_entropy.default", "pyfused.cross_entropy_backward.default"} <= called


def test_profiles_name_the_ops():
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    with torch.profiler.profile() as profile:
        PF.cross_entropy(x, target).backward()
    names = {event.name for event in profile.events()}
    assert {"pyfused::cross_entropy", "pyfused::cross_entropy_backward"} <= names


def test_lazily_negated_logits_and_gradients():
    """A kernel that reads memory directly would see the other sign."""
    x, target = torch.randn(6, 5), torch.randint(5, (6,))
    negated = lazily_negated(x).requires_grad_()
    assert negated.is_neg()
    loss = PF.cross_entropy(negated, target, reduction="none")
    plain = x.clone().requires_grad_()
    expected = PF.cross_entropy(plain, target, reduction="none")
    assert torch.equal(loss, expected)
    upstream = torch.linspace(1, 2, 6)
    got = torch.autograd.grad(loss, negated, lazily_negated(upstream))[0]
    assert torch.equal(got, torch.autograd.grad(expected, plain, upstream)[0])


def test_direct_and_registered_agree():
    x, target = torch.randn(6, 5), torch.randint(5, (6,))
    args = (x, target, None, True, *OPTIONS)
    registered = torch.ops.pyfused.cross_entropy.default(*args)
    assert all(torch.equal(a, b) for a, b in zip(op._forward(*args), registered, strict=True))
