"""Convolutions: with ReLU (and max-pooling), and with other activations and residuals. See workloads.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import pyfused.nn as pnn

from .harness import step
from .workloads import Builders, Case, Cost


@dataclass(frozen=True, kw_only=True)
class Conv(Case):
    """relu(conv2d(x)), with pool=True followed by max_pool2d(2)."""

    shape: tuple[int, int, int, int]
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    groups: int = 1
    pool: bool = False
    first: bool = False  # a network's first layer: its input needs no gradient

    gradient_tolerance: ClassVar[float] = 5e-2

    @property
    def op(self) -> str:
        return "conv2d_relu_max_pool2d" if self.pool else "conv2d_relu"

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape)) + f"->{self.out}"

    @property
    def name(self) -> str:
        extras = [f"k{self.kernel}"]
        for letter, value, default in (("s", self.stride, 1), ("p", self.padding, 0), ("g", self.groups, 1)):
            extras += [f"{letter}{value}"] if value != default else []
        return f"{self.shape_text} {' '.join(extras)}"

    def tiny(self) -> Case:
        n, c, _, _ = self.shape
        return replace(self, shape=(min(n, 2), c, 16, 16))

    def cost(self, direction: str) -> Cost:
        n, c, h, w = self.shape
        oh, ow = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (h, w))
        x, weight = n * c * h * w, self.out * c // self.groups * self.kernel**2
        flops = 2 * n * oh * ow * weight
        y = n * self.out * ((oh // 2) * (ow // 2) if self.pool else oh * ow)
        elements = x + weight + self.out + y
        if direction == "forward":
            return Cost(elements * self.dtype.itemsize, flops)
        # Backward reads dy, the mask (y itself, or a byte a pooled output), x and the weight; it writes dw, db and dx.
        elements += x + y + 2 * weight + self.out + (0 if self.first else x)
        mask_bytes = 2 * y if self.pool else y * self.dtype.itemsize
        return Cost(elements * self.dtype.itemsize + mask_bytes, flops * (2 if self.first else 3))

    def contenders(self, direction: str, device: torch.device) -> Builders:
        geometry = (self.shape[1], self.out, self.kernel, self.stride, self.padding, 1, self.groups)
        conv = nn.Conv2d(*geometry, dtype=self.dtype, device=device)
        x = torch.randn(self.shape, dtype=self.dtype, device=device)

        def eager():
            return nn.Sequential(copy.deepcopy(conv), nn.ReLU(inplace=True), *[nn.MaxPool2d(2)] * self.pool)

        def fused():
            module = (pnn.Conv2dReLUMaxPool2d if self.pool else pnn.Conv2dReLU)(*geometry)
            module.to(device, self.dtype).load_state_dict(conv.state_dict())
            return module

        def build(make, memory_format, compiled=False):
            module = make().to(memory_format=memory_format).train(direction == "training")
            inputs = x.detach().to(memory_format=memory_format, copy=True).requires_grad_(not self.first)
            leaves = ([] if self.first else [inputs]) + list(module.parameters())
            return step(torch.compile(module) if compiled else module, [(inputs,)], leaves, direction)

        plain, last = torch.contiguous_format, torch.channels_last
        return {
            "eager": lambda: build(eager, plain),
            "eager NHWC": lambda: build(eager, last),
            "compile": lambda: build(eager, plain, compiled=True),
            "compile NHWC": lambda: build(eager, last, compiled=True),
            "pyfused": lambda: build(fused, plain),
            "pyfused NHWC": lambda: build(fused, last),
        }


class EagerConvAct(nn.Module):
    """What `pyfused.nn.ConvAct1d` and `ConvAct2d` replace; in place where autograd allows it."""

    FUNCTIONS: ClassVar[dict[str, Callable]] = {
        "relu": partial(F.relu, inplace=True),
        "silu": F.silu,  # its derivative needs what it is given
        "gelu": F.gelu,
        "hardswish": F.hardswish,
    }

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.conv, self.activation = conv, self.FUNCTIONS[activation]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        z = self.conv(x)
        if residual is not None:
            z += residual
        return self.activation(z)


@dataclass(frozen=True, kw_only=True)
class ConvAct(Case):
    """activation(conv(x) [+ residual]) for x of (N, C, L) or (N, C, H, W)."""

    op: ClassVar[str] = "conv_act"
    gradient_tolerance: ClassVar[float] = 5e-2
    shape: tuple[int, ...]
    out: int
    activation: str
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    residual: bool = False

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape)) + f"->{self.out}"

    @property
    def name(self) -> str:
        extras = (
            [f"k{self.kernel}"] + [f"s{self.stride}"] * (self.stride > 1) + [f"p{self.padding}"] * bool(self.padding)
        )
        return " ".join([self.shape_text, *extras, *["residual"] * self.residual, self.activation])

    def tiny(self) -> Case:
        return replace(self, shape=(min(self.shape[0], 2), self.shape[1], *[16] * (len(self.shape) - 2)))

    def _sizes(self) -> tuple[int, int, int]:
        """Elements of input, weight and output."""
        spatial = [(n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.shape[2:]]
        weight = self.out * self.shape[1] * self.kernel ** len(spatial)
        return math.prod(self.shape), weight, self.shape[0] * self.out * math.prod(spatial)

    def cost(self, direction: str) -> Cost:
        x, weight, y = self._sizes()
        flops, elements = 2 * y // self.out * weight, x + weight + self.out + y * (1 + self.residual)
        if direction == "training":  # z, or for ReLU the output, written or kept, and read; dy; dx, dw, db, dresidual
            elements += 2 * y + y * (self.activation != "relu") + 2 * (x + weight) + self.out + y * self.residual
            flops *= 3
        return Cost(elements * self.dtype.itemsize, flops)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        rows = len(self.shape) == 3
        geometry = (self.shape[1], self.out, self.kernel, self.stride, self.padding)
        conv = (nn.Conv1d if rows else nn.Conv2d)(*geometry, dtype=self.dtype, device=device)
        x = torch.randn(self.shape, dtype=self.dtype, device=device)
        residual = torch.randn_like(conv(x)) if self.residual else None

        def eager():
            return EagerConvAct(copy.deepcopy(conv), self.activation)

        def fused():
            module = (pnn.ConvAct1d if rows else pnn.ConvAct2d)(*geometry, activation=self.activation)
            module.to(device, self.dtype).load_state_dict(conv.state_dict())
            return module

        def build(make, memory_format, compiled=False):
            module = make().to(memory_format=memory_format).train(direction == "training")
            inputs = [
                t.detach().to(memory_format=memory_format, copy=True).requires_grad_()
                for t in (x, residual)
                if t is not None
            ]
            leaves = [*inputs, *module.parameters()]
            return step(torch.compile(module) if compiled else module, [tuple(inputs)], leaves, direction)

        layouts = {"": torch.contiguous_format} | ({} if rows else {" NHWC": torch.channels_last})
        return {
            **{f"eager{name}": lambda f=f: build(eager, f) for name, f in layouts.items()},
            **{f"compile{name}": lambda f=f: build(eager, f, compiled=True) for name, f in layouts.items()},
            **{f"pyfused{name}": lambda f=f: build(fused, f) for name, f in layouts.items()},
        }
