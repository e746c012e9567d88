"""Whole models through pyfused.fuse and through torch.compile(backend="pyfused"), against the same unmodified."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused.models import resnet18, resnet50

from . import networks
from .harness import Contender
from .models import inference, training_step
from .workloads import Builders, Case, Cost


def fuse(model: nn.Module, example, mode: str) -> nn.Module:
    """Judged anew: what a run on a busier machine remembered must not decide."""
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": empty}):
        return pyfused.fuse(model, example, mode=mode, verbose=False)


@cache
def forward_cost(make: Callable, sizes: tuple, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Parameters and input read once; flops of matrix products and convolutions."""
    torch.manual_seed(0)
    model, x = make(*sizes), None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = example_of(make, shape, torch.device("cpu"))
        model(**x) if isinstance(x, dict) else model(x)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(itemsize * parameters, counter.get_total_flops())


def example_of(make: Callable, shape: tuple[int, ...], device: torch.device):
    """Pixels; or what a transformer takes: tokens or sound, with labels."""
    if make in (networks.gpt, networks.marian):
        tokens = torch.randint(1, 1000, shape, device=device)
        return {"input_ids": tokens, "labels": tokens}
    if make is networks.wav2vec2:
        labels = torch.randint(1, 32, (shape[0], 10), device=device)
        return {"input_values": torch.randn(shape, device=device), "labels": labels}
    return torch.randn(shape, device=device)


@dataclass(frozen=True, kw_only=True)
class FusedModel(Case):
    """A training step with SGD, or the outputs, of a network; `sizes` are its arguments."""

    op: ClassVar[str] = "fused_model"
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    gradient_tolerance: float = 5e-2

    @property
    def name(self) -> str:
        return " ".join([self.make.__name__, self.shape_text, *map(str, self.sizes)])

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def images(self) -> bool:
        return len(self.shape) == 4

    def tiny(self) -> Case:
        return replace(self, shape=(2, 3, 32, 32)) if self.images else self

    def cost(self, direction: str) -> Cost:
        forward = forward_cost(self.make, self.sizes, self.shape, self.dtype.itemsize)
        return forward if direction == "forward" else Cost(3 * forward.bytes, 3 * forward.flops)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        template, mode = (
            self.make(*self.sizes).to(device, self.dtype),
            "inference" if direction == "forward" else "train",
        )
        example = example_of(self.make, self.shape, device)
        labels = torch.randint(10, self.shape[:1], device=device)

        def build(memory_format, fused=False, compiled=None) -> Contender:
            model = self.make(*self.sizes).to(device, self.dtype)
            model.load_state_dict(template.state_dict())
            model.train(direction == "training")
            given = example
            if self.images:
                model.to(memory_format=memory_format)
                given = example.to(self.dtype, memory_format=memory_format)
            if fused:
                fuse(model, given, mode)
            function = torch.compile(model, backend=compiled) if compiled else model

            def outputs():
                return function(**given) if isinstance(given, dict) else function(given)

            if direction == "forward":
                return inference(lambda: outputs() if self.images else outputs().logits)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
            loss = (lambda: F.cross_entropy(outputs(), labels)) if self.images else (lambda: outputs().loss)
            return training_step(loss, model, optimizer)

        plain, last = torch.contiguous_format, torch.channels_last
        layouts = {"": plain, " NHWC": last} if self.images else {"": plain}
        return {
            **{f"eager{name}": lambda f=f: build(f) for name, f in layouts.items()},
            **{f"compile{name}": lambda f=f: build(f, compiled="inductor") for name, f in layouts.items()},
            **{f"pyfused{name}": lambda f=f: build(f, fused=True) for name, f in layouts.items()},
            f"pyfused+compile{' NHWC' * self.images}": lambda: build(last, compiled="pyfused"),
        }


FULL: list[Case] = [
    FusedModel(make=resnet18, shape=(8, 3, 224, 224), why="residual blocks; norms fold in inference"),
    # Eager's own gradients, too, are 2 to 4% off float64's (the median of its tensors).
    FusedModel(make=resnet50, shape=(4, 3, 224, 224), gradient_tolerance=0.1, why="bottlenecks: mostly 1x1"),
    *[
        FusedModel(make=make, shape=(1, 3, 224, 224), directions=("forward",), why="one image: weights outweigh maps")
        for make in (resnet18, resnet50)
    ],
    FusedModel(make=networks.vgg11, shape=(8, 3, 224, 224), why="plain 3x3 convolutions, ReLU, pools"),
    FusedModel(make=networks.detector, shape=(8, 3, 320, 320), why="SiLU"),
]
if importlib.util.find_spec("transformers"):
    text = dict(directions=("training",))  # in inference nothing is fused
    FULL += [
        FusedModel(
            make=networks.gpt, sizes=(50257, 256, 4), shape=(4, 256), why="head and loss of a language model", **text
        ),
        FusedModel(make=networks.marian, sizes=(32000, 256, 3), shape=(16, 64), why="a translation model", **text),
        FusedModel(make=networks.wav2vec2, sizes=(256, 2), shape=(4, 16000), why="convolutions of rows with GELU"),
    ]
QUICK: list[Case] = [
    FusedModel(make=resnet18, sizes=(10,), shape=(2, 3, 64, 64), why="residual blocks"),
    FusedModel(make=networks.detector, sizes=(10,), shape=(2, 3, 64, 64), why="SiLU"),
]
