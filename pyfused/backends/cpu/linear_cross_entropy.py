"""linear_cross_entropy on the CPU: the BLAS for the products, cross_entropy's kernel on chunks of logits between."""

from ...dispatch import kernel
from ...memory import cached
from ...ops import linear_cross_entropy as op


def _chunk(input, linear_weight):
    """A buffer for some rows of logits: 8 MiB, but at least 256 rows.

    For every chunk the BLAS packs all of linear_weight and adds to all of d_weight: at 128 rows that makes the whole a
    fifth slower than one chunk of 1024 rows, at 256 a tenth.
    """
    rows, classes = input.shape[0], linear_weight.shape[0]
    most = max(256, (8 << 20) // (classes * input.element_size()))
    chunks = max(1, -(-rows // most))
    return cached(input.new_empty(max(1, -(-rows // chunks)), classes))  # chunks of equal length


@kernel("linear_cross_entropy", "cpu")
def forward(input, linear_weight, *rest):
    return op.run_forward(_chunk(input, linear_weight), input, linear_weight, *rest, recycle=cached)


@kernel("linear_cross_entropy_backward", "cpu")
def backward(grad_loss, input, linear_weight, *rest):
    return op.run_backward(_chunk(input, linear_weight), grad_loss, input, linear_weight, *rest, recycle=cached)
