"""In-batch softmax cross-entropy of a two-tower model: ids in, loss out.

    score[b, c] = scale · ⟨U[user[b]], V[item[c]]⟩ + bias[item[c]] - log_q[c],   -inf where c ≠ b and item[c] = item[b]
    loss[b]     = log ∑_c exp(score[b, c]) - score[b, b]

Every item of the batch is a negative for the users of the other pairs. Such negatives appear with probability
q(item), so log q is subtracted from all scores, the positive's too: with the plus sign, popular items would be pushed
down twice (Bengio and Senecal, 2008; Yi et al., RecSys 2019). The same item in another pair, an accidental hit, is no
negative.

The scores are the logits of a linear layer with the gathered rows scale · U[user] for input, V[item] for weight and
bias[item] - log_q for bias, so linear_cross_entropy's loop over chunks serves: the B x B scores are never stored. What
is stored are the gathered rows, [B, D], and, for "mean" and "sum", their gradients. Backward sums those by id.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import autocasts, define, differentiable_grads, is_transformed, needs_grad, reject
from . import embedding_dot as dot
from . import linear_chunks as linear
from .cross_entropy import DTYPES, REDUCTIONS, arithmetic_dtype

# Bytes of scores below which calls go to eager PyTorch. Ours, with 35 us more a call forward and 150 us in training,
# wins training steps from 190 x 190 in float32 and 310 x 310 in bfloat16 on.
TINY = 180_000
_NONE = REDUCTIONS.index("none")
_PLAIN = (-100, 0.0, 0.0, 0.0)  # cross_entropy's ignore_index, label_smoothing, z_loss and softcap


def reference(
    user, item, user_weight, item_weight, item_bias=None, *, log_q=None, scale=1.0, mask_accidental_hits=True,
    reduction="mean",
):  # fmt: skip
    """The op in eager PyTorch."""
    scores = scale * (user_weight.index_select(0, user) @ item_weight.index_select(0, item).t())
    if item_bias is not None:
        scores = scores + item_bias.reshape(-1).index_select(0, item).to(scores.dtype)
    if log_q is not None:
        scores = scores - log_q.to(scores.dtype)
    if mask_accidental_hits:
        scores = scores.masked_fill(_accidental_hits(item, 0, len(item)), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(user), device=user.device), reduction=reduction)


def _accidental_hits(item, first, rows):
    """Whether column c of row b = first, ..., first + rows - 1 has b's item without being b's own."""
    b = torch.arange(first, first + rows, device=item.device)
    return (item[b, None] == item) & (b[:, None] != torch.arange(len(item), device=item.device))


# --- The registered ops
_GIVEN = "Tensor user, Tensor item, Tensor user_weight, Tensor item_weight, Tensor? item_bias, Tensor? log_q"
_OPTIONS = "bool[4] needed, float scale, bool mask_accidental_hits, int reduction"
Mask = Callable[[torch.Tensor, int], None]  # (scores of some rows, the first row's number): masks their accidental hits


def _gather(table, ids, factor):
    rows = table.index_select(0, ids).to(arithmetic_dtype(table))
    return rows if factor == 1 else rows * factor


def column_offset(gather, item, item_bias, log_q, dtype):
    """What every score of a column has besides the product, (B,) of `dtype`, or None. gather: as `_gather`."""
    bias = None if item_bias is None else gather(item_bias.unsqueeze(1), item, 1.0).squeeze(1).to(dtype)
    if log_q is not None:
        bias = -log_q.to(dtype) if bias is None else bias - log_q.to(dtype)
    return bias


def _linear_layer(gather, user, item, user_weight, item_weight, item_bias, log_q, scale):
    """(input, weight, bias) of the linear layer whose logits are the scores. gather: as `_gather`, of some backend."""
    bias = column_offset(gather, item, item_bias, log_q, arithmetic_dtype(user_weight))
    return gather(user_weight, user, scale), gather(item_weight, item, 1.0), bias


def _row_needs(needed):
    return [needed[0], needed[1], needed[2] or needed[3]]


def alloc(user, item, user_weight, item_weight, item_bias, log_q, needed, scale, mask_accidental_hits, reduction):
    """(loss, stats, d_rows, d_items, d_offset).

    Those are cross_entropy's stats and, for a reduced loss, its gradients for the linear layer's
    input, weight and bias, as far as needed.
    """
    rows, item_rows = (
        x.new_empty(len(user), x.shape[1], dtype=arithmetic_dtype(x)) for x in (user_weight, item_weight)
    )
    loss, _, stats, *grads = linear.alloc(rows, item_rows, None, None, None, _row_needs(needed), reduction)
    return loss, stats, *grads


@torch.no_grad()
def run_forward(
    chunk, mask: Mask, user, item, user_weight, item_weight, item_bias, log_q, needed, scale, masked, reduction,
    gather=_gather,
):  # fmt: skip
    """The registered op; `chunk` is a buffer [rows, B] for the scores of as many rows at a time."""
    layer = _linear_layer(gather, user, item, user_weight, item_weight, item_bias, log_q, scale)
    target = torch.arange(len(user), device=user.device)
    given = (*layer, target, None, _row_needs(needed), reduction, *_PLAIN)
    loss, _, stats, *grads = linear.run_forward(chunk, *given, adjust=mask if masked else None)
    return loss, stats, *grads


def alloc_backward(grad_loss, user, item, user_weight, item_weight, item_bias, log_q, stats, d_rows, d_items, d_offset,
                   needed, *options):  # fmt: skip
    tables = (user_weight, item_weight, item_bias, log_q)
    return tuple(user_weight.new_empty(0) if not need else x.new_empty(x.shape) for x, need in zip(tables, needed))


@torch.no_grad()
def run_backward(chunk, mask: Mask, grad_loss, user, item, user_weight, item_weight, item_bias, log_q, stats, d_rows,
                 d_items, d_offset, needed, scale, masked, reduction, gather=_gather):  # fmt: skip
    """The registered op; `chunk` is needed for reduction "none" only, which computes the scores again."""
    if reduction == _NONE:
        layer = _linear_layer(gather, user, item, user_weight, item_weight, item_bias, log_q, scale)
        target = torch.arange(len(user), device=user.device)
        given = (grad_loss, *layer, target, None, stats.new_ones(()), stats, _row_needs(needed), *_PLAIN)
        d_rows, d_items, d_offset = linear.run_backward(chunk, *given, adjust=mask if masked else None)
    given = (grad_loss, user, item, user_weight, item_weight, item_bias, log_q, d_rows, d_items, d_offset)
    return sum_by_id(*given, needed, scale, reduction)


def sum_by_id(grad_loss, user, item, user_weight, item_weight, item_bias, log_q, d_rows, d_items, d_offset, needed,
              scale, reduction):  # fmt: skip
    """The registered op's results from the gradients of the linear layer: for upstream gradient 1 of a reduced loss."""
    factor = grad_loss.new_ones(()) if reduction == _NONE else grad_loss
    none = user_weight.new_empty(0)
    return (
        _sum_by_id(d_rows, factor * scale, user, user_weight) if needed[0] else none,
        _sum_by_id(d_items, factor, item, item_weight) if needed[1] else none.clone(),
        _sum_by_id(d_offset.unsqueeze(1), factor, item, item_bias) if needed[2] else none.clone(),
        (d_offset * -factor).to(log_q.dtype) if needed[3] else none.clone(),
    )


