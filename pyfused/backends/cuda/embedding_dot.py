"""embedding_dot on CUDA: csrc/cuda/embedding_dot.cu, embedding_dot_backward.cu and embedding_dot_update.cu."""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import embedding_dot as op
from ...ops import embedding_dot_update as update_op


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
    keys, order = _sorted_keys(ids, rows, padding)
    ranks, occurring = _runs(keys, rows) if sparse else (None, 0)
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    weight_grad, bias_grad, found = op.alloc_backward(*given, occurring=occurring)
    written = (weight_grad if weight else None, bias_grad if bias else None, found if sparse else None)
    read = (grad.contiguous(), keys, order, ranks, other_ids.contiguous(), op.rows_contiguous(other_weight))
    _C.cuda_embedding_dot_backward(*written, _workspace(grad, other_weight.shape[1]), *read, rows)
    return weight_grad, bias_grad, found


@kernel("embedding_dot_update", "cuda", update_op.cannot)
def update(grad, user, item, user_weight, item_weight, user_bias, item_bias, state, padding, needed, rule, settings):
    """Nothing flows to or from an id outside its table, on which the CPU would raise before anything is written."""
    ids, grad, weights = (user.contiguous(), item.contiguous()), grad.contiguous(), (user_weight, item_weight)
    biases = (update_op.bias_column(user_bias), update_op.bias_column(item_bias))
    options = update_op.per_table(rule, state, settings, needed)
    before = None
    if needed[0] and needed[1]:
        # The items' gradient needs the users' rows as they were.
        before = user_weight.new_empty(user.numel(), user_weight.shape[1])
        _C.cuda_gather_rows(before, ids[0].view(-1), user_weight, 1.0)
    workspace = _workspace(grad, user_weight.shape[1])
    for side in (0, 1):
        if not needed[side] and not needed[side + 2]:
            continue
        tensors, numbers = update_op.of_side(options, side)
        rows = weights[side].shape[0]
        keys, order = _sorted_keys(ids[side], rows, padding[side])
        squares, ranks = _squares(keys, weights[side]) if rule == "rowwise_adagrad" else (None, None)
        changed = (weights[side] if needed[side] else None, biases[side] if needed[side + 2] else None, *tensors)
        read = (grad, keys, order, ranks, ids[1 - side], weights[1 - side], before if side else None)
        rule_number = list(update_op.RULES).index(rule)
        _C.cuda_embedding_dot_update(*changed, workspace, squares, *read, numbers, rule_number, rows)


def _sorted_keys(ids, rows, padding):
    """The rows that the ids name, sorted, those without a row and padding last; and where in `ids` each was."""
    ids = ids.reshape(-1).contiguous()
    keys = torch.empty_like(ids, dtype=torch.int32 if rows < 2**31 else torch.int64)
    _C.cuda_embedding_dot_keys(keys, ids, rows, padding)
    return torch.sort(keys, stable=True)


def _ranks(keys, rows):
    """For each of the sorted keys the number of its run, from 1."""
    starts = keys < rows
    starts[1:] &= keys[1:] != keys[:-1]
    return starts.cumsum(0)


def _runs(keys, rows):
    """The ranks, and how many runs have a row."""
    ranks = _ranks(keys, rows)
    return ranks, int(ranks[-1]) if len(ranks) else 0


def _squares(keys, weight):
    """A workspace with a number per run and 512 bytes of a row, and the ranks; nothing for rows of one such slice."""
    slices = -(-weight.shape[1] * weight.element_size() // 512)
    if slices <= 1:
        return None, None
    dtype = update_op.arithmetic_dtype(weight)
    return weight.new_empty(min(len(keys), len(weight)) * slices, dtype=dtype), _ranks(keys, len(weight))


def _workspace(grad, dim):
    """Two rows of D + 1 numbers for every block of the first stage, which takes at least 128 scores."""
    return grad.new_empty(2 * -(-grad.numel() // 128) * (dim + 1), dtype=update_op.arithmetic_dtype(grad))
