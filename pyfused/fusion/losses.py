"""cross_entropy, called as a function or by nn.CrossEntropyLoss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from .. import functional
from .graph import Match, Refusal, call_of
from .head import Deferred

PATTERN = "cross_entropy"


def find(graph: fx.Graph, root: nn.Module) -> Iterator[Match | Refusal]:
    for node in graph.nodes:
        call = call_of(node, root)
        if call is None or call.name != "cross_entropy":
            continue
        if call["size_average"] is not None or call["reduce"] is not None:
            yield Refusal(PATTERN, node.name, "size_average and reduce are deprecated; use reduction")
            continue
        kwargs = {name: call[name] for name in ("weight", "ignore_index", "reduction", "label_smoothing")}
        yield Match(PATTERN, (node,), cross_entropy, (call["input"], call["target"]), kwargs, node.name)


def cross_entropy(input, target, *, weight, ignore_index, reduction, label_smoothing):
    if isinstance(input, Deferred):
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    return functional.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
