"""in_batch_cross_entropy on a GPU: the BLAS, cross_entropy's and embedding_dot's kernels, and two small ones here.

Tiles   _mask: a program takes ROWS x COLUMNS scores. _check: 1024 ids.
Bytes   _mask reads two ids per row and column of a tile and writes where there is a hit, nothing else of the scores:
        for B pairs 0.6 B^2 bytes of ids, from the caches. _check: 17 B bytes a side, its floor. The scores, in float32:
        24 B^2 bytes, linear_cross_entropy's 6 elements each; up to B = 3500 they stay in an H100's L2. Flops: 6 B^2 D;
        B = 8192, D = 64 in float32 on an H100: 0.39 ms at 67 TFLOP/s, and the scores' 1.6 GB 0.48 ms.
Edges   An id that is no row of its table: the loss is NaN (every row's softmax contains every item), gradients are 0.
"""

import torch
import triton
import triton.language as tl

from ...ops import in_batch_cross_entropy as op
from ...ops.linear_chunks import chunk_buffer
from .common import ARGUMENTS, index_errors, kernel, report_index_error


@triton.jit
def _mask_kernel(scores, item, first, rows, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(batch, COLUMNS)
    b = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.load(item + first + b, mask=b < rows, other=0)
    other = tl.load(item + c, mask=c < batch, other=0)
    hit = (own[:, None] == other[None, :]) & ((first + b)[:, None] != c[None, :])
    at = scores + b[:, None].to(tl.int64) * batch + c[None, :]
    nothing = tl.full((ROWS, COLUMNS), -float("inf"), scores.dtype.element_ty)
    tl.store(at, nothing, mask=hit & (b < rows)[:, None] & (c < batch)[None, :])


@triton.jit
def _check_kernel(safe, bad, ids, errors, n, rows, ARGUMENT: tl.constexpr, REPORT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + i, mask=i < n, other=0)
    outside = (id < 0) | (id >= rows)
    tl.store(safe + i, tl.where(outside, 0, id), mask=i < n)
    tl.store(bad + i, outside.to(tl.int8), mask=i < n)
    if REPORT:
        report_index_error(errors, ARGUMENT, i, id, rows, outside & (i < n))


def _chunk(table, batch):
    """A buffer for some rows of the scores: 64 MiB, but at least 1024 rows."""
    dtype = op.arithmetic_dtype(table)
    most = max(1024, (64 << 20) // (max(batch, 1) * dtype.itemsize))
    return chunk_buffer(table, batch, batch, most, dtype)


def _mask(item):
    def mask(scores, first):
        # Of one dimension: others end at 65535, that of the columns with 8.4 million pairs.
        grid = (triton.cdiv(len(scores), 16) * triton.cdiv(len(item), 128),)
        _mask_kernel[grid](scores, item, first, len(scores), len(item), ROWS=16, COLUMNS=128)

    return mask


def _checked(user, item, user_weight, item_weight, report):
    """The ids with 0 for those out of range, and whether there are such. report: for check_errors."""
    bad = torch.empty(2, len(user), dtype=torch.int8, device=user.device)
    safe = []
    for i, (name, ids, table) in enumerate((("user", user, user_weight), ("item", item, item_weight))):
        safe.append(torch.empty_like(ids, memory_format=torch.contiguous_format))
        given = (safe[i], bad[i], ids.contiguous(), index_errors(ids.device), len(ids), len(table))
        _check_kernel[(triton.cdiv(len(ids), 1024),)](*given, ARGUMENT=ARGUMENTS.index(name), REPORT=report, BLOCK=1024)
    return *safe, bad.any()


def cannot(user, item, user_weight, item_weight, *args) -> str | None:
    if len(user) and not (len(user_weight) and len(item_weight)):
        return "a table has no rows"
    return None


@kernel("in_batch_cross_entropy", cannot)
def forward(user, item, user_weight, item_weight, *rest):
    user, item, bad = _checked(user, item, user_weight, item_weight, True)
    given = (user, item, user_weight, item_weight, *rest)
    loss, *saved = op.run_forward(_chunk(user_weight, len(user)), _mask(item), *given)
    return loss.masked_fill_(bad, torch.nan), *saved


@kernel("in_batch_cross_entropy_backward", lambda grad_loss, *args: cannot(*args))
def backward(grad_loss, user, item, user_weight, item_weight, *rest):
    user, item, bad = _checked(user, item, user_weight, item_weight, False)
    given = (grad_loss.masked_fill(bad, 0), user, item, user_weight, item_weight, *rest)
    return op.run_backward(_chunk(user_weight, len(user)), _mask(item), *given)
