"""in_batch_cross_entropy on the CPU: the BLAS and the kernel of cross_entropy; to mask the scores in between,
csrc/cpu/kernels/in_batch_cross_entropy.cpp; to sum rows by id, the backward of embedding_dot."""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import in_batch_cross_entropy as op
from ...ops.linear_chunks import chunk_buffer


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


@kernel("in_batch_cross_entropy", "cpu")
def forward(user, item, user_weight, item_weight, *rest):
    chunk = _chunk(user_weight, len(user))
    try:  # gathering the rows looks at every id anyway
        return op.run_forward(chunk, _mask(item), user, item, user_weight, item_weight, *rest)
    except (IndexError, RuntimeError):
        _name_bad_id("user", user, user_weight)
        _name_bad_id("item", item, item_weight)
        raise


@kernel("in_batch_cross_entropy_backward", "cpu")
def backward(grad_loss, user, item, user_weight, *rest):
    return op.run_backward(_chunk(user_weight, len(user)), _mask(item), grad_loss, user, item, user_weight, *rest)
