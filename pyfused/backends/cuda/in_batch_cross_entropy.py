"""in_batch_cross_entropy on CUDA: cuBLAS and the kernels of cross_entropy; gather_rows, which reports ids out of range
and makes their rows, and so the losses and gradients, NaN; csrc/cuda/in_batch_cross_entropy.cu to mask the scores in
between; the backward of embedding_dot to sum rows by id."""

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


def _gather(table, ids, factor, of_items):
    out = table.new_empty(len(ids), table.shape[1], dtype=op.arithmetic_dtype(table))
    _C.cuda_gather_rows(out, ids.contiguous(), rows_contiguous(table), factor, of_items)
    return out


@kernel("in_batch_cross_entropy", "cuda")
def forward(user, item, user_weight, *rest):
    return op.run_forward(_chunk(user_weight, len(user)), _mask(item), user, item, user_weight, *rest, gather=_gather)


@kernel("in_batch_cross_entropy_backward", "cuda")
def backward(grad_loss, user, item, user_weight, *rest):
    given = (_mask(item), grad_loss, user, item, user_weight, *rest)
    return op.run_backward(_chunk(user_weight, len(user)), *given, gather=_gather)
