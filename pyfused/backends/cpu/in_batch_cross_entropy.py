"""in_batch_cross_entropy on the CPU: linear_cross_entropy's kernel, which knows accidental hits, on the gathered rows.

Where that is not for it (small batches, float64, no AVX2), the BLAS and the kernel of cross_entropy; to mask the scores
in between, csrc/cpu/kernels/in_batch_cross_entropy.cpp. To sum rows by id, the backward of embedding_dot.
"""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import in_batch_cross_entropy as op
from ...ops.linear_chunks import chunk_buffer
from . import linear_cross_entropy as linear


def _chunk(table, batch):
    """A buffer for some rows of the scores: 2 MiB, but at least 128 rows, enough for the products to run at speed."""
    dtype = op.arithmetic_dtype(table)
    most = max(128, (2 << 20) // (max(batch, 1) * dtype.itemsize))
    return cached(chunk_buffer(table, batch, batch, most, dtype))


def _mask(item):
    item = item.contiguous()
    return lambda scores, first: _C.mask_accidental_hits(scores, item, first, torch.get_num_threads())


def _name_bad_id(name, ids, table):
    bad = ((ids < 0) | (ids >= len(table))).nonzero()
    if len(bad):
        at = bad[0].item()
        limits = f"must lie in [0, {len(table)})"
        raise IndexError(f"{name} {ids[at].item()} is out of bounds: {name}[{at}] {limits}") from None


def _rows(user, item_weight) -> int:
    """How many rows the kernel should take at a time; 0 where it is not for this."""
    if len(item_weight) > torch.iinfo(torch.int32).max:
        return 0
    batch, dims, dtype = len(user), item_weight.shape[1], op.arithmetic_dtype(item_weight)
    return linear.kernel_rows(batch, dims, batch, dtype, most=96)  # of D numbers each; 128 are 2% faster


def _problem(user, item, user_weight, item_weight, item_bias, log_q, scale, masked):
    """(the layer whose logits are the scores, labels, class weights), and ids of its rows and classes or None."""
    layer = op._linear_layer(op._gather, user, item, user_weight, item_weight, item_bias, log_q, scale)
    return (*layer, torch.arange(len(user)), None), (item.to(torch.int32),) * 2 if masked else None


@kernel("in_batch_cross_entropy", "cpu")
def forward(user, item, user_weight, item_weight, item_bias, log_q, needed, scale, masked, reduction):
    given = (user, item, user_weight, item_weight, item_bias, log_q)
    needs = op._row_needs(needed)
    try:  # gathering the rows looks at every id anyway
        if rows := _rows(user, item_weight):
            problem, ids = _problem(*given, scale, masked)
            if done := linear.forward_in_kernel(rows, *problem, needs, reduction, *op._PLAIN, ids=ids):
                loss, _, stats, *grads = done
                return loss, stats, *grads
        chunk = _chunk(user_weight, len(user))
        return op.run_forward(chunk, _mask(item), *given, needed, scale, masked, reduction)
    except (IndexError, RuntimeError):
        _name_bad_id("user", user, user_weight)
        _name_bad_id("item", item, item_weight)
        raise


@kernel("in_batch_cross_entropy_backward", "cpu")
def backward(grad_loss, user, item, user_weight, item_weight, item_bias, log_q, stats, d_rows, d_items, d_offset,
             needed, scale, masked, reduction):  # fmt: skip
    given = (user, item, user_weight, item_weight, item_bias, log_q)
    options = (needed, scale, masked, reduction)
    rows = reduction == op._NONE and _rows(user, item_weight)
    if rows:
        problem, ids = _problem(*given, scale, masked)
        needs = op._row_needs(needed)
        if grads := linear.backward_in_kernel(rows, grad_loss, *problem, needs, *op._PLAIN, ids=ids):
            return op.sum_by_id(grad_loss, *given, *grads, needed, scale, reduction)
    chunk = _chunk(user_weight, len(user))
    return op.run_backward(chunk, _mask(item), grad_loss, *given, stats, d_rows, d_items, d_offset, *options)
