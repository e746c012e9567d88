"""cross_entropy on the CPU: csrc/cpu/kernels/cross_entropy.cpp and cross_entropy_backward.cpp."""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import cross_entropy as op


@kernel("cross_entropy", "cpu")
def forward(input, target, weight, return_lse, *options):
    loss, lse, stats, total = op.alloc(input, target, weight, return_lse, *options)
    given = op.as_kernels_read(input, target, weight)
    _C.cross_entropy(loss, lse if return_lse else None, stats, total, input, *given, *options, torch.get_num_threads())
    return loss, lse, stats, total


def _backward(grad_input, grad_loss, grad_lse, input, target, weight, stats, total, *options):
    grads = (grad_loss.contiguous(), None if grad_lse is None else grad_lse.contiguous())
    given = op.as_kernels_read(input, target, weight)
    _C.cross_entropy_backward(grad_input, *grads, input, *given, stats, total, *options, torch.get_num_threads())


@kernel("cross_entropy_backward", "cpu")
def backward(grad_loss, grad_lse, input, *rest):
    grad_input = cached(op.alloc_backward(grad_loss, grad_lse, input))
    _backward(grad_input, grad_loss, grad_lse, input, *rest)
    return grad_input


@kernel("cross_entropy_backward_", "cpu")
def backward_(grad_loss, grad_lse, input, *rest):
    _backward(input, grad_loss, grad_lse, input, *rest)
