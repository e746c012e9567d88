"""in_batch_cross_entropy on CUDA: cuBLAS and the kernels of cross_entropy; gather_rows; the kernels of
csrc/cuda/in_batch_cross_entropy.cu, to find ids out of range and to mask the scores; the backward of embedding_dot to
sum rows by id. With an id out of range the loss is NaN (every row's softmax has every item), and gradients are 0."""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import in_batch_cross_entropy as op
from ...ops.embedding_dot import rows_contiguous
from ...ops.linear_cross_entropy import chunk_buffer


def _chunk(table, batch):
    """A buffer for some rows of the scores: 32 MiB, which stay in the second-level cache, but at least 512 rows."""
    dtype = op.arithmetic_dtype(table)
    most = max(512, (32 << 20) // (max(batch, 1) * dtype.itemsize))
    return chunk_buffer(table, batch, batch, most, dtype)


def _mask(item):
    item = item.contiguous()
    return lambda scores, first: _C.cuda_mask_accidental_hits(scores, item, first)


def _gather(table, ids, factor):
    out = table.new_empty(len(ids), table.shape[1], dtype=op.arithmetic_dtype(table))
    _C.cuda_gather_rows(out, ids.contiguous(), rows_contiguous(table), factor)
    return out


def _bad(user, item, user_weight, item_weight, report):
    """Whether there are ids out of range, on the device. report: for check_errors."""
    bad = torch.empty((), dtype=torch.bool, device=user.device)
    _C.cuda_in_batch_ids(bad, user.contiguous(), item.contiguous(), len(user_weight), len(item_weight), report)
    return bad


@kernel("in_batch_cross_entropy", "cuda")
def forward(user, item, user_weight, item_weight, *rest):
    bad = _bad(user, item, user_weight, item_weight, True)
    given = (user, item, user_weight, item_weight, *rest)
    loss, *saved = op.run_forward(_chunk(user_weight, len(user)), _mask(item), *given, gather=_gather)
    return loss.masked_fill_(bad, torch.nan), *saved


@kernel("in_batch_cross_entropy_backward", "cuda")
def backward(grad_loss, user, item, user_weight, item_weight, *rest):
    bad = _bad(user, item, user_weight, item_weight, False)
    given = (grad_loss.masked_fill(bad, 0), user, item, user_weight, item_weight, *rest)
    return op.run_backward(_chunk(user_weight, len(user)), _mask(item), *given, gather=_gather)
