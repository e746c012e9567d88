"""embedding_dot_update in Triton: embedding_dot's backward, which takes the step where it would write a gradient.

Bytes   those of the sums, without gradients; each row that occurs, and its state, is read and written once. Users come
        first: the items' sums need the users' rows as they were, so those that the scores use are copied before (B D
        elements written and, instead of the table's, read). Floor: without the copy. B = 65,536 different ids, D = 64,
        float32, SGD: 34 MB gathered, 34 MB copied, 67 MB of rows: 40 us on an H100, the floor 30.
Sums    and steps in float32 (float64), in a fixed order: the same bits every time. No atomics, no wait for the device.
Edges   scores with an id that is no row count for nothing; rows that no id names, and padding, stay as they are.
"""

from ...ops import embedding_dot_update as op
from .common import kernel
from .embedding_dot import sorted_ids, sum_runs


def cannot(grad, user, item, user_weight, item_weight, user_bias, item_bias, state, padding, needed, rule, settings):
    if rule == "rowwise_adagrad" and user_weight.shape[1] > 8192:
        return "a row has more than 8192 numbers: a program cannot hold it to sum its squares"
    return op.cannot(grad, user, item, user_weight, item_weight, user_bias, item_bias, state)


def _numbers(given) -> tuple[float, float, float, float]:
    """(lr, alpha, beta, eps) from a rule's numbers: (), (lr,), (lr, eps) or all."""
    return tuple(given) if len(given) == 4 else (*(given[:1] or (0.0,)), 0.0, 0.0, *(given[1:] or (0.0,)))


@kernel("embedding_dot_update", cannot)
def update(grad, user, item, user_weight, item_weight, user_bias, item_bias, state, padding, needed, rule, settings):
    if not grad.numel() or not len(user_weight) or not len(item_weight):
        return
    sides = ((user, user_weight, user_bias), (item, item_weight, item_bias))
    terms = [(grad, ids, weight, len(weight)) for ids, weight, _ in sides[::-1]]
    copied = needed[0] and needed[1]
    if copied:
        ids = user.reshape(-1)
        before = user_weight.index_select(0, ids.clamp(0, len(user_weight) - 1))
        terms[1] = (grad, ids, before, len(user_weight))
    options = op.per_table(rule, state, settings, needed)
    for side, (ids, *tables) in enumerate(sides):
        pair = (options[side], options[side + 2])
        outputs = [
            (table, table.stride(0), *states) if numbers else None for table, (states, numbers) in zip(tables, pair)
        ]
        if any(outputs):
            numbers = [x for _, given in pair for x in _numbers(given)]
            keys = sorted_ids(ids, len(tables[0]), padding[side])
            sum_runs(outputs, None, *keys, None, terms[side], len(tables[0]), rule, numbers, side == 1 and copied)
