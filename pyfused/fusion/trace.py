"""One module's forward as a graph, and the module made to run another graph instead.

The forward of each module is traced by itself, with its children as they are (only plain nn.Sequential is looked
into). What the trace took for granted is checked at every call, and where it does not hold the module's own forward
runs: which arguments are tensors, of what rank, and what the other arguments are; the training flags; that nobody
hooks into a merged module. The module gets a class of its own, derived from the one it had: its attributes stay as
they are, isinstance and super() work, and deepcopy, pickle, DataParallel and fully_shard treat it like any module.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from .._library import is_transformed
from . import conv, embedding, losses
from .graph import Match, Refusal, compiled, distinct, hooked, rewrite

PATTERNS = (conv.find, embedding.find, losses.find)


class CannotTrace(Exception):
    """The forward is not one graph; the message says why."""


@dataclass(frozen=True)
class Signature:
    """How a forward was called: for each parameter the rank of its tensor, or ("is", value) for what is no tensor."""

    arguments: dict
    defaults: dict

    @classmethod
    def of(cls, forward: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Signature:
        parameters = inspect.signature(forward).parameters
        bound = inspect.signature(forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments, defaults = {}, {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = parameters[name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                if value:
                    raise CannotTrace(f"its forward takes {'*' * (kind - 1 or 1)}{name}")
                continue
            if isinstance(value, torch.Tensor):
                arguments[name] = value.dim()
            elif value is None or isinstance(value, (bool, int, float, str)):
                arguments[name] = ("is", value)
            else:
                raise CannotTrace(f"its argument {name} is a {type(value).__name__}")
            if parameters[name].default is not inspect.Parameter.empty:
                defaults[name] = parameters[name].default
        return cls(arguments, defaults)

    def tensors(self, args: tuple, kwargs: dict) -> list[torch.Tensor] | None:
        """The tensors among the arguments of a call like the one traced; None if it is another kind of call."""
        if len(args) > len(self.arguments) or not kwargs.keys() <= self.arguments.keys():
            return None
        given = {**self.defaults, **dict(zip(self.arguments, args)), **kwargs}
        found = []
        for name, wanted in self.arguments.items():
            if name not in given:
                return None
            value = given[name]
            if isinstance(wanted, tuple):
                if type(value) is not type(wanted[1]) or value != wanted[1]:
                    return None
            elif not isinstance(value, torch.Tensor) or value.dim() != wanted:
                return None
            else:
                found.append(value)
        return found


class _Argument(fx.Proxy):
    """A tensor argument: its rank is known and checked at every call, so forward may branch on it."""

    def dim(self) -> int:
        return self.node.meta["rank"]

    ndim = property(dim)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, signature: Signature):
        super().__init__()
        self.signature, self.context = signature, _context()

    def create_node(self, *args, **kwargs):
        if _context() != self.context:  # which a graph does not show
            raise CannotTrace("part of it runs in a context: torch.no_grad, autocast, checkpoint or their like")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return type(module) is not nn.Sequential or hooked(module)

    def create_args_for_root(self, forward, is_module, concrete_args=None):
        arguments = {}
        for name, wanted in self.signature.arguments.items():
            if isinstance(wanted, tuple):
                arguments[name] = wanted[1]
                continue
            node = self.create_node("placeholder", name, (), {})
            node.meta["rank"] = wanted
            arguments[name] = _Argument(node, self)
        return lambda root: forward(root, **arguments), [self.root]


def _context() -> tuple:
    """What decides, beside a function's arguments, how it is differentiated and in which precision it runs."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # of checkpoint and save_on_cpu
    )


