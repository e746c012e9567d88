"""The one place that touches torch.library: how an op is registered, and what every op's autograd needs.

Registered ops (torch.ops.pyfused.*) carry no autograd: each op page wraps them in an autograd.Function, which costs
half of what torch.library.register_autograd does per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from . import dispatch

_library = torch.library.Library("pyfused", "DEF")


def define(schema: str, alloc: Callable, reference: Callable) -> Callable:
    """Register an op and return the callable that torch.compile can trace.

    Args:
        schema: name and signature in torch.library's language.
        alloc: allocates the outputs for given arguments and computes nothing: the fake kernel, and what backends call.
        reference: the op in eager PyTorch, with the op's signature; entered in the table as the backend "reference".
    """
    name = schema[: schema.index("(")]
    dispatch.kernel(name, "reference")(reference)

    def run(*args):
        return dispatch.pick(name, args)(*args)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"pyfused::{name}", alloc, lib=_library)
    return getattr(torch.ops.pyfused, name).default


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record: an autograd.Function that records nothing costs 4 us."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable_grads(
    function: Callable, inputs: Sequence[torch.Tensor | None], needs: Sequence[bool], grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again, for backward under create_graph=True.

    The fused backward is opaque to autograd, so second derivatives come from differentiating eager PyTorch instead.
    """
    with torch.enable_grad():
        # A view per input: the gradient is wanted for each use, also if one tensor is passed twice.
        inputs = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, needed in zip(inputs, needs) if needed]
        grads = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in needs]


def reject(name: str, problem: str, eager: Callable, *args, **kwargs) -> NoReturn:
    """Raise what eager PyTorch raises for these bad arguments, with `problem` (argument and value) put first."""
    try:
        eager(*args, **kwargs)
    except Exception as error:
        raise type(error)(f"pyfused.{name}: {problem}. Eager PyTorch says: {error}") from None
    raise ValueError(f"pyfused.{name}: {problem}")
