"""embedding_dot on the CPU: csrc/cpu/kernels/embedding_dot*.cpp."""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import embedding_dot as op
from ...ops import embedding_dot_update as update_op


@kernel("embedding_dot", "cpu")
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    ids = (user.contiguous(), item.contiguous())
    tables = (op.rows_contiguous(user_weight), op.rows_contiguous(item_weight), op.flat(user_bias), op.flat(item_bias))
    _C.embedding_dot(out, *ids, *tables, torch.get_num_threads())
    return out


@kernel("embedding_dot_backward", "cpu")
def backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse):
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    weight_grad, bias_grad, occurring = op.alloc_backward(*given, occurring=min(ids.numel(), rows))
    weight_grad, count = cached(weight_grad), torch.empty((), dtype=torch.int64)
    written = (weight_grad if weight else None, bias_grad if bias else None)
    found = (occurring, count) if sparse else (None, None)
    read = (grad.contiguous(), ids.contiguous(), other_ids.contiguous(), op.rows_contiguous(other_weight))
    _C.embedding_dot_backward(*written, *found, *read, rows, padding, torch.get_num_threads())
    outputs = (weight_grad, bias_grad, occurring)
    return tuple(x[: count.item()] for x in outputs) if sparse else outputs


@kernel("embedding_dot_update", "cpu", update_op.cannot)
def update(grad, user, item, user_weight, item_weight, user_bias, item_bias, state, padding, needed, rule, settings):
    ids, grad, threads = (user.contiguous(), item.contiguous()), grad.contiguous(), torch.get_num_threads()
    weights = (user_weight, item_weight)
    biases = (update_op.bias_column(user_bias), update_op.bias_column(item_bias))
    options = update_op.per_table(rule, state, settings, needed)
    before = slots = None
    if needed[0] and needed[1]:
        # The items' gradient needs the users' rows as they were.
        count = min(user.numel(), user_weight.shape[0])
        before = cached(user_weight.new_empty(count, user_weight.shape[1]))
        slots = torch.empty(user.shape, dtype=torch.int64)
    others = ((ids[1], item_weight), (ids[0], user_weight) if before is None else (slots, before))
    for side in (0, 1):
        if not needed[side] and not needed[side + 2]:
            continue
        tensors, numbers = update_op.of_side(options, side)
        _C.embedding_dot_update(
            weights[side] if needed[side] else None, biases[side] if needed[side + 2] else None, *tensors,
            *((before, slots) if side == 0 else (None, None)), grad, ids[side], *others[side],
            torch.tensor(numbers, dtype=torch.float64), list(update_op.RULES).index(rule), weights[side].shape[0],
            padding[side], threads,
        )  # fmt: skip
