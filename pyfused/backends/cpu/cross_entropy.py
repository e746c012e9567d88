"""cross_entropy on the CPU: csrc/cpu/kernels/cross_entropy.cpp and cross_entropy_backward.cpp."""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import cross_entropy as op


@kernel("cross_entropy", "cpu")
def forward(input, target, weight, return_lse, *options):
    loss, lse, stats, total = op.alloc(input, target, weight, return_lse, *options)
    _forward(loss, lse if return_lse else None, stats, total, None, input, target, weight, options, 0.0)
    return loss, lse, stats, total


@kernel("cross_entropy_with_grad", "cpu")
def with_grad(grad_loss, input, target, *options):
    loss, stats, total, grad_input = op.alloc_with_grad(grad_loss, input, target, *options)
    grad_input = cached(grad_input)
    _forward(loss, None, stats, total, grad_input, input, target, None, options, grad_loss)
    return loss, stats, total, grad_input


def _forward(loss, lse, stats, total, grad_input, input, target, weight, options, grad_loss):
    given = op.as_kernels_read(input, target, weight)
    written = (loss, lse, stats, total, grad_input)
    _C.cross_entropy(*written, input, *given, *options, grad_loss, torch.get_num_threads())


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
