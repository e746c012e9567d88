"""torch.fx graphs as the patterns see them: a call has one name and one set of arguments, whether a module, a function
or a method makes it; a match says which nodes one fused call replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

REQUIRED = object()


class Attr(str):
    """A parameter or buffer, by its path from the module whose forward the graph is."""


@dataclass(frozen=True)
class Call:
    """One call with every argument by name. `module`: path of the module that makes it, if one does."""

    name: str
    arguments: dict
    module: str | None = None

    def __getitem__(self, argument: str):
        return self.arguments[argument]


@dataclass(frozen=True)
class Match:
    """`nodes`, the last of which is the result, can be replaced by `function(*args, **kwargs)`.

    modules: paths of the modules that the fused call stands for, which it does only while nobody hooks into them.
    evals: those of them that must be in eval mode.
    note: what else there is to say, such as why more is not part of the match.
    """

    pattern: str
    nodes: tuple[fx.Node, ...]
    function: Callable
    args: tuple
    kwargs: dict = field(default_factory=dict)
    place: str = ""
    modules: tuple[str, ...] = ()
    evals: tuple[str, ...] = ()
    note: str = ""

    @property
    def key(self) -> str:
        """Names the match within its graph; the same whenever the same forward is traced."""
        return f"{self.pattern} {self.nodes[0].name}"


@dataclass(frozen=True)
class Refusal:
    """A call that belongs to a pattern, and why it is left alone."""

    pattern: str
    place: str
    reason: str


_CONV = dict(
    input=REQUIRED, weight=REQUIRED, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"
)
_SIGNATURES = {
    "conv1d": _CONV, "conv2d": _CONV,
    "batch_norm": dict(
        input=REQUIRED, running_mean=REQUIRED, running_var=REQUIRED, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5,
    ),
    "relu": dict(input=REQUIRED, inplace=False), "relu6": dict(input=REQUIRED, inplace=False),
    "silu": dict(input=REQUIRED, inplace=False), "hardswish": dict(input=REQUIRED, inplace=False),
    "leaky_relu": dict(input=REQUIRED, negative_slope=0.01, inplace=False),
    "gelu": dict(input=REQUIRED, approximate="none"),
    "hardtanh": dict(input=REQUIRED, min_val=-1.0, max_val=1.0, inplace=False),
    "max_pool2d": dict(
        input=REQUIRED, kernel_size=REQUIRED, stride=None, padding=0, dilation=1, ceil_mode=False,
        return_indices=False,
    ),
    "linear": dict(input=REQUIRED, weight=REQUIRED, bias=None),
    "cross_entropy": dict(
        input=REQUIRED, target=REQUIRED, weight=None, size_average=None, ignore_index=-100, reduce=None,
        reduction="mean", label_smoothing=0.0,
    ),
    "embedding": dict(
        input=REQUIRED, weight=REQUIRED, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
        sparse=False,
    ),
    "mul": dict(input=REQUIRED, other=REQUIRED),
    "add": dict(input=REQUIRED, other=REQUIRED, alpha=1),
    "sum": dict(input=REQUIRED, dim=None, keepdim=False, dtype=None),
    "identity": dict(input=REQUIRED),
    "squeeze": dict(input=REQUIRED, dim=None),
    "unsqueeze": dict(input=REQUIRED, dim=REQUIRED),
}  # fmt: skip

_FUNCTIONS = {
    torch.conv1d: "conv1d", F.conv1d: "conv1d", torch.conv2d: "conv2d", F.conv2d: "conv2d", F.batch_norm: "batch_norm",
    F.gelu: "gelu", F.silu: "silu", F.leaky_relu: "leaky_relu", F.hardswish: "hardswish", F.relu6: "relu6",
    F.hardtanh: "hardtanh",
    torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", F.relu_: "relu", F.max_pool2d: "max_pool2d",
    F.linear: "linear", F.cross_entropy: "cross_entropy", F.embedding: "embedding",
    torch.mul: "mul", operator.mul: "mul", torch.add: "add", operator.add: "add", operator.iadd: "add",
    torch.sum: "sum", torch.squeeze: "squeeze", torch.unsqueeze: "unsqueeze",
}  # fmt: skip
_METHODS = {
    "relu": "relu", "relu_": "relu", "mul": "mul", "add": "add", "add_": "add", "sum": "sum", "squeeze": "squeeze",
    "unsqueeze": "unsqueeze",
}  # fmt: skip
# What a module passes to its function besides the input.
_MODULES = {
    nn.Conv1d: ("conv1d", "weight bias stride padding dilation groups padding_mode"),
    nn.Conv2d: ("conv2d", "weight bias stride padding dilation groups padding_mode"),
    nn.BatchNorm2d: ("batch_norm", "running_mean running_var weight bias momentum eps"),
    nn.ReLU: ("relu", "inplace"), nn.ReLU6: ("relu6", "inplace"), nn.SiLU: ("silu", "inplace"),
    nn.Hardswish: ("hardswish", "inplace"), nn.LeakyReLU: ("leaky_relu", "negative_slope inplace"),
    nn.GELU: ("gelu", "approximate"), nn.Identity: ("identity", ""),
    nn.MaxPool2d: ("max_pool2d", "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.Linear: ("linear", "weight bias"),
    nn.Embedding: ("embedding", "weight padding_idx max_norm norm_type scale_grad_by_freq sparse"),
}  # fmt: skip
ACTIVATIONS = {"relu", "relu6", "silu", "hardswish", "leaky_relu", "gelu"}


def call_of(node: fx.Node, root: nn.Module) -> Call | None:
    """The one call that `node` makes, if the patterns know it."""
    calls = calls_of(node, root)
    return calls[0] if len(calls) == 1 else None


def calls_of(node: fx.Node, root: nn.Module) -> list[Call]:
    """What `node` calls, one after the other, each with the input of the first; [] if the patterns do not know it."""
    if node.op == "call_module":
        given = node.args[0] if node.args else node.kwargs.get("input")
        paths = [node.target]
        if _is_norm_and_more(root.get_submodule(node.target)):
            paths += [f"{node.target}.drop", f"{node.target}.act"]
        calls = [_module_call(path, root.get_submodule(path), given) for path in paths]
    else:
        names = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
        calls = [bound(names.get(node.target), node.args, node.kwargs)]
    return [] if None in calls else calls


def name_of(function: Callable) -> str | None:
    """What __torch_function__ was given, by the patterns' name."""
    return _FUNCTIONS.get(function) or _METHODS.get(getattr(function, "__name__", None))


