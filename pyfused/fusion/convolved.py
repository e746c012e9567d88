"""Convolution + activation in a forward that is not one graph, such as that of Whisper's encoder.

The convolution's output is put off until somebody looks at it; where that is an activation, the two are one conv_act.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .. import functional
from ..ops import conv2d_relu as conv_op
from ..ops import conv_act
from .conv import activation_of
from .graph import ACTIVATIONS, bound, name_of
from .put_off import PutOff, can_be_put_off, computed_dtype
from .trace import base_of


class Convolved(PutOff):
    """conv1d or conv2d(input, weight, bias, *options) that has not been computed."""

    @staticmethod
    def __new__(cls, input, weight, bias, *options):
        rows = weight.dim() == 3
        arguments = (input, weight, bias, *options)
        problem, maps = conv_op.prepare(*(conv_act.as_maps(*arguments) if rows else arguments))
        if problem:
            return None
        shape = conv_op.output_shape(*maps[:2], *maps[3:6])
        shape = (*shape[input.dim() == weight.dim() - 1 : 2], *shape[2 + rows :])
        formula = partial(_convolution, options=options)
        self = PutOff.__new__(cls, shape, computed_dtype(input), (input, weight, bias), formula)
        self.options = options
        return self

    def absorb(self, function, *args, **kwargs):
        name = name_of(function)
        call = bound(name, (self, *args), kwargs) if name in ACTIVATIONS else None
        if call is None or call.arguments.get("approximate") not in (None, "none", "tanh"):
            return None
        self.tell((self, activation_of(call)), name)
        out = self.activated(**activation_of(call))
        if call.arguments.get("inplace") or function.__name__.endswith("_"):
            self.value, self.seen = out, True
        return out

    def activated(self, **activation) -> torch.Tensor:
        self.check_sources()
        with self.context():
            return functional.conv_act(*self.sources, *self.options, **activation)

    def make(self) -> torch.Tensor:
        self.check_sources()
        with self.context():
            return self.formula(*self.sources)


def _convolution(input, weight, bias, options) -> torch.Tensor:
    return conv_act.reference(input, weight, bias, *options, activation="none")


class ConvPlan:
    """What a convolution does instead of its own forward: its output is put off."""

    code = "forward is one line"  # nothing to compile after unpickling

    def __call__(self, module: nn.Conv1d | nn.Conv2d, args: tuple, kwargs: dict):
        put_off = None
        if len(args) == 1 and not kwargs and can_be_put_off(args[0], module.weight, module.bias):
            options = (module.stride, module.padding, module.dilation, module.groups)
            put_off = Convolved(args[0], module.weight, module.bias, *options)
        return base_of(module).forward(module, *args, **kwargs) if put_off is None else put_off.in_graph()

    def __deepcopy__(self, memo) -> ConvPlan:
        return self


def pair(convolved: Convolved, activation: dict):
    """(eager, fused, the tensors in them): two functions without arguments that do what was absorbed."""
    tensors = tuple(None if x is None else x.detach().requires_grad_(x.requires_grad) for x in convolved.sources)
    options = convolved.options

    def eager():
        return conv_act.reference(*tensors, *options, **activation)

    def fused():
        return Convolved(*tensors, *options).activated(**activation)

    return eager, fused, tensors
