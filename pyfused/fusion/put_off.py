"""Tensors that are put off: computed when somebody looks at them, so that what comes next can be fused with what made
them, however a model's forward is written. Anything that is not absorbed computes them, once, as if they had been all
along.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from .._library import is_transformed

# What the shape, dtype and device of a tensor answer; and that it is no view.
_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "_base")
    ),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "is_floating_point", "__len__")),
}
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__
_recorders: list[list] = []  # of `fates`: what became of each


class PutOff(torch.Tensor):
    """A tensor that has not been computed.

    origin: the one that a module returned; this one comes from it. sources: the tensors it is computed from, of which
    the last but one is the module's weight. formula: a function of the sources that computes it, for what sees neither
    __torch_function__ nor `value`. value: the tensor itself, once computed. seen: whether any of the same origin has
    been; then the values are the truth, to which somebody may write. absorbed: whether any of the same origin has been;
    then hooks wait until somebody computes the value, for no gradient comes to it before.

    A subclass has absorb(function, *args, **kwargs), the result of a call without the value, or None; and make(), the
    value. What it makes is used as `in_graph` returns it.
    """

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, sources: tuple, formula: Callable, origin: PutOff | None = None
    ):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=sources[0].device)
        self.sources, self.formula, self.value, self._origin = sources, formula, None, origin
        self.hooks = OrderedDict()
        if origin is None:
            device = sources[0].device.type
            self.seen, self.absorbed, self.versions = False, False, _versions(sources)
            self.grad_mode = torch.is_grad_enabled()
            self.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self

    @property
    def origin(self) -> PutOff:
        return self if self._origin is None else self._origin  # a reference to itself would be a cycle

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            if args and isinstance(args[0], PutOff) and not args[0].origin.seen:
                result = args[0].without_value(function, *args[1:], **kwargs)
                if result is not None:
                    return result
        if _recorders:
            for x in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(x, PutOff):
                    x.tell(None, getattr(function, "__name__", str(function)))
        args, kwargs = torch.utils._pytree.tree_map_only(PutOff, PutOff.compute, (args, kwargs))
        return function(*args, **kwargs)

    def without_value(self, function, *args, **kwargs):
        """The result of a call that does not need the value; None if it does."""
        if function == _REQUIRES_GRAD:
            return self.origin.grad_mode and any(x is not None and x.requires_grad for x in self.sources)
        if function is torch.Tensor.register_hook and self.origin.absorbed:
            handle = RemovableHandle(self.hooks)
            self.hooks[handle.id] = args[0]
            return handle
        result = self.absorb(function, *args, **kwargs)
        self.origin.absorbed |= not (result is None or isinstance(result, PutOff))
        return result

    def in_graph(self) -> PutOff:
        """Itself, to which a gradient may come from what __torch_function__ does not see: autograd.Function.apply."""
        with torch._C.DisableTorchFunctionSubclass():
            return _Formula.apply([self], *self.sources) if self.origin.grad_mode else self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """What did not pass __torch_function__ and is below autograd, for which the formula is in the graph."""
        if function._schema.is_mutable:
            raise RuntimeError(f"pyfused: {function} was called on a tensor that was put off; read it once before")

        def values(x: PutOff) -> torch.Tensor:
            x.origin.seen = True
            if x.value is not None:
                return x.value
            x.check_sources()
            with x.context():
                return x.formula(*x.sources)

        args, kwargs = torch.utils._pytree.tree_map_only(PutOff, values, (args, kwargs or {}))
        return function(*args, **kwargs)

    def tell(self, fate, name: str) -> None:
        if _recorders:
            _recorders[-1].append((self.origin.sources[-2], fate, name))

    def compute(self) -> torch.Tensor:
        """The value, with its gradient."""
        self.origin.seen = True
        with torch._C.DisableTorchFunctionSubclass():
            if self.value is None:
                self.value = self.make()
                for hook in self.hooks.values():
                    self.value.register_hook(hook)
            return self.value

    def check_sources(self) -> None:
        _check_versions(self.origin.versions, self.origin.sources)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Gradients and autocast as they were when it was put off."""
        with torch.set_grad_enabled(self.origin.grad_mode), _autocast(self.origin):
            yield


class _Formula(torch.autograd.Function):
    """The place of a PutOff in autograd's graph. It does not refer to it: that would be a cycle."""

    @staticmethod
    def forward(ctx, of, *sources):
        (x,) = of  # in a list, or it would be an input
        ctx.formula, ctx.sources, ctx.versions = x.formula, sources, _versions(sources)
        ctx.autocast = _autocast(x.origin)
        return x

    @staticmethod
    def backward(ctx, grad):
        _check_versions(ctx.versions, ctx.sources)
        again = torch.is_grad_enabled()
        wanted = [x for x, needed in zip(ctx.sources, ctx.needs_input_grad[1:]) if needed]
        with torch.enable_grad(), ctx.autocast:
            value = ctx.formula(*ctx.sources)
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=again))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _autocast(origin: PutOff) -> torch.autocast:
    enabled, dtype = origin.autocast
    return torch.autocast(origin.device.type, dtype, enabled=enabled)


def _check_versions(versions: list, sources: Sequence[torch.Tensor | None]) -> None:
    if versions != _versions(sources):
        raise RuntimeError(
            "pyfused: these values were put off, and what they are computed from has changed since. Read them "
            "before (a head's logits before the optimizer's step), or call pyfused.unfuse(model)"
        )


def _versions(tensors: Sequence[torch.Tensor | None]) -> list:
    """Differs when one of them has been written to or freed, as fully_shard frees weights."""
    known = [x for x in tensors if x is not None and not x.is_inference()]
    return [(x._version, x.untyped_storage().nbytes()) for x in known]


def can_be_put_off(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain tensors, and calls are plain calls."""
    plain = all(x is None or type(x) in (torch.Tensor, nn.Parameter) for x in tensors)
    return plain and not torch.compiler.is_compiling() and not is_transformed() and not _wrapper_needs_values()


def _wrapper_needs_values() -> bool:
    """Whether a wrapper around what is running cannot have its outputs put off.

    fully_shard frees a unit's weights behind its forward, unless it is told not to or the unit is the outermost.
    DistributedDataParallel, where it looks for unused parameters or takes the graph to be static, hands outputs to an
    autograd.Function, which __torch_function__ does not see. Wrappers come after `fuse`, so they are found where they
    are: among the callers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    frame, unit = sys._getframe(), None
    while (frame := frame.f_back) is not None:
        if frame.f_code is not nn.Module._call_impl.__code__:
            continue
        module = frame.f_locals["self"]
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if module.find_unused_parameters or module.static_graph:
                return True
        elif isinstance(module, FSDPModule) and unit is None:
            unit = module
            groups = getattr(unit._get_fsdp_state(), "_fsdp_param_groups", [None])
            if any(getattr(group, "_reshard_after_forward", True) for group in groups):
                return True
    return False


def computed_dtype(x: torch.Tensor) -> torch.dtype:
    """Of what a linear layer or a convolution makes of x."""
    device = x.device.type
    narrowed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if narrowed else x.dtype


@contextlib.contextmanager
def fates() -> Iterator[list[tuple[torch.Tensor, object, str]]]:
    """Collects what becomes of all that is put off: (the module's weight, None or what absorbed it, by which call)."""
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()