def _sum_by_id(rows, factor, ids, table):
    """The table's gradient: factor · the sum of the rows with the same id, in the arithmetic of `rows`."""
    each = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    grads = dot._backward(factor.expand(len(ids)), ids, each, rows, len(table), -1, True, False, False)
    return grads[0].view(table.shape).to(table.dtype)


def _reference_forward(user, item, *rest):
    return run_forward(_all_rows(rest[0], len(item)), _masks(item), user, item, *rest)


def _reference_backward(grad_loss, user, item, *rest):
    return run_backward(_all_rows(rest[0], len(item)), _masks(item), grad_loss, user, item, *rest)


def _all_rows(table, batch):
    return table.new_empty(max(batch, 1), batch, dtype=arithmetic_dtype(table))


def _masks(item) -> Mask:
    return lambda scores, first: scores.masked_fill_(_accidental_hits(item, first, len(scores)), -torch.inf)


_forward = define(
    f"in_batch_cross_entropy({_GIVEN}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    alloc,
    _reference_forward,
)
_backward = define(
    f"in_batch_cross_entropy_backward(Tensor grad_loss, {_GIVEN}, Tensor stats, Tensor d_rows, Tensor d_items,"
    f" Tensor d_offset, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    alloc_backward,
    _reference_backward,
)


class _InBatchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, user, item, user_weight, item_weight, item_bias, log_q, *options):
        given = (user, item, user_weight, item_weight, item_bias, log_q)
        loss, *saved = _forward(*given, ctx.needs_input_grad[2:6], *options)
        ctx.save_for_backward(*given, *saved)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():
            grads = _differentiable(*saved[:6], needed, grad_loss, *ctx.options)
        else:
            grads = _backward(grad_loss.contiguous(), *saved, needed, *ctx.options)
            grads = [g if need else None for g, need in zip(grads, needed)]
        return None, None, *grads, None, None, None


def _differentiable(
    user, item, user_weight, item_weight, item_bias, log_q, needed, grad_loss, scale, masked, reduction
):
    options = {"scale": scale, "mask_accidental_hits": masked, "reduction": REDUCTIONS[reduction]}

    def loss(user_weight, item_weight, item_bias, log_q):
        tables = (user_weight.to(grad_loss.dtype), item_weight.to(grad_loss.dtype))
        return reference(user, item, *tables, item_bias, log_q=log_q, **options)

    return differentiable_grads(loss, (user_weight, item_weight, item_bias, log_q), needed, grad_loss)


