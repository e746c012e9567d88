"""embedding_dot on CUDA: csrc/cuda/embedding_dot.cu and embedding_dot_backward.cu."""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import embedding_dot as op


@kernel("embedding_dot", "cuda")
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    ids = (user.contiguous(), item.contiguous())
    tables = (op.rows_contiguous(user_weight), op.rows_contiguous(item_weight), op.flat(user_bias), op.flat(item_bias))
    _C.cuda_embedding_dot(out, *ids, *tables)
    return out


@kernel("embedding_dot_backward", "cuda")
def backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse):
    """Sparse gradients wait for the device once: their number of rows is part of the result."""
    ids = ids.reshape(-1).contiguous()
    keys = torch.empty_like(ids, dtype=torch.int32 if rows < 2**31 else torch.int64)
    _C.cuda_embedding_dot_keys(keys, ids, rows, padding)
    keys, order = torch.sort(keys, stable=True)
    ranks, occurring = _runs(keys, rows) if sparse else (None, 0)
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    weight_grad, bias_grad, found = op.alloc_backward(*given, occurring=occurring)
    written = (weight_grad if weight else None, bias_grad if bias else None, found if sparse else None)
    read = (grad.contiguous(), keys, order, ranks, other_ids.contiguous(), op.rows_contiguous(other_weight))
    _C.cuda_embedding_dot_backward(*written, _workspace(grad, other_weight.shape[1]), *read, rows)
    return weight_grad, bias_grad, found


def _runs(keys, rows):
    """For each of the sorted keys the number of its run, from 1; and how many runs have a row."""
    starts = keys < rows
    starts[1:] &= keys[1:] != keys[:-1]
    ranks = starts.cumsum(0)
    return ranks, int(ranks[-1]) if len(ranks) else 0


def _workspace(grad, dim):
    """Two rows of D + 1 numbers for every block of the first stage, which takes at least 128 scores."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_empty(2 * -(-grad.numel() // 128) * (dim + 1), dtype=dtype)
