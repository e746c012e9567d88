"""Whole steps of small networks: what a user of the package gets in the end, optimizer included."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import pyfused
import pyfused.functional as PF
import pyfused.nn as pnn
from pyfused.models import MatrixFactorization, MnistCNN

from .convolutions import Conv
from .harness import Contender
from .workloads import Builders, Case, Cost


def training_step(loss_of: Callable, model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """zero_grad, forward, backward, step. The result to agree on is the loss and the gradients before any step."""
    # By name: two models may declare their parameters in different orders.
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]

    def gradients():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return [loss.detach(), *(p.grad for p in parameters)]

    def run():
        gradients()
        optimizer.step()

    return Contender(run, gradients)


def step_in_backward(loss_of: Callable, optimizer: torch.optim.Optimizer | None, rows: Callable) -> Contender:
    """A training step that may leave no gradient to compare: the results are the loss and how a step moves `rows()`."""

    def run():
        if optimizer is not None:
            optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    def result():
        before = rows()
        return [run(), *(b - a for a, b in zip(before, rows(), strict=True))]

    return Contender(run, result)


def inference(function: Callable) -> Contender:
    @torch.no_grad()
    def run():
        return [function()]

    return Contender(run, run)


@dataclass(frozen=True, kw_only=True)
class MnistStep(Case):
    """The CNN of the demo on random pixels: a training step with Adam, or the scores of a batch."""

    op: ClassVar[str] = "mnist_cnn"
    gradient_tolerance: ClassVar[float] = 5e-2
    batch: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}"

    @property
    def shape_text(self) -> str:
        return f"{self.batch}x1x28x28"

    def tiny(self) -> Case:
        return replace(self, batch=2)

    def cost(self, direction: str) -> Cost:
        n, layer = self.batch, dict(dtype=self.dtype, why="")
        layers = [
            Conv(shape=(n, 1, 28, 28), out=32, pool=True, first=True, **layer),
            Conv(shape=(n, 32, 13, 13), out=64, pool=True, **layer),
            Conv(shape=(n, 64, 5, 5), out=64, **layer),
            Conv(shape=(n, 576, 1, 1), out=64, kernel=1, **layer),  # a dense layer is a convolution of one pixel
            Conv(shape=(n, 64, 1, 1), out=10, kernel=1, **layer),
        ]
        costs = [c.cost(direction) for c in layers]
        return Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs))

    def contenders(self, direction: str, device: torch.device) -> Builders:
        template = MnistCNN().to(device, self.dtype)
        pixels = torch.randn(self.batch, 1, 28, 28, device=device).to(self.dtype)
        labels = torch.randint(10, (self.batch,), device=device)

        def build(fused, memory_format, compiled=False):
            model = (fused_mnist_cnn() if fused else MnistCNN()).to(device, self.dtype)
            model.load_state_dict(template.state_dict())
            model.train(direction == "training")
            model.to(memory_format=torch.channels_last if fused else memory_format)
            x = pixels.to(memory_format=memory_format)
            if direction == "forward":
                function = torch.compile(model) if compiled else model
                return inference(lambda: function(x))
            criterion = PF.cross_entropy if fused else F.cross_entropy

            def loss_of(x, labels):
                return criterion(model(x), labels)

            function = torch.compile(loss_of) if compiled else loss_of
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            return training_step(lambda: function(x, labels), model, optimizer)

        plain, last = torch.contiguous_format, torch.channels_last
        return {
            "eager": lambda: build(False, plain),
            "eager NHWC": lambda: build(False, last),
            "compile": lambda: build(False, plain, compiled=True),
            "compile NHWC": lambda: build(False, last, compiled=True),
            "pyfused": lambda: build(True, plain),
        }


def fused_mnist_cnn() -> MnistCNN:
    """What pyfused.fuse makes of its convolutions, whatever it would measure at this moment."""
    model = MnistCNN()
    layers = {
        "0": pnn.Conv2dReLUMaxPool2d(1, 32, 3),
        "3": pnn.Conv2dReLUMaxPool2d(32, 64, 3),
        "6": pnn.Conv2dReLU(64, 64, 3),
    }
    model.features = nn.Sequential(OrderedDict(layers))
    return model


class FusedFactorization(MatrixFactorization):
    """The same with the fused scores."""

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        tables = (self.user.weight, self.item.weight)
        return PF.embedding_dot(user, item, *tables, item_bias=self.item_bias.weight)


class EagerDot(nn.Module):
    """Two sparse nn.Embedding and a product: what `pyfused.nn.EmbeddingDot` replaces."""

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.user, self.item = (nn.Embedding(rows, dim, sparse=True) for rows in (users, items))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.user(user) * self.item(item)).sum(-1)


class FbgemmDot(nn.Module):
    """FBGEMM's table-batched embedding (bags of one row), whose backward takes the step, and a product in PyTorch."""

    def __init__(self, users: int, items: int, dim: int, optimizer: str, lr: float) -> None:
        super().__init__()
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation

        self.tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, training.ComputeDevice.CPU) for rows in (users, items)],
            optimizer=training.OptimType[optimizer],
            learning_rate=lr,
            eps=1e-10,  # torch.optim.Adagrad's
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        self.user, self.item = self.tables.split_embedding_weights()

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([user, item])
        rows = self.tables(ids, torch.arange(len(ids) + 1))
        return torch.mul(*rows.chunk(2, 1)).sum(-1)


