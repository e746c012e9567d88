"""The kinds of workload: one class an op, with its contenders and its model of bytes and flops.

`cost` counts what the fused op cannot avoid: every input read once, every output written once, in the backward again
the saved tensors and the upstream gradient. The same count serves every contender, so GB/s is useful bytes over time,
whatever a contender moves besides. Convolution flops are those of the direct algorithm; Winograd does fewer, so it can
exceed the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import pyfused.functional as PF
from pyfused.ops.in_batch_cross_entropy import reference as in_batch_reference

from .harness import Contender, step
from .peers import PEERS

Builders = dict[str, Callable[[], Contender]]


class Cost(NamedTuple):
    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload. `contenders` builds lazily: a rival that fails to build does not take the others with it."""

    why: str
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("forward", "training")
    memory: bool = False  # also measure peak extra memory

    gradient_tolerance: ClassVar[float] = 0.0

    @property
    def name(self) -> str:
        """What tells the case from the op's others."""
        return self.shape_text

    def title(self, direction: str) -> str:
        return f"{self.op} {self.name} {str(self.dtype).removeprefix('torch.')} {direction}"


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Case):
    """cross_entropy of logits (N, C, d1, ...) with class indices, or with probabilities (soft=True)."""

    op: ClassVar[str] = "cross_entropy"
    shape: tuple[int, ...]
    soft: bool = False
    label_smoothing: float = 0.0

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        extras = [" soft"] * self.soft + [f" smoothing {self.label_smoothing}"] * bool(self.label_smoothing)
        return self.shape_text + "".join(extras)

    def tiny(self) -> Case:
        return replace(self, shape=(4, 8) + (1,) * (len(self.shape) - 2))

    def cost(self, direction: str) -> Cost:
        logits = math.prod(self.shape)
        targets = logits * self.dtype.itemsize if self.soft else logits // self.shape[1] * 8
        if direction == "forward":  # read; maximum, subtraction, exponential and sum count as one flop each
            return Cost(logits * self.dtype.itemsize + targets, 4 * logits)
        return Cost(3 * logits * self.dtype.itemsize + 2 * targets, 7 * logits)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        logits = (3 * torch.randn(self.shape, device=device)).to(self.dtype).requires_grad_()
        if self.soft:
            target = torch.randn(self.shape, device=device).softmax(1).to(self.dtype)
        else:
            target = torch.randint(self.shape[1], (self.shape[0], *self.shape[2:]), device=device)

        def contender(function):
            return step(function, [(logits, target)], [logits], direction)

        eager, fused = (partial(f, label_smoothing=self.label_smoothing) for f in (F.cross_entropy, PF.cross_entropy))
        plain = logits.is_cuda and logits.dim() == 2 and not self.soft and not self.label_smoothing
        return {
            "eager": lambda: contender(eager),
            "compile": lambda: contender(torch.compile(eager)),
            "pyfused": lambda: contender(fused),
            **{name: lambda f=f: contender(f) for name, f in PEERS[self.op].items() if plain},
        }


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Case):
    """cross_entropy(linear(x, weight), target): `rows` tokens of `features`, `classes` words."""

    op: ClassVar[str] = "linear_cross_entropy"
    rows: int
    features: int
    classes: int

    @property
    def shape_text(self) -> str:
        return f"{self.rows}x{self.features}x{self.classes}"

    def tiny(self) -> Case:
        return replace(self, rows=8, features=8, classes=16)

    def cost(self, direction: str) -> Cost:
        inputs = (self.rows * self.features + self.classes * self.features) * self.dtype.itemsize + 8 * self.rows
        product = 2 * self.rows * self.features * self.classes
        if direction == "forward":
            return Cost(inputs, product)
        # Logits, input gradient, weight gradient: three products when the logits are kept, one more to get them again.
        return Cost(3 * inputs, 3 * product)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        x = torch.randn(self.rows, self.features, device=device).to(self.dtype).requires_grad_()
        weight = torch.randn(self.classes, self.features, device=device).mul_(self.features**-0.5).to(self.dtype)
        weight.requires_grad_()
        target = torch.randint(self.classes, (self.rows,), device=device)

        def eager(x, weight, target):
            return F.cross_entropy(F.linear(x, weight), target)

        def chunked(x, weight, target):
            return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())

        def contender(function):
            return step(function, [(x, weight, target)], [x, weight], direction)

        return {
            "eager": lambda: contender(eager),
            "compile": lambda: contender(torch.compile(eager)),
            "torch chunked": lambda: contender(chunked),
            "pyfused": lambda: contender(PF.linear_cross_entropy),
            **{name: lambda f=f: contender(f) for name, f in PEERS[self.op].items() if x.is_cuda},
        }