def bound(name: str | None, args: tuple, kwargs: dict) -> Call | None:
    """The call of a function that the patterns know by this name."""
    if name is None:
        return None
    signature = _SIGNATURES[name]
    if len(args) > len(signature) or not kwargs.keys() <= signature.keys():
        return None  # another overload, such as x.sum(0, 1)
    arguments = signature | dict(zip(signature, args)) | kwargs
    if name == "hardtanh" and (arguments["min_val"], arguments["max_val"]) == (0, 6):
        name = "relu6"  # as which TorchDynamo captures nn.ReLU6
    return None if any(x is REQUIRED for x in arguments.values()) else Call(name, arguments)


def _module_call(path: str, module: nn.Module, given) -> Call | None:
    kind = next((kind for kind in _MODULES if isinstance(module, kind)), None)
    if kind is None:
        call = _only_call(module)
        return call and Call(call.name, call.arguments | {"input": given}, path)
    name, attributes = _MODULES[kind]
    arguments = dict(_SIGNATURES[name])
    arguments["input"] = given
    for attribute in attributes.split():
        value = getattr(module, attribute)
        arguments[attribute] = Attr(f"{path}.{attribute}") if isinstance(value, torch.Tensor) else value
    if kind is nn.BatchNorm2d:
        arguments["training"] = module.training or module.running_mean is None
    return Call(name, arguments, path)


def _is_norm_and_more(module: nn.Module) -> bool:
    """Whether this is timm's BatchNorm2d that goes on with its children `drop` and `act`."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def _only_call(module: nn.Module) -> Call | None:
    """The activation that is all that the forward of a module of another library does, if that is so."""
    if type(module).__module__.startswith("torch.") or any(True for _ in (*module.parameters(), *module.children())):
        return None
    try:
        input, node, output = fx.Tracer().trace(module).nodes
    except Exception:  # foreign code: it may raise anything
        return None
    call = call_of(node, module)
    plain = call is not None and call.name in ACTIVATIONS and call["input"] is input and output.args == (node,)
    return call if plain else None


def hooked(module: nn.Module) -> bool:
    """Whether something runs around the module's forward that a fused call would leave out."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(len, hooks)) or "forward" in module.__dict__


