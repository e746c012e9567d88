"""embedding_dot on the CPU: csrc/cpu/kernels/embedding_dot.cpp."""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import embedding_dot as op


def _rows_contiguous(weight):
    """The table as the kernels read it: any distance between rows, none between the numbers of a row."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _flat(bias):
    return None if bias is None else bias.reshape(-1).contiguous()


@kernel("embedding_dot", "cpu")
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    ids = (user.contiguous(), item.contiguous())
    tables = (_rows_contiguous(user_weight), _rows_contiguous(item_weight), _flat(user_bias), _flat(item_bias))
    _C.embedding_dot(out, *ids, *tables, torch.get_num_threads())
    return out


@kernel("embedding_dot_backward", "cpu")
def backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse):
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    weight_grad, bias_grad, occurring = op.alloc_backward(*given, occurring=min(ids.numel(), rows))
    weight_grad, count = cached(weight_grad), torch.empty((), dtype=torch.int64)
    written = (weight_grad if weight else None, bias_grad if bias else None)
    found = (occurring, count) if sparse else (None, None)
    read = (grad.contiguous(), ids.contiguous(), other_ids.contiguous(), _rows_contiguous(other_weight))
    _C.embedding_dot_backward(*written, *found, *read, rows, padding, torch.get_num_threads())
    outputs = (weight_grad, bias_grad, occurring)
    return tuple(x[: count.item()] for x in outputs) if sparse else outputs
