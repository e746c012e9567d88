"""embedding_dot on CUDA: csrc/cuda/embedding_dot.cu and embedding_dot_backward.cu."""

from ... import _C
from ...dispatch import kernel
from ...ops import embedding_dot as op


def _rows_contiguous(weight):
    """The table as the kernels read it: any distance between rows, none between the numbers of a row."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _flat(bias):
    return None if bias is None else bias.reshape(-1).contiguous()


@kernel("embedding_dot", "cuda")
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    ids = (user.contiguous(), item.contiguous())
    tables = (_rows_contiguous(user_weight), _rows_contiguous(item_weight), _flat(user_bias), _flat(item_bias))
    _C.cuda_embedding_dot(out, *ids, *tables)
    return out
