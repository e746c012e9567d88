"""Which backend runs an op: a plain table, read inside the registered op, so torch.compile has nothing to trace.

A backend is a set of kernels, one per op it implements, each with the op's own signature and a function that says why
it cannot take certain arguments. The first backend in `ORDER` that does not object runs; "reference" (eager PyTorch)
never objects. `use_backend` and the environment variable PYFUSED_BACKEND force one, and then its objection is the
error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Per device type, the fastest first.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("reference", "cpu", "cuda", "triton")


def _never(*args) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One op on one backend. `run` has the op's signature; `cannot(*args)` returns a reason or None.

    `cedes(*args)`: whether eager PyTorch does as well with these arguments, so that going without our
    autograd.Function, which costs 100 us and more, is the faster way. `how(*args)`: which of several algorithms runs.
    """

    run: Callable
    cannot: Callable[..., str | None] = _never
    cedes: Callable[..., bool | None] = _never
    how: Callable[..., str | None] = _never


TABLE: dict[str, dict[str, Kernel]] = {}
# Backends that are unusable here, whatever the arguments, with the reason. Filled in by pyfused.backends.
UNAVAILABLE: dict[str, str] = {}
# Backends that may be unusable on one of the GPUs: a function of its number that says why, or None. It is asked when
# something is to run there: to ask while importing would make a context on a GPU that the process may never use.
ON_DEVICE: dict[str, Callable[[int], str | None]] = {}


def kernel(
    op: str,
    backend: str,
    cannot: Callable[..., str | None] = _never,
    cedes: Callable[..., bool | None] = _never,
    how: Callable[..., str | None] = _never,
) -> Callable:
    """Decorator: enter a function into the table as `backend`'s kernel for `op`."""

    def enter(run: Callable) -> Callable:
        TABLE.setdefault(op, {})[backend] = Kernel(run, cannot, cedes, how)
        return run

    return enter


def _check_name(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"no backend is called {name!r}; there are {', '.join(BACKENDS)}")
    return name


_forced: str | None = _check_name(os.environ.get("PYFUSED_BACKEND") or None)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op on this backend ("reference", "cpu", "cuda" or "triton"; None: choose freely) within the block.

    Process-wide, not per thread: PyTorch runs the backward of CUDA ops in threads of its own, which must obey it too.

    Raises:
        ValueError: no such backend.
        RuntimeError: from an op inside the block that this backend cannot run, with the reason.
    """
    global _forced
    before, _forced = _forced, _check_name(name)
    try:
        yield
    finally:
        _forced = before


def why_not(op: str, backend: str, args: tuple) -> str | None:
    """Why `backend` cannot run `op` on these arguments; None if it can."""
    if backend in UNAVAILABLE:
        return UNAVAILABLE[backend]
    if reason := backend in ON_DEVICE and _why_not_on_device(backend, args):
        return reason
    if backend not in TABLE[op]:
        return f"the {backend} backend has no kernel for {op}"
    device = _device_type(args)
    if backend not in ORDER.get(device, ("reference",)):
        return f"the tensors are on the device {device!r}, which the {backend} backend does not serve"
    return TABLE[op][backend].cannot(*args)


def _why_not_on_device(backend: str, args: tuple) -> str | None:
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    return ON_DEVICE[backend](device.index) if device is not None and device.type == "cuda" else None


def _device_type(args: tuple) -> str:
    for a in args:
        if isinstance(a, torch.Tensor):
            return "cpu" if a.is_cpu else a.device.type
    return "cpu"


def pick(op: str, args: tuple) -> Callable:
    """The function that runs `op` on these arguments."""
    if _forced is not None:
        reason = why_not(op, _forced, args)
        if reason is not None:
            raise RuntimeError(f"pyfused.{op}: backend {_forced!r} was asked for but cannot run this: {reason}")
        return TABLE[op][_forced].run
    kernels = TABLE[op]
    for backend in ORDER.get(_device_type(args), ("reference",)):
        kernel = kernels.get(backend)
        if kernel is None or backend in UNAVAILABLE or kernel.cannot(*args) is not None:
            continue
        if backend not in ON_DEVICE or _why_not_on_device(backend, args) is None:
            return kernel.run
    raise RuntimeError(f"pyfused.{op}: no backend can run this: {explain(op, *args)}")


PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}


def may_hand_over(x: torch.Tensor) -> bool:
    """Whether the public functions may hand a call on this tensor to eager PyTorch if it is tiny by the op's measure.

    The autograd.Function around a kernel costs 10 to 200 us more than eager's call; a kernel saves less than that on
    few elements. How few was measured on CPUs, so only there. Not where a backend is forced; nor for what would bake
    the sizes at hand into a graph: torch.compile, export, fake tensors, torch.jit.trace.
    """
    plain = not torch.compiler.is_compiling() and type(x) in PLAIN_TENSORS and x.is_cpu
    return plain and _forced is None and torch._C._get_tracing_state() is None


def cedes(op: str, args: tuple) -> bool:
    """Whether the backend that would run `op`, none being forced, does no better than eager PyTorch."""
    kernels = TABLE[op]
    for backend in ORDER.get(_device_type(args), ()):
        if backend in kernels and backend not in UNAVAILABLE:
            return bool(kernels[backend].cedes(*args))
    return False


def explain(op: str, *args) -> dict[str, str]:
    """For each backend, "chosen" (with the algorithm, if it has several), "can run this", or the reason why not.

    This is about the registered op. Before it is called, the public functions hand tiny calls on CPU tensors to eager
    PyTorch, unless a backend is forced; each says in its documentation how small that is.

    Args:
        op: the name of a registered op, e.g. "cross_entropy" or "conv2d_relu_backward" (see `ops()`).
        args: the registered op's positional arguments. Without them only what holds for any arguments is reported.
    """
    answer = {}
    for backend in BACKENDS:
        if backend in UNAVAILABLE:
            answer[backend] = UNAVAILABLE[backend]
        elif not args:
            answer[backend] = (
                "has a kernel" if backend in TABLE[op] else f"the {backend} backend has no kernel for {op}"
            )
        else:
            answer[backend] = why_not(op, backend, args) or "can run this"
    if args:
        order = (_forced,) if _forced else ORDER.get(_device_type(args), ("reference",))
        chosen = next((b for b in order if answer[b] == "can run this"), None)
        if chosen:
            how = TABLE[op][chosen].how(*args)
            answer[chosen] = f"chosen: {how}" if how else "chosen"
    return answer


def ops() -> list[str]:
    """Names of all registered ops."""
    return list(TABLE)


def available_backends() -> dict[str, str | None]:
    """Every backend, with the reason why it is unusable on this machine, of its GPUs the current one (None: usable)."""
    return {name: UNAVAILABLE.get(name) or _why_not_on_current_device(name) for name in BACKENDS}


def _why_not_on_current_device(backend: str) -> str | None:
    if backend not in ON_DEVICE:
        return None
    if not torch.cuda.is_available():
        return "PyTorch cannot use the GPU (torch.cuda.is_available() is False)"
    return ON_DEVICE[backend](torch.cuda.current_device())