def why_not(module: nn.Module) -> str | None:
    """Why a fused call may not stand for this module."""
    kind = next((kind for kind in _MODULES if isinstance(module, kind)), type(module))
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"the {kind.__name__} is parametrised"
    if type(module) is not kind and not _is_norm_and_more(module):
        return f"{type(module).__name__} is a subclass of {kind.__name__}, whose forward may do something else"
    if hooked(module):
        return f"the {kind.__name__} has hooks (weight_norm and spectral_norm are such), which would not run"
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def writes_between(nodes: Sequence[fx.Node], root: nn.Module) -> fx.Node | None:
    """The first node from nodes[0] to nodes[-1], none of them itself, that may write to a tensor it was given."""
    node = nodes[0]
    while (node := node.next) is not nodes[-1]:
        if node not in nodes and _may_write(node, root):
            return node
    return None


_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
_WRITING = {operator.setitem, "__setitem__"}
_WRITING |= {x for name in _OPERATORS for x in (getattr(operator, f"i{name}"), f"__i{name}__")}


def _may_write(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        return not type(module).__module__.startswith("torch.nn.") or getattr(module, "inplace", False)
    if node.op not in ("call_function", "call_method"):
        return False
    call, name = call_of(node, root), getattr(node.target, "__name__", str(node.target))
    asked = node.kwargs.get("inplace") or "out" in node.kwargs or (call and call.arguments.get("inplace"))
    return bool(node.target in _WRITING or asked or (name.endswith("_") and not name.endswith("__")))


def inputs_of(match: Match) -> list:
    """The values that come in from outside the match: nodes and Attrs, without repetition."""
    outside = []
    for node in match.nodes:
        outside += [n for n in node.all_input_nodes if n not in match.nodes]
    outside += [a for a in (*match.args, *match.kwargs.values()) if isinstance(a, (Attr, fx.Node))]
    return list(dict.fromkeys(outside))


def rewrite(graph: fx.Graph, matches: Iterable[Match]) -> None:
    """Put fused calls in the place of the matches' nodes."""
    fused = {}  # by the result they replace, which later matches may take

    def value(x):
        return graph.get_attr(str(x)) if isinstance(x, Attr) else fx.map_arg(x, lambda node: fused.get(node, node))

    for match in matches:
        last = match.nodes[-1]
        with graph.inserting_before(last):
            kwargs = {name: value(x) for name, x in match.kwargs.items()}
            fused[last] = graph.call_function(match.function, tuple(map(value, match.args)), kwargs)
        fused[last].meta = dict(last.meta)
        last.replace_all_uses_with(fused[last])
        for node in reversed(match.nodes):
            graph.erase_node(node)


def compiled(graph: fx.Graph) -> Callable:
    """The graph as a function of (the module whose attributes and submodules it uses, *its placeholders)."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]


def alone(match: Match) -> tuple[fx.Graph, Match]:
    """A graph of nothing but the match's nodes, with a placeholder for each node that comes in; and the match in it."""
    graph, copies = fx.Graph(), {}
    for i, node in enumerate(n for n in inputs_of(match) if isinstance(n, fx.Node)):
        copies[node] = graph.placeholder(f"input_{i}")
    for node in match.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[match.nodes[-1]])

    def mapped(x):
        return copies[x] if isinstance(x, fx.Node) else x

    args, kwargs = tuple(map(mapped, match.args)), {k: mapped(v) for k, v in match.kwargs.items()}
    return graph, replace(match, nodes=tuple(copies[n] for n in match.nodes), args=args, kwargs=kwargs)


def distinct(matches: Iterable[Match]) -> list[Match]:
    """Those matches, in order, that share no node with one before them."""
    taken, kept = set(), []
    for match in matches:
        if taken.isdisjoint(match.nodes):
            taken.update(match.nodes)
            kept.append(match)
    return kept
