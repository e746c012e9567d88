"""(Embedding(user) * Embedding(item)).sum(-1), with biases that are embeddings of width 1.

Pairs: user and item ids of one shape. Lists: user.unsqueeze(1) against K items each. The graph says which; the shapes
are checked at each call, and where they do not fit (broadcasting, sums over another dimension) eager PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import fx, nn

from .. import functional
from .graph import Match, Refusal, call_of, only_user, why_not

PATTERN = "embedding dot"


def find(graph: fx.Graph, root: nn.Module) -> Iterator[Match | Refusal]:
    for node in graph.nodes:
        call = call_of(node, root)
        if call is not None and call.name == "sum" and isinstance(call["input"], fx.Node):
            found = _match(node, call, root)
            if found is not None:
                yield found


def _embedding(node, root: nn.Module):
    """(nodes, call, whether it is unsqueezed, dim) of an embedding that has one user; None if `node` is none."""
    call = call_of(node, root) if isinstance(node, fx.Node) and len(node.users) == 1 else None
    if call is not None and call.name == "unsqueeze":
        inner = _embedding(call["input"], root)
        return None if inner is None or inner[2] is not None else ([*inner[0], node], inner[1], call["dim"])
    return ([node], call, None) if call is not None and call.name == "embedding" else None


def _match(node: fx.Node, total, root: nn.Module) -> Match | Refusal | None:
    product = call_of(total["input"], root)
    if product is None or product.name != "mul":
        return None
    sides = [_embedding(product[side], root) for side in ("input", "other")]
    if None in sides or all(side[2] is not None for side in sides):
        return None
    if sides[1][2] is not None:  # the unsqueezed side is the user
        sides.reverse()
    (user_nodes, user, unsqueezed), (item_nodes, item, _) = sides
    place = f"{user.module or user_nodes[0].name}, {item.module or item_nodes[0].name}"
    nodes = [*user_nodes, *item_nodes, total["input"], node]
    problem = _problem(user, item, total, root)
    if len(total["input"].users) > 1:
        problem = "the products are used elsewhere"
    if problem:
        return Refusal(PATTERN, place, problem)
    biases, squeezed, calls = {}, {}, [user, item]
    while (bias := _bias(nodes[-1], user, item, biases, unsqueezed is not None, root)) is not None:
        side, added, call, squeezed[side] = bias
        biases[side] = call["weight"]
        nodes += added
        calls.append(call)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    nodes = sorted(nodes, key=order.__getitem__)
    kwargs = {
        **{"user_bias": None, "item_bias": None, "sparse": user["sparse"], "unsqueeze": unsqueezed},
        **{
            "padding_idx": (user["padding_idx"], item["padding_idx"]),
            "dim": _single(total["dim"]),
            "squeeze": squeezed,
        },
        **biases,
    }
    args = (user["input"], item["input"], user["weight"], item["weight"])
    modules = tuple(c.module for c in calls if c.module is not None)
    pattern = PATTERN + " + bias" * bool(biases)
    return Match(pattern, tuple(nodes), embedding_dot, args, kwargs, place, modules)


def _problem(user, item, total, root: nn.Module) -> str | None:
    for call in (user, item):
        reason = call.module and why_not(root.get_submodule(call.module))
        if reason:
            return reason
        for option in ("max_norm", "scale_grad_by_freq"):
            if call[option]:
                return f"the Embedding has {option}={call[option]}"
    if user["sparse"] != item["sparse"]:
        return "one table has sparse gradients and the other has not"
    if _single(total["dim"]) not in (-1, 1, 2) or total["keepdim"] or total["dtype"] is not None:
        return f"the sum is not over the last dimension alone: dim={total['dim']}, keepdim={total['keepdim']}"
    return None


def _single(dim):
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


def _bias(scores: fx.Node, user, item, found: dict, lists: bool, root: nn.Module):
    """(argument, nodes, call, squeezed dimension) of a bias added to `scores`, which nothing else takes."""
    adding = only_user(scores)
    add = None if adding is None else call_of(adding, root)
    if add is None or add.name != "add" or add["alpha"] != 1:
        return None
    other = add["other"] if add["input"] is scores else add["input"]
    nodes, dim = [other], None
    call = call_of(other, root) if isinstance(other, fx.Node) and len(other.users) == 1 else None
    if call is not None and call.name == "squeeze":
        dim = call["dim"]
        if dim not in (-1, 1, 2):
            return None
        nodes.insert(0, call["input"])
        call = call_of(call["input"], root) if len(call["input"].users) == 1 else None
    if call is None or call.name != "embedding" or (call.module and why_not(root.get_submodule(call.module))):
        return None
    options = ("input", "padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
    for side, table in (("user", user), ("item", item)):
        # A list's user bias [B, 1] broadcasts along its items as it is.
        as_it_is = lists and side == "user"
        if f"{side}_bias" not in found and (dim is None) == as_it_is and all(call[o] == table[o] for o in options):
            return f"{side}_bias", [*nodes, adding], call, dim
    return None


def embedding_dot(
    user, item, user_weight, item_weight, *, user_bias, item_bias, padding_idx, sparse, unsqueeze, dim, squeeze
):
    lists = unsqueeze is not None
    biases = [
        (name, ids, b)
        for name, ids, b in (("user_bias", user, user_bias), ("item_bias", item, item_bias))
        if b is not None
    ]
    fits = (
        (item.shape[:-1] == user.shape and unsqueeze in (-2, user.dim()) if lists else item.shape == user.shape)
        and dim in (-1, item.dim())
        and all(b.shape[1] == 1 and squeeze[name] in (None, -1, ids.dim()) for name, ids, b in biases)
    )
    if fits:
        tables = (user_weight, item_weight, user_bias, item_bias)
        return functional.embedding_dot(user, item, *tables, padding_idx=padding_idx, sparse=sparse)
    padding = {"user": padding_idx[0], "item": padding_idx[1]}
    rows = F.embedding(user, user_weight, padding["user"], sparse=sparse)
    rows = rows.unsqueeze(unsqueeze) if lists else rows
    out = (rows * F.embedding(item, item_weight, padding["item"], sparse=sparse)).sum(dim)
    for name, ids, bias in biases:
        bias = F.embedding(ids, bias, padding[name[:4]], sparse=sparse)
        out = out + (bias if squeeze[name] is None else bias.squeeze(squeeze[name]))
    return out
