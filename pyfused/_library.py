"""The one place that touches torch.library: how an op is registered and called, and what every op's autograd needs.

Registered ops (torch.ops.pyfused.*) carry no autograd: each op page wraps them in an autograd.Function, which costs
half of what torch.library.register_autograd does per call. Where PyTorch's dispatcher would do nothing but convert the
arguments back and forth, which takes it 6 to 10 us, they are called without it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch.autograd import forward_ad

from . import dispatch
from ._binary import _C

_library = torch.library.Library("pyfused", "DEF")


def define(schema: str, alloc: Callable, reference: Callable) -> Callable:
    """Register an op and return what calls it: directly if that makes no difference, else through the dispatcher.

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
    registered = getattr(torch.ops.pyfused, name).default
    tensors = [i for i, a in enumerate(registered._schema.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]

    def call(*args):
        return dispatch.pick(name, args)(*args) if undisturbed(args, tensors) else registered(*args)

    return call


# Bound here: looked up through three modules, each takes a cache miss more.
_is_compiling, _profiles = torch.compiler.is_compiling, torch._C._autograd._profiler_enabled
_function_modes = torch._C._len_torch_function_stack
_thread_keys = torch._C._dispatch_tls_local_include_set  # what this thread adds to the dispatch keys of every call
_PLAIN_THREAD = {_thread_keys().raw_repr()}
with torch.inference_mode():
    _PLAIN_THREAD.add(_thread_keys().raw_repr())


def undisturbed(args: Sequence, tensors: Sequence[int]) -> bool:
    """Whether PyTorch's dispatcher would go straight to the op's kernel for CPU or CUDA; `tensors`: which of `args` are
    tensors or None.

    Not so for what is only seen by going through it: torch.compile, fake, functional, batched (vmap), negated, traced
    and meta tensors, subclasses, modes of __torch_dispatch__ and __torch_function__, the profiler. Takes 1 us.
    """
    if _is_compiling() or _thread_keys().raw_repr() not in _PLAIN_THREAD or _function_modes() or _profiles():
        return False
    for i in tensors:  # a list or a generator of them costs as much again
        x = args[i]
        if x is not None and (type(x) not in dispatch.PLAIN_TENSORS or x.is_neg() or x.is_meta):
            return False
    return True


SIGNATURES = 1000  # remembered by each function; a model has a few dozen


def by_signature(decide: Callable) -> Callable:
    """`decide`, whose answer depends on nothing but the arguments' `signature`, asked once for each of them.

    Between two kernels, which leave nothing of Python's in the caches, what it takes to choose an algorithm and the
    layout of an output costs 50 to 100 us a call; a signature 5.
    """
    answers = {}

    @functools.wraps(decide)
    def remembered(*args):
        key = signature(args)
        try:
            return answers[key]
        except (KeyError, TypeError):  # TypeError: a tuple of what cannot be hashed
            answer = decide(*args)
        if key is not None:
            if len(answers) >= SIGNATURES:
                answers.clear()
            with contextlib.suppress(TypeError):
                answers[key] = answer
        return answer

    return remembered


_HASHED = {type(None), bool, int, str, tuple}


def signature(args: tuple) -> tuple | None:
    """All that may decide how a call runs, but the numbers in its CPU tensors; None where something else might."""
    key = [torch.is_grad_enabled(), _C and _C.isa()]
    for a in args:
        kind = type(a)
        if kind in dispatch.PLAIN_TENSORS and a.is_cpu and a.layout is torch.strided:
            key += (a.shape, a.stride(), a.dtype, a.requires_grad)
        elif kind in _HASHED:
            key.append(a)
        else:
            return None
    return tuple(key)


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work.

    The registered ops know neither, and would lose a tangent without a word: there the public functions run their
    reference. torch.compile deals with transforms by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x: meta, which has none, may not be asked."""
    device = x.device.type
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record: an autograd.Function that records nothing costs 4 us."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


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