class _NewTensors(TorchFunctionMode):
    """Calls that make a tensor from nothing, such as torch.rand(3), become part of the graph, not a constant in it."""

    def __init__(self, tracer: fx.Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not types and getattr(torch, getattr(function, "__name__", ""), None) is function:
            out = function(*args, **(kwargs or {}))
            is_tensor = isinstance(out, torch.Tensor) and not isinstance(out, fx.Proxy)
            return self.tracer.create_proxy("call_function", function, args, kwargs or {}) if is_tensor else out
        return function(*args, **(kwargs or {}))


def graph_of(module: nn.Module, base: type, signature: Signature) -> fx.Graph:
    """The graph of base.forward for calls of this signature.

    Raises:
        CannotTrace: control flow that depends on values, or a forward that does more than return something.
    """
    now, was, before = type(module), random.getstate(), _snapshot(module)
    tracer = _Tracer(signature)
    try:
        module.__class__ = base
        with _NewTensors(tracer), torch.random.fork_rng(devices=[]):
            graph = tracer.trace(module)
    except CannotTrace:
        raise
    except Exception as error:
        raise CannotTrace(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    finally:
        module.__class__ = now
        changed = _restore(module, before)
    if random.getstate() != was:
        random.setstate(was)
        raise CannotTrace("it uses Python's random numbers")
    if changed:
        raise CannotTrace(f"it changes or makes attributes: {', '.join(sorted(changed))}")
    return graph


def _snapshot(module: nn.Module) -> dict:
    """The module's attributes; of lists, dicts and sets, such as that of the buffers, also what they hold."""

    def content(value):
        return next((kind(value) for kind in (list, dict, set) if isinstance(value, kind)), None)

    return {k: (v, content(v)) for k, v in vars(module).items()}


def _restore(module: nn.Module, before: dict) -> set[str]:
    """Undo what tracing did to the attributes; the names of those it changed."""
    attributes = vars(module)
    changed = {
        k for k in attributes if k not in before or attributes[k] is not before[k][0]
    } | before.keys() - attributes.keys()
    for name, (value, content) in before.items():
        if content is not None and not _same_objects(value, content):
            changed.add(name)
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
    for name in changed:
        attributes.pop(name, None)
        if name in before:
            attributes[name] = before[name][0]
    return changed


def _same_objects(value, content) -> bool:
    """Whether two lists, dicts or sets hold the same objects."""
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(value[k] is content[k] for k in content)
    ids = list(map(id, value)), list(map(id, content))
    return ids[0] == ids[1] if isinstance(value, list) else set(ids[0]) == set(ids[1])


def matches_in(graph: fx.Graph, module: nn.Module) -> Iterator[Match | Refusal]:
    for find in PATTERNS:
        yield from find(graph, module)


@dataclass
class Plan:
    """What a module does instead of its forward, for one kind of call.

    keep: keys of the matches that are replaced. `code` has a function and its conditions per value of the training
    flag; it is made from the rest, so neither pickled nor copied.
    """

    base: type
    signature: Signature
    flags: tuple[bool, ...]
    keep: frozenset[str]
    code: dict = field(default_factory=dict, repr=False, compare=False)

    def compile(self, module: nn.Module) -> None:
        """Trace and rewrite, for every training flag."""
        training = module.training
        for flag in self.flags:
            try:
                module.training = flag
                graph = graph_of(module, self.base, self.signature)
                kept = distinct(m for m in matches_in(graph, module) if isinstance(m, Match) and m.key in self.keep)
            except CannotTrace:
                continue
            finally:
                module.training = training
            if not kept:
                continue
            types = {path: type(module.get_submodule(path)) for m in kept for path in m.modules}
            evals = {path for m in kept for path in m.evals}
            rewrite(graph, kept)
            conditions = [(path.split("."), kind, path in evals) for path, kind in types.items()]
            self.code[flag] = (compiled(graph), conditions)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        """The fused forward where what was traced holds, else the module's own."""
        code = self.code.get(module.training)
        if code is not None and not is_transformed():
            function, conditions = code
            tensors = self.signature.tensors(args, kwargs)
            if tensors is not None and all(_holds(module, *condition) for condition in conditions):
                return function(module, *tensors)
        return self.base.forward(module, *args, **kwargs)

    def __deepcopy__(self, memo) -> Plan:
        return self

    def __getstate__(self) -> dict:
        return {**vars(self), "code": {}}


def _holds(module: nn.Module, path: list[str], kind: type, eval_mode: bool) -> bool:
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return False
    return type(module) is kind and not hooked(module) and not (eval_mode and module.training)


# --- The class of a fused module
def _class(base: type, plan) -> type:
    def forward(self, *args, **kwargs):
        return plan(self, args, kwargs)

    def reduce(self, protocol):
        function, args, *rest = base.__reduce_ex__(self, protocol)
        args = tuple(base if a is type(self) else a for a in args)
        return (_rebuild, (base, plan, function, args), *rest)

    def set_state(self, state):
        base.__setstate__(self, state)
        if not plan.code:
            plan.compile(self)

    body = dict(forward=forward, __reduce_ex__=reduce, __setstate__=set_state, _pyfused_plan=plan, _pyfused_base=base)
    names = dict(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base.__name__, (base,), body | names)


def _rebuild(base: type, plan, function: Callable, args: tuple) -> nn.Module:
    module = function(*args)
    module.__class__ = _class(base, plan)
    return module


def install(module: nn.Module, plan) -> None:
    module.__class__ = _class(base_of(module), plan)


def base_of(module: nn.Module) -> type:
    """The class the module has without pyfused."""
    return vars(type(module)).get("_pyfused_base", type(module))


def uninstall(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if hasattr(type(module), "_pyfused_plan") and base_of(module) is type(module):
            raise RuntimeError(
                f"pyfused.unfuse: {type(module).__name__} was given another class after pyfused.fuse "
                "(fully_shard does that); undo that first"
            )
        module.__class__ = base_of(module)


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[dict]:
    """Collects, for each of the modules, the signature of its first call, or the reason why there is none."""
    found, handles = {}, []

    def note(module, args, kwargs):
        if module not in found:
            try:
                found[module] = Signature.of(base_of(module).forward, module, args, kwargs)
            except CannotTrace as error:
                found[module] = str(error)

    for module in modules:
        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
