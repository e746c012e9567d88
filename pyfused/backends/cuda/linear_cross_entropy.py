"""linear_cross_entropy on CUDA: cuBLAS for the products, cross_entropy's kernels on chunks of logits between.

Flops    2 N V D, in training 6 N V D: N = 8192, V = 128256, D = 2048, bfloat16: 12.9 Tflop, 16 ms at the 790 Tflop/s at
         which an H200 multiplies.
Traffic  the logits are written, read and, in training, read again, overwritten by their gradient and read twice: 2.1 GB
         each time, 12.6 GB, 2.9 ms at 4.3 TB/s; the weight and its float32 gradient once a chunk, see `_chunk`: 8
         chunks of 2.6 GB, 4.9 ms, most of it behind the products, which are the floor. Not measured.
"""

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
