"""in_batch_cross_entropy on CUDA, by one of two algorithms; neither stores B x B scores. No GPU has measured them.

tiles   csrc/cuda/in_batch_cross_entropy.cu, in_batch_cross_entropy_backward.cu: scores on tensor cores, in registers.
        16-bit tables, and float32 where PyTorch may use TF32 (torch.backends.cuda.matmul).
chunks  cuBLAS and the kernels of cross_entropy, some rows of scores at a time; what tiles cannot take.

Both gather the pairs' rows before, and sum by id after, with the backward of embedding_dot. With an id out of range the
loss is NaN (every row's softmax has every item), and gradients are 0.
"""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import in_batch_cross_entropy as op
from ...ops.cross_entropy import REDUCTIONS
from ...ops.embedding_dot import rows_contiguous
from ...ops.linear_chunks import chunk_buffer

TILE = 64  # pairs
BLOCKS = 528  # four on each of 132 multiprocessors
_NONE, _MEAN = REDUCTIONS.index("none"), REDUCTIONS.index("mean")


# --- What both need
def _gather(table, ids, factor):
    out = table.new_empty(len(ids), table.shape[1], dtype=op.arithmetic_dtype(table))
    _C.cuda_gather_rows(out, ids.contiguous(), rows_contiguous(table), factor)
    return out


def _bad(user, item, user_weight, item_weight, report):
    """Whether there are ids out of range, on the device. report: for check_errors."""
    bad = torch.empty((), dtype=torch.bool, device=user.device)
    _C.cuda_in_batch_ids(bad, user.contiguous(), item.contiguous(), len(user_weight), len(item_weight), report)
    return bad


# --- Chunks
def _chunk(table, batch):
    """A buffer for some rows of the scores: 32 MiB, which stay in the second-level cache, but at least 512 rows."""
    dtype = op.arithmetic_dtype(table)
    most = max(512, (32 << 20) // (max(batch, 1) * dtype.itemsize))
    return chunk_buffer(table, batch, batch, most, dtype)


def _mask(item):
    item = item.contiguous()
    return lambda scores, first: _C.cuda_mask_accidental_hits(scores, item, first)


# --- Tiles
def cannot_tile(user, user_weight, item_weight) -> str | None:
    """Why the tiles cannot take this, or None."""
    if user_weight.dtype == torch.float64:
        return "the tiles have no float64"
    if user_weight.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "the tiles multiply float32 as TF32, which torch.backends.cuda.matmul.fp32_precision does not allow"
    if user_weight.shape[1] * user_weight.itemsize > 512:
        return "the tiles' rows have at most 512 bytes"
    if not 0 < len(user) < 2**31 - 129:
        return "the tiles take 1 to 2^31 - 130 pairs"
    if len(item_weight) >= 2**32:
        return "the tiles compare 32 bits of an item's id"
    return None


def _panels(table, ids):
    """The ids' rows, with zeros after them up to a multiple of 64 bytes."""
    width = 64 // table.itemsize
    out = table.new_empty(len(ids), max(width, -(-table.shape[1] // width) * width))
    _C.cuda_gather_rows(out, ids.contiguous(), rows_contiguous(table), 1.0)
    return out


def _operands(user, item, user_weight, item_weight, item_bias, log_q):
    offset = op.column_offset(_gather, item, item_bias, log_q, torch.float32)
    return _panels(user_weight, user), _panels(item_weight, item), offset, item.contiguous()


def _splits(batch: int) -> int:
    """Blocks that share the other side's tiles for the same rows of one: as many as fill a GPU."""
    tiles = -(-batch // TILE)
    return min(tiles, -(-BLOCKS // tiles))


def _tiles_forward(user, item, user_weight, item_weight, item_bias, log_q, needed, scale, masked, reduction):
    operands = _operands(user, item, user_weight, item_weight, item_bias, log_q)
    options, batch = (scale, masked), len(user)
    losses, stats = (user_weight.new_empty(*s, batch, dtype=torch.float32) for s in ((), (3,)))
    _C.cuda_in_batch_cross_entropy(losses, stats, losses.new_empty(2 * _splits(batch) + 1, batch), *operands, *options)
    if reduction == _NONE:
        return losses, stats, *(losses.new_empty(0) for _ in range(3))
    loss, share = losses.sum(dtype=torch.float64), 1 / batch if reduction == _MEAN else 1.0
    slope = losses.new_full((), share)
    grads = _gradients(operands, stats, slope, slope, needed, options, user_weight.shape[1])
    return (loss * share).float(), stats, *grads


def _gradients(operands, stats, grad, most, needed, options, dim):
    """(d_rows, d_items, d_offset) of the linear layer, see the op; empty where not needed."""
    batch, splits = stats.shape[1], _splits(stats.shape[1])
    nothing = stats.new_empty(0)

    def whole(parts):
        return parts[0] if splits == 1 else parts.sum(0)

    def run(by_item, d_offset):
        d_rows = stats.new_empty(splits, batch, dim)
        given = (*operands, stats, grad, most, *options)
        _C.cuda_in_batch_cross_entropy_backward(d_rows, d_offset, *given, by_item)
        return whole(d_rows)

    with_offset = needed[2] or needed[3]
    d_offset = stats.new_empty(splits, batch) if with_offset else None
    d_rows = run(False, None) if needed[0] else nothing
    d_items = run(True, d_offset) if needed[1] or with_offset else nothing
    return d_rows, d_items if needed[1] else nothing, whole(d_offset) if with_offset else nothing


# --- The registered ops
def _how(user, item, user_weight, item_weight, *rest) -> str:
    reason = cannot_tile(user, user_weight, item_weight)
    return f"chunks, {reason}" if reason else "tiles"


@kernel("in_batch_cross_entropy", "cuda", how=_how)
def forward(user, item, user_weight, item_weight, *rest):
    bad = _bad(user, item, user_weight, item_weight, True)
    given = (user, item, user_weight, item_weight, *rest)
    if cannot_tile(user, user_weight, item_weight):
        loss, *saved = op.run_forward(_chunk(user_weight, len(user)), _mask(item), *given, gather=_gather)
    else:
        loss, *saved = _tiles_forward(*given)
    return loss.masked_fill_(bad, torch.nan), *saved


@kernel("in_batch_cross_entropy_backward", "cuda", how=lambda grad_loss, *args: _how(*args))
def backward(grad_loss, *args):
    bad = _bad(*args[:4], False)
    grad_loss = grad_loss.masked_fill(bad, 0)
    tables, (stats, *saved), (needed, scale, masked, reduction) = args[:6], args[6:10], args[10:]
    if reduction == _NONE and cannot_tile(args[0], *args[2:4]):
        return op.run_backward(_chunk(args[2], len(args[0])), _mask(args[1]), grad_loss, *args, gather=_gather)
    if reduction == _NONE:
        options, most = (scale, masked), grad_loss.abs().amax()
        saved = _gradients(_operands(*tables), stats, grad_loss, most, needed, options, args[2].shape[1])
    return op.sum_by_id(grad_loss, *tables, *saved, needed, scale, reduction)
