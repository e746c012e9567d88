"""embedding_dot on the CPU."""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import embedding_dot as op


def _cannot(user, item, user_weight, item_weight, user_bias, item_bias):
    return None


@kernel("embedding_dot", "cpu", _cannot)
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    _C.embedding_dot(out, user, item, user_weight, item_weight, user_bias, item_bias, torch.get_num_threads())
    return out