# --- Arguments
def _problem(user, item, user_weight, item_weight, item_bias, log_q, scale, reduction) -> str | None:
    for name, ids in (("user", user), ("item", item)):
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
            return f"{name} must be int64 or int32 ids of shape (B,), got {ids.dtype} {tuple(ids.shape)}"
    if user.shape != item.shape:
        return f"user and item must be pairs, got {len(user)} users and {len(item)} items"
    for name, table in (("user_weight", user_weight), ("item_weight", item_weight)):
        if table.dim() != 2 or table.dtype not in DTYPES:
            return f"{name} must be a floating-point matrix (rows, D), got {table.dtype} {tuple(table.shape)}"
    if user_weight.shape[1] != item_weight.shape[1]:
        return f"user_weight has D = {user_weight.shape[1]}, but item_weight has D = {item_weight.shape[1]}"
    if user_weight.dtype != item_weight.dtype:
        return f"the tables must have one dtype, got {user_weight.dtype} (user) and {item_weight.dtype} (item)"
    rows = len(item_weight)
    if item_bias is not None and (item_bias.shape not in ((rows,), (rows, 1)) or not item_bias.is_floating_point()):
        return (
            f"item_bias must be floating-point ({rows},) or ({rows}, 1), got {item_bias.dtype} {tuple(item_bias.shape)}"
        )
    if log_q is not None and (log_q.shape != item.shape or not log_q.is_floating_point()):
        return f"log_q must be floating-point {tuple(item.shape)}, got {log_q.dtype} {tuple(log_q.shape)}"
    if reduction not in REDUCTIONS:
        return f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
    if isinstance(scale, torch.Tensor):
        return "scale must be a number; multiply user_weight by a learned temperature instead"
    return None


def _is_tiny(user, user_weight, item_weight) -> bool:
    if user.numel() ** 2 * user_weight.itemsize >= TINY or torch.is_autocast_enabled("cpu"):  # its products are 16-bit
        return False
    return not needs_grad(user_weight, item_weight) or dot.has_tiny_gradients(user_weight, item_weight)


def in_batch_cross_entropy(
    user: torch.Tensor,
    item: torch.Tensor,
    user_weight: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor | None = None,
    *,
    log_q: torch.Tensor | None = None,
    scale: float = 1.0,
    mask_accidental_hits: bool = True,
    reduction: str = "mean",
) -> torch.Tensor:
    """Softmax loss of B (user, item) pairs, each against the items of the others; the B x B scores are never stored.

    Less than 180 kB of scores on a CPU go to eager PyTorch, with its rounding, unless the tables are large.

    Args:
        user, item: ids of the pairs, int64 or int32, (B,).
        user_weight: (num_users, D); float32, float64, bfloat16 or float16.
        item_weight: (num_items, D), of the same dtype.
        item_bias: (num_items,) or (num_items, 1), or None: added to the scores of its item.
        log_q: (B,) or None: log of the probability with which sampling a pair yields item[b]; subtracted from the
            scores of column b (Yi et al. 2019), the positive's included.
        scale: factor of the dot products, 1 / temperature.
        mask_accidental_hits: leave out of row b the other columns that hold b's own item.
        reduction: "none", "mean" or "sum".

    Returns:
        The loss, (B,) or a number, of the tables' dtype (float32 under autocast). The arithmetic is float32 (float64
        tables: float64), under autocast too, also where gradients of repeated ids are summed; but CUDA's tensor cores
        multiply 16-bit rows by probabilities in 16 bits, and float32 as TF32 where torch.backends.cuda.matmul allows
        it. All floating arguments have gradients, dense for the tables. An empty batch: NaN for "mean", as in
        cross_entropy.

    Raises:
        IndexError: an id is not a row of its table (negative ids are not).
        What eager PyTorch raises for other bad arguments, ValueError where it would go on.
    """
    given = (user, item, user_weight, item_weight, item_bias)
    problem = _problem(*given, log_q, scale, reduction)
    options = {"log_q": log_q, "scale": scale, "mask_accidental_hits": mask_accidental_hits, "reduction": reduction}
    if problem:
        reject("in_batch_cross_entropy", problem, reference, *given, **options)
    if is_transformed():
        return reference(*given, **options)
    if dispatch.may_hand_over(user_weight) and _is_tiny(user, user_weight, item_weight):
        try:
            return reference(*given, **options)
        except Exception:  # an id out of range: told again below, with its place and value
            pass
    bias = None if item_bias is None else item_bias.reshape(-1)
    args = (user, item, user_weight, item_weight, bias, log_q)
    options = (float(scale), bool(mask_accidental_hits), REDUCTIONS.index(reduction))
    if needs_grad(*args[2:]):
        loss = _InBatchCrossEntropy.apply(*args, *options)
    else:
        loss = _forward(*args, [False] * 4, *options)[0]
    return loss if autocasts(user_weight) else loss.to(user_weight.dtype)
