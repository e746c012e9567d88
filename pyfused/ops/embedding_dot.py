"""Embedding dot product: out[b, k] = ⟨U[user[b]], V[item[b, k]]⟩ + bu[user[b]] + bv[item[b, k]].

The score of matrix factorisation and of two-tower recommenders (Koren, Bell and Volinsky, 2009). The gathered rows are
never stored. Gradients, with g = ∂L/∂out:

    ∂L/∂U[n] = ∑_{(b, k): user[b] = n} g[b, k] · V[item[b, k]]       ∂L/∂bu[n] = ∑_{(b, k): user[b] = n} g[b, k]

and the same for V and bv with the roles exchanged, so one backward op, called per table, serves both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import define, differentiable_grads, is_transformed, needs_grad, reject
from .embedding_dot_update import update

if TYPE_CHECKING:
    from ..optim import Optimizer


def reference(user, item, user_weight, item_weight, user_bias=None, item_bias=None, *, padding_idx=None, sparse=False):
    """The op in eager PyTorch: the specification."""
    user_padding, item_padding = _pair(padding_idx)
    per_user = item.dim() == user.dim() + 1

    def biases(ids, bias, padding):
        if bias.dim() == 1:  # F.embedding wants two dimensions, and has no sparse gradient for a view
            return F.embedding(ids, bias.unsqueeze(-1), padding).squeeze(-1)
        return F.embedding(ids, bias, padding, sparse=sparse).squeeze(-1)

    rows = F.embedding(user, user_weight, user_padding, sparse=sparse)
    rows = rows.unsqueeze(-2) if per_user else rows
    out = (rows * F.embedding(item, item_weight, item_padding, sparse=sparse)).sum(-1)
    if user_bias is not None:
        bias = biases(user, user_bias, user_padding)
        out = out + (bias.unsqueeze(-1) if per_user else bias)
    if item_bias is not None:
        out = out + biases(item, item_bias, item_padding)
    return out


# Gathered numbers below which training goes to eager PyTorch, with tables of fewer numbers than TINY_TABLES together.
# Measured: ours, with 30 us more a step and 3 us more forward, wins from 256 pairs of 64 on; with tables of 10,000
# rows, whose gradients take fresh memory in eager, it is 1.1 times as fast for 16 pairs, with 100,000 rows 2.2 times.
TINY, TINY_TABLES = 20_000, 1 << 19


def alloc(user, item, user_weight, item_weight, user_bias, item_bias):
    return user_weight.new_empty(item.shape)


_forward = define(
    "embedding_dot(Tensor user, Tensor item, Tensor user_weight, Tensor item_weight, Tensor? user_bias,"
    " Tensor? item_bias) -> Tensor",
    alloc,
    reference,
)


def alloc_backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse, occurring=None):
    """`occurring`: number of rows of sparse gradients. A kernel learns it last and allocates for the most."""
    n = occurring if sparse else rows
    weight_grad = other_weight.new_empty((n if weight else 0, other_weight.shape[1]))
    bias_grad = other_weight.new_empty(n if bias else 0)
    return weight_grad, bias_grad, ids.new_empty(n if sparse else 0, dtype=torch.int64)


def _fake_backward(*args):
    sparse = args[-1]
    return alloc_backward(*args, occurring=torch.library.get_ctx().new_dynamic_size() if sparse else None)


def reference_backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse):
    """Gradients of the table that `ids` index and of its bias, where `other_ids` index `other_weight`.

    Args:
        grad: gradient of the output. Its shape is that of `ids` or of `other_ids`, whichever has more dimensions.
        rows: number of rows of the table. padding: its row that gets no gradient; -1: none.
        weight, bias: which of the two gradients to compute; the other comes out with no rows.
        sparse: give only the rows that occur in `ids`, padding left out.

    Returns:
        weight gradient [rows, D], bias gradient [rows], int64 [0]. If sparse, the last holds the numbers of the rows
        that occur, increasing, and the gradients have these rows only.
    """
    occurring = ids[ids != padding].unique().long() if sparse else ids.new_empty(0, dtype=torch.int64)
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    weight_grad, bias_grad, _ = alloc_backward(*given, occurring=occurring.numel())

    def scatter(out, terms):
        terms = terms.sum(-2) if grad.dim() > ids.dim() else terms
        found = torch.ops.aten.embedding_backward(terms, ids.long(), rows, padding, False, sparse)
        out.copy_(found.coalesce().values() if sparse else found)

    if weight:
        other = F.embedding(other_ids, other_weight)
        scatter(weight_grad, grad.unsqueeze(-1) * (other.unsqueeze(-2) if grad.dim() > other_ids.dim() else other))
    if bias:
        scatter(bias_grad.unsqueeze(-1), grad.unsqueeze(-1))
    return weight_grad, bias_grad, occurring


_backward = define(
    "embedding_dot_backward(Tensor grad, Tensor ids, Tensor other_ids, Tensor other_weight, SymInt rows,"
    " SymInt padding, bool weight, bool bias, bool sparse) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    reference_backward,
)


class _EmbeddingDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, user, item, user_weight, item_weight, user_bias, item_bias, padding, sparse):
        ctx.save_for_backward(user, item, user_weight, item_weight, user_bias, item_bias)
        ctx.padding, ctx.sparse = padding, sparse
        return _forward(user, item, user_weight, item_weight, user_bias, item_bias)

    @staticmethod
    def backward(ctx, grad):
        user, item, user_weight, item_weight, user_bias, item_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():

            def eager(*tables):
                return reference(user, item, *tables, padding_idx=ctx.padding, sparse=ctx.sparse)

            tables = (user_weight, item_weight, user_bias, item_bias)
            return None, None, *differentiable_grads(eager, tables, needs, grad), None, None
        sides = (
            (user, item, item_weight, user_weight, user_bias, ctx.padding[0], needs[0], needs[2]),
            (item, user, user_weight, item_weight, item_bias, ctx.padding[1], needs[1], needs[3]),
        )
        (user_weight, user_bias), (item_weight, item_bias) = (_table_grads(grad, *side, ctx.sparse) for side in sides)
        return None, None, user_weight, item_weight, user_bias, item_bias, None, None


def _table_grads(grad, ids, other_ids, other_weight, table, table_bias, padding, weight, bias, sparse):
    """Gradients of one table and of its bias, each None if not wanted, in the form that autograd expects."""
    if not weight and not bias:
        return None, None
    rows = table.shape[0]
    padding = -1 if padding is None else padding
    weight_grad, bias_grad, occurring = _backward(
        grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse
    )

    def form(values, like):
        values = values.view(values.shape[0], *like.shape[1:])
        if not sparse:
            return values
        indices = occurring.unsqueeze(0)
        return torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=False, is_coalesced=True)

    return form(weight_grad, table) if weight else None, form(bias_grad, table_bias) if bias else None


class _EmbeddingDotUpdate(torch.autograd.Function):
    """The forward of _EmbeddingDot; the backward takes the optimizer's step instead of returning gradients."""

    @staticmethod
    def forward(ctx, user, item, user_weight, item_weight, user_bias, item_bias, padding, optimizer):
        # The tables themselves: what save_for_backward gives back may be a copy (checkpointing, saved tensor hooks).
        ctx.save_for_backward(user, item)
        ctx.tables = (user_weight, item_weight, user_bias, item_bias)
        ctx.versions = _versions(ctx.tables)
        ctx.padding, ctx.optimizer = padding, optimizer
        return _forward(user, item, *ctx.tables)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pyfused.embedding_dot: with optimizer=..., the backward changes the tables: it cannot be"
                " differentiated (create_graph=True)"
            )
        if _versions(ctx.tables) != ctx.versions:
            raise RuntimeError(
                "pyfused.embedding_dot: a table was changed after this forward and before its backward. With"
                " optimizer=..., the backward itself changes the tables: it can run once, and a table can be in one"
                " embedding_dot of a graph (to score several items of a user, give item as [B, K])"
            )
        user, item = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[2:6])
        changed = [table for table, need in zip(ctx.tables, needed) if need]

        def step(rule, state, settings):
            padding = [-1 if row is None else row for row in ctx.padding]
            update(grad, user, item, *ctx.tables, state, padding, needed, rule, settings)

        ctx.optimizer.step_in_backward(changed, step)
        torch.autograd.graph.increment_version(changed)  # so that autograd sees what else saved the old tables
        return (None,) * 8