SPARSE_OPTIMIZERS = {  # torch's, which takes sparse gradients; ours; FBGEMM's on the CPU
    "SGD": (torch.optim.SGD, pyfused.optim.SGD, "EXACT_SGD"),
    "Adagrad": (torch.optim.Adagrad, pyfused.optim.Adagrad, "EXACT_ADAGRAD"),
    "Adam": (torch.optim.SparseAdam, pyfused.optim.Adam, None),
}


@dataclass(frozen=True, kw_only=True)
class RecommenderStep(Case):
    """Scores of user-item pairs and a squared error: dense tables with Adam, or large tables with sparse gradients.

    In the latter "pyfused" takes the step in the backward; "pyfused sparse" gives torch's optimizer its gradients.
    """

    op: ClassVar[str] = "recommender"
    batch: int
    users: int
    items: int
    dim: int
    sparse: bool = False
    optimizer: str = "SGD"  # of sparse gradients

    @property
    def name(self) -> str:
        extra = f" sparse {self.optimizer}" if self.sparse else ""
        return f"batch {self.batch} of {self.users}x{self.items} D{self.dim}{extra}"

    @property
    def shape_text(self) -> str:
        return f"{self.batch} of {self.users}x{self.items} D{self.dim}"

    def tiny(self) -> Case:
        return replace(self, batch=8, users=16, items=16)

    def cost(self, direction: str) -> Cost:
        row = self.dim * self.dtype.itemsize
        forward = Cost(2 * self.batch * (row + 8), 2 * self.batch * self.dim)
        if direction == "forward":
            return forward
        # Backward gathers again. A sparse step updates those rows and their state, Adam every row, moment and gradient.
        copies = {"SGD": 1, "Adagrad": 2, "Adam": 3}[self.optimizer]
        updated = 4 * copies * self.batch * row if self.sparse else (self.users + self.items) * row * 8
        return Cost(2 * forward.bytes + updated, 3 * forward.flops)

    def _model(self, fused: bool) -> nn.Module:
        if not self.sparse:
            return (FusedFactorization if fused else MatrixFactorization)(self.users, self.items, self.dim)
        if fused:
            return pnn.EmbeddingDot(self.users, self.items, self.dim, sparse=True)
        return EagerDot(self.users, self.items, self.dim)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        template = self._model(False).to(device, self.dtype)
        user, item = (torch.randint(n, (self.batch,), device=device) for n in (self.users, self.items))
        rating = torch.randn(self.batch, device=device).to(self.dtype)

        theirs, ours, fbgemms = SPARSE_OPTIMIZERS[self.optimizer]
        lr = 1e-3
        if self.sparse:  # SGD's is that of a sum over the batch: a step must exceed rounding
            lr = 1e-3 * self.batch if self.optimizer == "SGD" else 1e-2

        def build(fused, compiled=False, in_backward=False):
            model = self._model(fused).to(device, self.dtype)
            model.load_state_dict(template.state_dict())

            def loss_of(user, item, rating):
                return F.mse_loss(model(user, item), rating)

            if direction == "forward":
                function = torch.compile(model) if compiled else model
                return inference(lambda: function(user, item))
            function = torch.compile(loss_of) if compiled else loss_of
            if not self.sparse:
                optimizer = torch.optim.Adam(model.parameters(), lr)
                return training_step(lambda: function(user, item, rating), model, optimizer)
            optimizer = (ours if in_backward else theirs)(model.parameters(), lr)
            model.optimizer = optimizer if in_backward else None
            return step_in_backward(lambda: function(user, item, rating), optimizer, lambda: rows_of(model))

        def rows_of(model):
            return [model.user.weight.detach()[user], model.item.weight.detach()[item]]

        def fbgemm():
            model = FbgemmDot(self.users, self.items, self.dim, fbgemms, lr)
            model.user.copy_(template.user.weight.detach())
            model.item.copy_(template.item.weight.detach())

            def loss():
                return F.mse_loss(model(user, item), rating)

            return step_in_backward(loss, None, lambda: [model.user[user], model.item[item]])

        found = {
            "eager": lambda: build(False),
            "compile": lambda: build(False, compiled=True),
            "pyfused": lambda: build(True, in_backward=True),
        }
        if not self.sparse or direction == "forward":
            return found
        if fbgemms and importlib.util.find_spec("fbgemm_gpu") and device.type == "cpu" and self.dtype == torch.float32:
            found["FBGEMM"] = fbgemm
        return {**found, "pyfused sparse": lambda: build(True)}
