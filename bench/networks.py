"""Whole networks as other people write them, left to pyfused.fuse: ResNet-18 and -50, a small GPT."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused.models import GPT, resnet18, resnet50
from pyfused.tasks.task import Classification
from pyfused.tasks.text import NextToken

from .models import inference, training_step
from .workloads import Builders, Case, Cost


@dataclass(frozen=True, kw_only=True)
class NetworkStep(Case):
    """A training step with SGD, or the logits of a batch. "pyfused" is what pyfused.fuse makes of the eager model."""

    # A network of 50 layers with BatchNorm multiplies the rounding of its first: eager's two layouts differ by as much.
    gradient_tolerance: ClassVar[float] = 2e-1

    def network(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def with_loss(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError

    def cost(self, direction: str) -> Cost:
        """Matrix products and convolutions; of the bytes, those of the parameters (and their gradients) alone."""
        model = self.network()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(self.inputs()[0])
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        training = direction == "training"
        return Cost(parameters * (4 if training else 1), counter.get_total_flops() * (3 if training else 1))

    def contenders(self, direction: str, device: torch.device) -> Builders:
        template, training = self.network().to(device, self.dtype), direction == "training"
        x, labels = (t.to(device) for t in self.inputs())

        def build(fused, memory_format, compiled=False):
            model = copy.deepcopy(template).to(memory_format=memory_format).train(training)
            batch = x.to(memory_format=memory_format) if x.dim() == 4 else x
            step = self.with_loss(model) if training else model
            given = (batch, labels) if training else (batch,)
            if fused:
                pyfused.fuse(step, given, mode="train" if training else "inference", verbose=False)
            function = torch.compile(step) if compiled else step
            if not training:
                return inference(lambda: function(*given))
            return training_step(lambda: function(*given), model, torch.optim.SGD(model.parameters(), lr=1e-3))

        plain, last = torch.contiguous_format, torch.channels_last
        layouts = {"": plain, " NHWC": last} if x.dim() == 4 else {"": plain}
        found = {f"eager{name}": lambda f=f: build(False, f) for name, f in layouts.items()}
        found |= {f"compile{name}": lambda f=f: build(False, f, compiled=True) for name, f in layouts.items()}
        return {**found, "pyfused": lambda: build(True, last if x.dim() == 4 else plain)}


@dataclass(frozen=True, kw_only=True)
class ResNetStep(NetworkStep):
    """Random pixels in 1000 classes."""

    depth: int
    shape: tuple[int, int, int, int]

    @property
    def op(self) -> str:
        return f"resnet{self.depth}"

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    name = shape_text

    def tiny(self) -> Case:
        return replace(self, shape=(4, 3, 64, 64))

    def network(self) -> nn.Module:
        return {18: resnet18, 50: resnet50}[self.depth]()

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=g).to(self.dtype), torch.randint(1000, self.shape[:1], generator=g)

    def with_loss(self, model: nn.Module) -> nn.Module:
        return Classification(model)


@dataclass(frozen=True, kw_only=True)
class GPTStep(NetworkStep):
    """Random tokens, each to be guessed from those before it."""

    op: ClassVar[str] = "gpt"
    batch: int
    context: int
    vocabulary: int = 50257
    dim: int = 256
    layers: int = 4

    @property
    def shape_text(self) -> str:
        return f"{self.batch}x{self.context} D{self.dim} L{self.layers} V{self.vocabulary}"

    name = shape_text

    def tiny(self) -> Case:
        return replace(self, batch=2, context=8, vocabulary=100, dim=32, layers=1)

    def network(self) -> nn.Module:
        return GPT(self.vocabulary, self.context, self.dim, self.layers)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        return tuple(torch.randint(self.vocabulary, (self.batch, self.context), generator=g) for _ in range(2))

    def with_loss(self, model: nn.Module) -> nn.Module:
        return NextToken(model)