def _versions(tables) -> list[int]:
    return [table._version for table in tables if table is not None]


@torch.compiler.disable(reason="pyfused.embedding_dot(optimizer=...) changes the tables in its backward")
def _update_in_backward(given, padding, optimizer):
    tables = [table for table in given[2:] if table is not None and table.requires_grad]
    if problem := _no_update(given, tables, optimizer):
        raise ValueError(f"pyfused.embedding_dot: {problem}")
    return _EmbeddingDotUpdate.apply(*given, padding, optimizer)


def _no_update(given, tables, optimizer) -> str | None:
    """Why the optimizer cannot update these tables in the backward; None if it can."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, table in zip(("user_weight", "item_weight", "user_bias", "item_bias"), given[2:]):
        if table is not None and table.requires_grad and id(table) not in known:
            return f"{name} requires a gradient but is none of the optimizer's parameters"
    places = [table.untyped_storage().data_ptr() for table in tables if table.numel()]
    if len(set(places)) < len(places):
        return "tables that share memory cannot be updated in the backward: use sparse=True and a torch.optim optimizer"
    return None


def rows_contiguous(weight):
    """The table as kernels read it: any distance between rows, none between the numbers of a row."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def flat(bias):
    """The bias as kernels read it, [rows]."""
    return None if bias is None else bias.reshape(-1).contiguous()


def _is_tiny(item, user_weight, item_weight) -> bool:
    return item.numel() * user_weight.shape[1] < TINY and has_tiny_gradients(user_weight, item_weight)


def has_tiny_gradients(user_weight, item_weight) -> bool:
    return user_weight.numel() + item_weight.numel() < TINY_TABLES


def _pair(padding_idx):
    return tuple(padding_idx) if isinstance(padding_idx, Sequence) else (padding_idx, padding_idx)