@dataclass(frozen=True, kw_only=True)
class EmbeddingDot(Case):
    """Dot products of `batch` user rows with one item row each, or with `candidates` item rows each."""

    op: ClassVar[str] = "embedding_dot"
    batch: int
    table_rows: int
    dim: int = 64
    candidates: int = 0
    zipf: bool = False
    sparse: bool = False

    id_batches: ClassVar[int] = 4

    @property
    def shape_text(self) -> str:
        ids = f"{self.batch}x{self.candidates}" if self.candidates else f"{self.batch}"
        return f"{ids} of {self.table_rows} D{self.dim}"

    @property
    def name(self) -> str:
        return self.shape_text + (" Zipf" if self.zipf else " uniform") + " sparse" * self.sparse

    def tiny(self) -> Case:
        return replace(self, batch=8, table_rows=16, candidates=min(self.candidates, 4))

    def cost(self, direction: str) -> Cost:
        scores = self.batch * max(self.candidates, 1)
        gathered = (self.batch + scores) * (self.dim * self.dtype.itemsize + 8)
        forward = Cost(gathered + scores * self.dtype.itemsize, 2 * scores * self.dim)
        if direction == "forward":
            return forward
        # Backward gathers again; it writes every row of a dense gradient, or at most one row an id of a sparse one.
        written = min(self.batch, self.table_rows) + min(scores, self.table_rows)
        written = (written if self.sparse else 2 * self.table_rows) * self.dim * self.dtype.itemsize
        return Cost(2 * forward.bytes + written, 3 * forward.flops)

    def _ids(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if not self.zipf:
            return torch.randint(self.table_rows, shape, device=device)
        # Log-uniform ranks have probability ~ 1 / rank; a fixed shuffle keeps hot rows from being neighbours.
        ranks = (self.table_rows ** torch.rand(shape, dtype=torch.float64)).long() - 1
        shuffle = torch.randperm(self.table_rows, generator=torch.Generator().manual_seed(2))
        return shuffle[ranks].to(device)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        tables = [torch.randn(self.table_rows, self.dim, device=device).to(self.dtype).requires_grad_() for _ in "ui"]
        items = (self.batch, self.candidates) if self.candidates else (self.batch,)
        batches = [
            (self._ids((self.batch,), device), self._ids(items, device), *tables) for _ in range(self.id_batches)
        ]

        def rows(ids, weight):
            return F.embedding(ids, weight, sparse=self.sparse)

        def eager(user, item, user_weight, item_weight):
            u, v = rows(user, user_weight), rows(item, item_weight)
            return ((u.unsqueeze(1) if self.candidates else u) * v).sum(-1)

        def bmm(user, item, user_weight, item_weight):
            u, v = rows(user, user_weight), rows(item, item_weight)
            return torch.bmm(v, u.unsqueeze(-1)).squeeze(-1)

        def fused(user, item, user_weight, item_weight):
            return PF.embedding_dot(user, item, user_weight, item_weight, sparse=self.sparse)

        def contender(function):
            return step(function, batches, tables, direction)

        return {
            "eager": lambda: contender(eager),
            **({"eager bmm": lambda: contender(bmm)} if self.candidates else {}),
            "compile": lambda: contender(torch.compile(eager)),
            "pyfused": lambda: contender(fused),
        }


@dataclass(frozen=True, kw_only=True)
class InBatchCrossEntropy(Case):
    """Softmax loss of `batch` (user, item) pairs against each other's items, accidental hits masked."""

    op: ClassVar[str] = "in_batch_cross_entropy"
    batch: int
    table_rows: int = 100_000
    dim: int = 64

    id_batches: ClassVar[int] = 4

    @property
    def shape_text(self) -> str:
        return f"{self.batch} of {self.table_rows} D{self.dim}"

    def tiny(self) -> Case:
        return replace(self, batch=8, table_rows=16)

    def cost(self, direction: str) -> Cost:
        gathered = 2 * self.batch * (self.dim * self.dtype.itemsize + 8)
        product = 2 * self.batch**2 * self.dim
        if direction == "forward":
            return Cost(gathered, product)
        # The scores' product and one for each table's gradient; the gradients are dense.
        gradients = 2 * self.table_rows * self.dim * self.dtype.itemsize
        return Cost(gathered + gradients, 3 * product)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        def table():
            return torch.randn(self.table_rows, self.dim, device=device).mul_(self.dim**-0.5).to(self.dtype)

        tables = [table().requires_grad_() for _ in "ui"]
        batches = [
            (*torch.randint(self.table_rows, (2, self.batch), device=device), *tables) for _ in range(self.id_batches)
        ]

        def contender(function):
            return step(function, batches, tables, direction)

        return {
            "eager": lambda: contender(in_batch_reference),
            "compile": lambda: contender(torch.compile(in_batch_reference)),
            "pyfused": lambda: contender(PF.in_batch_cross_entropy),
        }
