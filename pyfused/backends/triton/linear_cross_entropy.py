"""linear_cross_entropy on a GPU: the BLAS for the products, cross_entropy's kernels on chunks of logits between.

Bytes   logits of a chunk are written by the product, read by the loss, read and written by its gradient, read twice by
        the products that follow: 6 N V elements, and linear_weight and its gradient once per chunk. Arithmetic rules:
        6 N D V flops; N = 8192, D = 4096, V = 128256 in bfloat16 on an H100 (800 TFLOP/s): 32 ms, the floor, and the
        logits 4 ms. _check: 8 N bytes of labels, read once, its floor.
"""

import triton
import triton.language as tl

from ...ops import linear_chunks as op
from . import cross_entropy
from .common import ARGUMENTS, index_errors, kernel, report_index_error


@triton.jit
def _check_kernel(target, errors, n, classes, ignore_index, ARGUMENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(target + i, mask=i < n, other=0)
    bad = (label != ignore_index) & ((label < 0) | (label >= classes)) & (i < n)
    report_index_error(errors, ARGUMENT, i, label, classes, bad)


def _chunk(input, linear_weight):
    """A buffer for some rows of logits: 256 MiB, but at least 1024 rows, enough to fill the processors with tiles."""
    rows, classes = input.shape[0], linear_weight.shape[0]
    most = max(1024, (256 << 20) // (classes * input.element_size()))
    return op.chunk_buffer(input, rows, classes, most)


def cannot(input, linear_weight, *args) -> str | None:
    return cross_entropy.cannot(linear_weight.t())


@kernel("linear_cross_entropy", cannot)
def forward(input, linear_weight, linear_bias, target, *rest):
    chunk = _chunk(input, linear_weight)
    if len(chunk) < len(input) and not target.is_floating_point():
        # Before the chunks, in which a bad label would be reported by its place in the chunk.
        given = (target.contiguous(), index_errors(target.device), len(target), len(linear_weight), rest[3])
        _check_kernel[(triton.cdiv(len(target), 512),)](*given, ARGUMENT=ARGUMENTS.index("target"), BLOCK=512)
    return op.run_forward(chunk, input, linear_weight, linear_bias, target, *rest)


@kernel("linear_cross_entropy_backward", lambda grad_loss, *args: cannot(*args))
def backward(grad_loss, input, linear_weight, *rest):
    return op.run_backward(_chunk(input, linear_weight), grad_loss, input, linear_weight, *rest)