def _problem(user, item, user_weight, item_weight, user_bias, item_bias, padding) -> str | None:
    """What is wrong with the arguments, in words; None if nothing is."""
    for name, ids in (("user", user), ("item", item)):
        if ids.dtype not in (torch.int64, torch.int32):
            return f"{name} must be int64 or int32, got {ids.dtype}"
    if item.shape != user.shape and item.shape[:-1] != user.shape:
        return f"item must have the shape of user, {tuple(user.shape)}, or one dimension more, got {tuple(item.shape)}"
    tables = (("user", user_weight, user_bias, padding[0]), ("item", item_weight, item_bias, padding[1]))
    for name, weight, bias, row in tables:
        if weight.dim() != 2:
            return f"{name}_weight must be [rows, D], got {tuple(weight.shape)}"
        if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"{name}_weight must be float32, float64, bfloat16 or float16, got {weight.dtype}"
        if bias is not None and bias.shape not in (weight.shape[:1], (weight.shape[0], 1)):
            return f"{name}_bias must be [{weight.shape[0]}] or [{weight.shape[0]}, 1], got {tuple(bias.shape)}"
        if row is not None and not -weight.shape[0] <= row < weight.shape[0]:
            return f"padding_idx {row} is not a row of {name}_weight, which has {weight.shape[0]}"
        for x in (weight, bias):
            if x is not None and x.dtype != user_weight.dtype:
                return f"the tables must have one dtype, got {user_weight.dtype} and {x.dtype} ({name})"
    if user_weight.shape[1] != item_weight.shape[1]:
        return f"user_weight has D = {user_weight.shape[1]}, but item_weight has D = {item_weight.shape[1]}"
    return None


def embedding_dot(
    user: torch.Tensor,
    item: torch.Tensor,
    user_weight: torch.Tensor,
    item_weight: torch.Tensor,
    user_bias: torch.Tensor | None = None,
    item_bias: torch.Tensor | None = None,
    *,
    padding_idx: int | tuple[int | None, int | None] | None = None,
    sparse: bool = False,
    optimizer: Optimizer | None = None,
) -> torch.Tensor:
    """Dot products of rows of two embedding tables, plus biases, without storing the gathered rows.

    Stands for `(F.embedding(user, user_weight) * F.embedding(item, item_weight)).sum(-1)` and the same with K items per
    user. Sums, of gradients of repeated ids too, are made in float32 (float64 tables: float64) in a fixed order. But
    less than 20,000 gathered numbers on a CPU, where dense gradients of small tables are wanted, go to eager PyTorch.

    Args:
        user: ids, int64 or int32, of any shape S.
        item: ids, int64 or int32, of shape S, or S + (K,) to score K items for every user.
        user_weight: [num_users, D]; float32, float64, bfloat16 or float16.
        item_weight: [num_items, D], of the same dtype.
        user_bias: [num_users] or [num_users, 1], of the same dtype, or None.
        item_bias: [num_items] or [num_items, 1], of the same dtype, or None.
        padding_idx: row of both tables (or a pair: one each) that gets no gradient; may be negative, as in F.embedding.
        sparse: gradients of weights and biases are coalesced sparse COO tensors that hold the rows that occur. Within
            torch.compile, which cannot trace sparse tensors, this runs in eager PyTorch.
        optimizer: of pyfused.optim, made with the tables and biases as its parameters: backward takes its step on them
            and no gradient is stored, `sparse` or not. A graph may use a table in one such call only. Within
            torch.compile this breaks the graph.

    Returns:
        Scores of item's shape and the tables' dtype.

    Raises:
        IndexError: an id is not a row of its table (negative ids are not).
        What eager PyTorch raises for other bad arguments, ValueError where it would go on: tables of several dtypes, a
        bias or ids that fit only by broadcasting; a table that `optimizer` does not hold, or tables that share memory.
        RuntimeError: in backward, with `optimizer`: under create_graph=True, and where the tables have changed since
            the forward, as in a second backward.
    """
    padding = _pair(padding_idx)
    given = (user, item, user_weight, item_weight, user_bias, item_bias)
    if problem := _problem(*given, padding):
        reject("embedding_dot", problem, reference, *given, padding_idx=padding_idx, sparse=sparse)
    if optimizer is None and is_transformed():
        return reference(*given, padding_idx=padding_idx, sparse=sparse)
    if not needs_grad(*given[2:]):
        return _forward(*given)
    if sparse and optimizer is None and torch.compiler.is_compiling():
        return reference(*given, padding_idx=padding_idx, sparse=True)
    tables = (user_weight, item_weight)
    if optimizer is None and not sparse and dispatch.may_hand_over(user_weight) and _is_tiny(item, *tables):
        try:
            return reference(*given, padding_idx=padding_idx)
        except Exception:  # told again below, with the argument and its value
            pass
    padding = tuple(row if row is None or row >= 0 else row + w.shape[0] for row, w in zip(padding, tables))
    if optimizer is not None:
        return _update_in_backward(given, padding, optimizer)
    return _EmbeddingDot.apply(*given, padding, sparse)
