"""Linear head + cross-entropy, wherever they are: the head's logits are put off until somebody looks at them.

In training the head returns a `Deferred`: a tensor of the logits' shape that holds the head's input and weight. What
leaves rows alone is done to the input instead: .float(), views that keep the classes together, slices of positions
(the label shift of causal models), a bias added to all rows, softcap. Arriving at torch.nn.functional.cross_entropy it
becomes one linear_cross_entropy, and the logits are never made. Anything else that touches it computes the logits,
once, as if the head had, so nothing depends on how a model's forward is written.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional
from .put_off import PutOff, can_be_put_off, computed_dtype


class Deferred(PutOff):
    """linear(rows, weight, bias), perhaps softcapped, that has not been computed.

    made_from: (Deferred, function, args, kwargs) that this came from; None for what a head returned.
    cap: 0, or (divisor, None) after logits / divisor, (divisor, "tanh") after its tanh, softcap after that times it.
    """

    @staticmethod
    def __new__(cls, rows, weight, bias, dtype, cap=0, made_from=None):
        shape, formula = (*rows.shape[:-1], weight.shape[0]), partial(_logits, cap=cap, dtype=dtype)
        self = PutOff.__new__(cls, shape, dtype, (rows, weight, bias), formula, made_from and made_from[0].origin)
        self.rows, self.weight, self.bias, self.cap, self.made_from = rows, weight, bias, cap, made_from
        return self

    @classmethod
    def of(cls, rows, weight, bias) -> Deferred:
        """What a head returns."""
        return cls(rows, weight, bias, computed_dtype(rows)).in_graph()

    def absorb(self, function, *args, **kwargs):
        return (_loss if function is F.cross_entropy else _put_off)(function, self, *args, **kwargs)

    def make(self) -> torch.Tensor:
        if self.made_from is None:
            self.check_sources()
            with self.context():
                return F.linear(self.rows, self.weight, self.bias)
        source, function, args, kwargs = self.made_from
        with self.context():
            return function(source.compute(), *args, **kwargs)


def _logits(rows, weight, bias, cap, dtype=None) -> torch.Tensor:
    """What is put off, from what it is made of; dtype None: as the linear layer gives it."""
    logits = F.linear(rows, weight, bias)
    logits = logits if dtype is None else logits.to(dtype)
    divisor, bounded = cap if isinstance(cap, tuple) else (cap, "softcap")
    logits = logits / divisor if divisor else logits
    logits = logits.tanh() if divisor and bounded else logits
    return logits * divisor if divisor and bounded == "softcap" else logits


def defer(rows, weight, bias) -> torch.Tensor:
    """The logits of a head, put off; at once where they cannot be."""
    recorded = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    if not recorded or rows.dim() < 2 or not can_be_put_off(rows, weight, bias):
        return F.linear(rows, weight, bias)
    return Deferred.of(rows, weight, bias)


# --- What may be done to the rows instead of the logits
def _put_off(function, x: Deferred, *args, **kwargs) -> Deferred | None:
    name = getattr(function, "__name__", "")
    step = _STEPS.get(name)
    try:
        changed = None if step is None else step(x, *args, **kwargs)
    except TypeError:  # an overload with other arguments
        return None
    if changed is None or changed is x:
        return changed
    fields = dict(rows=x.rows, weight=x.weight, bias=x.bias, dtype=x.dtype, cap=x.cap) | changed
    return Deferred(**fields, made_from=(x, function, args, kwargs)).in_graph()


def _to(x, to, **kwargs):
    if kwargs or to == x.dtype or to == x.device or to == str(x.device):
        return None if kwargs else x
    return {"dtype": to} if to == torch.float32 and x.dtype in (torch.bfloat16, torch.float16) else None


def _view(x, *shape):
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    classes = x.shape[-1]
    if not shape or not all(isinstance(n, int) for n in shape) or shape[-1] != classes or len(shape) < 2:
        return None
    return {"rows": x.rows.reshape(*shape[:-1], x.rows.shape[-1])}


def _flatten(x, start_dim=0, end_dim=-1):
    if end_dim % x.dim() == x.dim() - 1 or start_dim < 0:
        return None
    return {"rows": x.rows.flatten(start_dim, end_dim)}


def _slice(x, index):
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, (int, slice)) or i is Ellipsis for i in index) or any(isinstance(i, bool) for i in index):
        return None
    whole = slice(None)
    touches_classes = Ellipsis in index or len(index) == x.dim()
    if touches_classes and index[-1] != whole and index[-1] is not Ellipsis:
        return None
    rows = x.rows[index]
    return {"rows": rows} if rows.dim() else None


def _add(x, other, **kwargs):
    if kwargs or x.cap or not isinstance(other, torch.Tensor) or other.numel() != x.shape[-1]:
        return None
    if other.dim() > x.dim() or other.dtype != x.rows.dtype or other.shape[-1] != x.shape[-1] or x.dtype != other.dtype:
        return None
    bias = other.reshape(-1)
    return {"bias": bias if x.bias is None else x.bias + bias}


def _divide(x, by):
    return {"cap": (by, None)} if not x.cap and isinstance(by, (int, float)) and by > 0 else None


def _tanh(x):
    return {"cap": (x.cap[0], "tanh")} if isinstance(x.cap, tuple) and x.cap[1] is None else None


def _multiply(x, by):
    return {"cap": by} if isinstance(x.cap, tuple) and x.cap == (by, "tanh") else None


_STEPS = {
    "float": lambda x: _to(x, torch.float32), "to": _to, "contiguous": lambda x: {},
    "view": _view, "reshape": _view, "flatten": _flatten, "__getitem__": _slice,
    "add": _add, "__add__": _add, "div": _divide, "__truediv__": _divide, "true_divide": _divide, "tanh": _tanh,
    "mul": _multiply, "__mul__": _multiply, "__rmul__": _multiply,
}  # fmt: skip


def eager_loss(given: tuple, options: dict, widened: bool) -> torch.Tensor:
    """What the fused loss replaces."""
    rows, weight, target = given
    logits = _logits(rows, weight, options["linear_bias"], options["softcap"] or 0)
    index = -100 if options["ignore_index"] is None else options["ignore_index"]
    return F.cross_entropy(
        logits.float() if widened else logits, target, options["weight"], ignore_index=index,
        reduction=options["reduction"], label_smoothing=options["label_smoothing"],
    )  # fmt: skip


def fused_loss(given: tuple, options: dict, widened: bool) -> torch.Tensor:
    """widened: the logits are float32 by .float(). Under autocast losses are float32, which is the same."""
    if not widened:
        return functional.linear_cross_entropy(*given, **options)
    with torch.autocast(given[0].device.type, given[0].dtype):
        return functional.linear_cross_entropy(*given, **options)


def _loss(
    function,
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """The loss without the logits; None where it needs them."""
    if isinstance(input.cap, tuple) or input.dim() != 2 or isinstance(target, Deferred):
        return None
    if size_average is not None or reduce is not None or (target.is_floating_point() and ignore_index != -100):
        return None
    given = (input.rows, input.weight, target)
    options = {
        **{"linear_bias": input.bias, "weight": weight, "reduction": reduction, "label_smoothing": label_smoothing},
        **{"ignore_index": None if target.is_floating_point() else ignore_index, "softcap": input.cap or None},
    }
    widened = input.dtype == torch.float32 and input.rows.dtype in (torch.bfloat16, torch.float16)
    input.check_sources()
    input.tell((given, options, widened), "cross_entropy")
    enabled, dtype = input.origin.autocast
    if enabled and not widened:
        with torch.autocast(input.device.type, dtype):
            return fused_loss(given, options, widened)
    return fused_loss(given, options, widened)


class HeadPlan:
    """What a head does instead of nn.Linear.forward: in training its logits are put off."""

    base = nn.Linear
    code = "forward is one line"  # nothing to compile after unpickling

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if not module.training or kwargs or len(args) != 1:
            return nn.Linear.forward(module, *args, **kwargs)
        return defer(args[0], module.weight, module.bias)

    def __deepcopy__(self, memo) -> HeadPlan:
        return self
