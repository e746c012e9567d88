"""linear_cross_entropy on CUDA: cuBLAS for the products, cross_entropy's kernels on chunks of logits between."""

from ... import _C
from ...dispatch import kernel
from ...ops import linear_chunks as op


def _chunk(input, linear_weight):
    """A buffer for some rows of logits: 256 MiB, but at least 1024 rows.

    Every chunk reads all of linear_weight and reads and writes all of d_weight in float32, 10 bytes an element of a
    16-bit weight, for 6 flops a row: from 1024 rows on the products take longer than that memory traffic.
    """
    rows, classes = input.shape[0], linear_weight.shape[0]
    most = max(1024, (256 << 20) // (classes * input.element_size()))
    return op.chunk_buffer(input, rows, classes, most)


@kernel("linear_cross_entropy", "cuda")
def forward(input, linear_weight, linear_bias, target, *rest):
    chunk = _chunk(input, linear_weight)
    if len(chunk) < len(input) and not target.is_floating_point():
        # Before the chunks, in which a bad label would be reported by its place in the chunk.
        _C.cuda_check_labels(target.contiguous(), len(linear_weight), rest[3])
    return op.run_forward(chunk, input, linear_weight, linear_bias, target, *rest)


@kernel("linear_cross_entropy_backward", "cuda")
def backward(grad_loss, input, linear_weight, *rest):
    return op.run_backward(_chunk(input, linear_weight), grad_loss, input, linear_weight, *rest)
