"""cross_entropy on CUDA: csrc/cuda/cross_entropy.cu and cross_entropy_backward.cu."""

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import cross_entropy as op

_WORKSPACE = 1 + 2 * 4096  # float64: a counter, and two sums per block


@kernel("cross_entropy", "cuda")
def forward(input, target, weight, return_lse, *options):
    loss, lse, stats, total = op.alloc(input, target, weight, return_lse, *options)
    workspace = input.new_empty(_WORKSPACE, dtype=torch.float64)
    given = op.as_kernels_read(input, target, weight)
    _C.cuda_cross_entropy(loss, lse if return_lse else None, stats, total, workspace, input, *given, *options)
    return loss, lse, stats, total


def _backward(grad_input, grad_loss, grad_lse, input, target, weight, stats, total, *options):
    grads = (grad_loss.contiguous(), None if grad_lse is None else grad_lse.contiguous())
    target, weight = op.as_kernels_read(input, target, weight)
    smoothed = options[2] > 0 and not target.is_floating_point()
    weight_sum = weight.sum() if weight is not None and smoothed else None
    given = (input, target, weight, weight_sum, stats, total)
    _C.cuda_cross_entropy_backward(grad_input, *grads, *given, *options)


@kernel("cross_entropy_backward", "cuda")
def backward(grad_loss, grad_lse, input, *rest):
    grad_input = op.alloc_backward(grad_loss, grad_lse, input)
    _backward(grad_input, grad_loss, grad_lse, input, *rest)
    return grad_input


@kernel("cross_entropy_backward_", "cuda")
def backward_(grad_loss, grad_lse, input, *rest):
    _backward(input, grad_loss, grad_lse, input, *rest)
