"""A match with the tensors it was called with: how fast and how exact its fused call is, and whether to keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dispatch
from . import measure
from .graph import Attr, Match, alone, compiled, inputs_of, rewrite
from .report import Row


class Recorder(fx.Interpreter):
    """Runs a forward's original graph and keeps what its matches take: {match.key: tensors}."""

    def __init__(self, module: nn.Module, graph: fx.Graph, matches: Sequence[Match], found: dict):
        super().__init__(module, graph=graph)
        self.matches, self.found = matches, found

    def run_node(self, node: fx.Node):
        for match in self.matches:
            # Before the first node that takes it writes to it, if it does.
            for value in inputs_of(match):
                known = self.found.setdefault(match.key, {})
                if isinstance(value, fx.Node) and value in self.env and value not in known:
                    known[value] = _copy(self.env[value])
        return super().run_node(node)


def _copy(x):
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


class RecordPlan:
    """What a module does while its matches' inputs are recorded, once."""

    code = "nothing to compile"

    def __init__(self, base: type, signature, graph: fx.Graph, matches: list[Match]):
        self.base, self.signature, self.graph, self.matches, self.found = base, signature, graph, matches, None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        tensors = self.signature.tensors(args, kwargs)
        if tensors is None or self.found is not None:
            return self.base.forward(module, *args, **kwargs)
        self.found = {}
        return Recorder(module, self.graph, self.matches, self.found).run(*tensors)


@dataclass(frozen=True)
class Candidate:
    """Two functions without arguments, and the tensors that training wants gradients of."""

    row: Row
    key: str
    eager: Callable
    fused: Callable
    needed: Sequence[torch.Tensor]

    def judge(self, training: bool) -> Row:
        """Measure, and say in `reason` why not if it is not faster."""
        training = training and bool(self.needed)
        times = measure.times_of(self.key, self.eager, self.fused, self.needed, training)
        row = replace(
            self.row,
            backend=_backend(self.fused),
            forward=times.speedup(training=False),
            training=times.speedup(training=True),
            error=_error(self.eager, self.fused, self.needed if training else ()),
        )
        decisive = row.training if training else row.forward
        if decisive < measure.MARGIN:
            row.reason = f"not faster here: {decisive:.2f} times eager's speed, {measure.MARGIN} is asked for"
        return row


def of_match(match: Match, module: nn.Module, path: str, inputs: dict) -> Candidate:
    """The candidate of a match in `module`'s forward; `inputs` as its Recorder found them."""
    values = [inputs[x] for x in inputs_of(match) if isinstance(x, fx.Node)]
    attributes = [attribute(module, x) for x in inputs_of(match) if isinstance(x, Attr)]
    graph, inner = alone(match)
    eager = compiled(graph)
    rewrite(graph, [inner])
    fused = compiled(graph)
    tensors = [x for x in (*values, *attributes) if isinstance(x, torch.Tensor)]
    options = [x for x in (*match.args, *match.kwargs.values()) if not isinstance(x, (Attr, fx.Node))]
    row = Row(".".join(filter(None, (path, match.place))), match.pattern, note=match.note)
    key = f"{match.pattern}: {measure.describe(*values, *attributes, *options)}"
    needed = [x for x in tensors if x.requires_grad]
    return Candidate(row, key, lambda: eager(module, *values), lambda: fused(module, *values), needed)


def attribute(module: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


class _Ops(TorchDispatchMode):
    """The backends that pyfused's ops choose while this is on."""

    def __init__(self):
        super().__init__()
        self.chosen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pyfused":
            op = function.name().partition("::")[2]
            self.chosen += [b for b, answer in dispatch.explain(op, *args).items() if answer.startswith("chosen")]
        return function(*args, **(kwargs or {}))


def _backend(fused: Callable) -> str:
    with _Ops() as ops, torch.no_grad():
        fused()
    return ops.chosen[0] if ops.chosen else "PyTorch"


def _error(eager: Callable, fused: Callable, needed: Sequence[torch.Tensor]) -> float:
    with torch.set_grad_enabled(bool(needed)):
        expected, got = [eager()], [fused()]
        if needed:
            g = torch.Generator().manual_seed(0)
            upstream = torch.randn(expected[0].shape, generator=g).to(expected[0])
            for results in (expected, got):
                results += torch.autograd.grad(results[0], needed, upstream, allow_unused=True)
    return max(difference(a, b) for a, b in zip(got, expected) if b is not None)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one is finite and the other is not."""
    got, expected = (x.detach().to_dense() if x.is_sparse else x.detach() for x in (got, expected))
    if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    got, expected = got[finite].double(), expected[finite].double()
    if not expected.numel():
        return 0.0
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
