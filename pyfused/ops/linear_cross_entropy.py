"""Linear layer + softmax cross-entropy, without the N x V logits.

    logits = input · linear_weightᵀ + linear_bias;   loss = cross_entropy(logits, target, ...)

Rows are taken in chunks, see linear_chunks.py. For reductions "mean" and "sum" the gradients are made in forward, for
upstream gradient 1; backward scales where the upstream gradient is another. For "none", whose upstream gradients are
known only then, backward computes the logits again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import define, differentiable_grads, needs_grad, reject
from . import cross_entropy as ce
from .conv2d_relu import autocast
from .linear_chunks import all_rows, alloc, alloc_grads, run_backward, run_forward

# Bytes of logits below which calls go to eager PyTorch. Ours, with 50 us more a call forward and 110 us in training,
# wins from 256 x 1000 logits (float32) and 512 x 1000 (bfloat16) on, for 64 to 256 features.
TINY = 1_200_000
_NONE = ce.REDUCTIONS.index("none")


def reference(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, z_loss=0.0, softcap=None,
):  # fmt: skip
    """The op in eager PyTorch."""
    classes, features = linear_weight.shape[:-1], linear_weight.shape[-1]
    flat_bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, features), flat_bias).reshape(*input.shape[:-1], *classes)
    index = -100 if ignore_index is None else ignore_index
    return ce.reference(logits, target, weight, index, reduction, label_smoothing, z_loss=z_loss, softcap=softcap)


# --- The registered ops take input [N, D], linear_weight [V, D], linear_bias [V] or None, targets as cross_entropy's.
_OPTIONS = "int reduction, SymInt ignore_index, float label_smoothing, float z_loss, float softcap"
_GIVEN = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"


_forward = define(
    f"linear_cross_entropy({_GIVEN}, bool[3] needed, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    alloc,
    lambda *args: run_forward(all_rows(*args[:2]), *args),
)
_backward = define(
    f"linear_cross_entropy_backward(Tensor grad_loss, {_GIVEN}, Tensor total, Tensor stats, bool[3] needed,"
    " SymInt ignore_index, float label_smoothing, float z_loss, float softcap) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, input, linear_weight, linear_bias, target, weight, total, stats, needed, *options: alloc_grads(
        input, linear_weight, needed
    ),
    lambda *args: run_backward(all_rows(*args[1:3]), *args),
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, *options):
        given = (input, linear_weight, linear_bias, target, weight)
        loss, total, stats, *grads = _forward(*given, ctx.needs_input_grad[:3], *options)
        # The first backward takes these gradients as they are, to scale them in place: a copy would double the memory.
        # A compiled backward may not change what was saved, so there they are saved like everything else.
        ctx.grads = None if torch.compiler.is_compiling() or options[0] == _NONE else grads
        ctx.save_for_backward(*given, total, stats, *([] if ctx.grads else grads))
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *given, total, stats = (saved := ctx.saved_tensors)[:7]  # once: activation checkpointing allows no second look
        reduction, *options = ctx.options
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = _differentiable(given, needed, grad_loss, reduction, *options)
        elif reduction == _NONE:
            grads = _backward(grad_loss, *given, total, stats, needed, *options)
        else:
            if len(saved) > 7:
                grads = [d * grad_loss for d in saved[7:]]
            else:  # a second backward computes them again, to the same bits
                grads = ctx.grads or _forward(*given, needed, *ctx.options)[3:]
                ctx.grads = None
                if grad_loss.device.type != "cpu" or grad_loss != 1:  # asking a GPU would wait for it
                    grads = [d.mul_(grad_loss) for d in grads]
        grads = [g.to(x.dtype) if need else None for g, x, need in zip(grads, given[:3], needed)]
        return *grads, *(None,) * 7


def _differentiable(given, needed, grad_loss, reduction, ignore_index, label_smoothing, z_loss, softcap):
    input, linear_weight, linear_bias, target, weight = given
    index = None if target.is_floating_point() else ignore_index
    options = {"weight": weight, "reduction": ce.REDUCTIONS[reduction], "ignore_index": index, "z_loss": z_loss}

    def loss(input, linear_weight, linear_bias):
        options["linear_bias"] = linear_bias
        out = reference(
            input, linear_weight, target, label_smoothing=label_smoothing, softcap=softcap or None, **options
        )
        return out.to(grad_loss.dtype)

    return differentiable_grads(loss, (input, linear_weight, linear_bias), needed, grad_loss)


# --- Arguments
def _problem(input, linear_weight, target, linear_bias, ignore_index) -> str | None:
    if input.dim() not in (1, 2):
        return f"expected input with dimensionality 1 or 2, got {input.dim()}"
    if linear_weight.dim() < 2:
        return f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
    if input.shape[-1] != linear_weight.shape[-1]:
        return (
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    classes = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != classes:
        return f"expected linear_bias shape {tuple(classes)}, got {tuple(linear_bias.shape)}"
    if len(classes) > 1 and input.dim() == 1:
        return (
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input,"
            f" (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if ignore_index is not None and target.shape == (*input.shape[:-1], *classes):
        return "ignore_index cannot be specified when target contains probabilities"
    return None


def _is_tiny(input, linear_weight, linear_bias) -> bool:
    """Also no K-dimensional loss, and a bias that is not broadcast."""
    if input.dim() not in (1, 2) or linear_weight.dim() != 2:
        return False
    classes, features = linear_weight.shape
    fits = linear_bias is None or (linear_bias.dim() == 1 and linear_bias.numel() == classes)
    return fits and input.nbytes * classes < TINY * features


def _is_native(input, linear_weight, linear_bias) -> bool:
    """Whether the registered op takes this linear layer."""
    return (
        linear_weight.dim() == 2
        and linear_weight.numel() > 0
        and all(
            x is None or (x.dtype == input.dtype and x.device == input.device and x.layout == torch.strided)
            for x in (linear_weight, linear_bias)
        )
    )


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of a linear layer's outputs; memory for a chunk of the logits instead of all of them.

    Less than 1.2 MB of logits on a CPU go to eager PyTorch, as in cross_entropy.

    Args: as torch.nn.functional.linear_cross_entropy (torch 2.13), and `z_loss` and `softcap` as in cross_entropy.
        input: (D) or (N, D); float32, float64, bfloat16 or float16.
        linear_weight: (V, D), of the input's dtype. (V, d1, ..., D), the K-dimensional loss, runs in eager PyTorch.
        target: labels, int64 of shape () or (N,); or probabilities of shape (V) or (N, V).
        linear_bias: (V) or None.
        weight: class weights (V) or None.
        ignore_index: a label that does not count; default -100. Not with probabilities.

    Raises:
        RuntimeError: shapes that do not fit, ignore_index with probabilities.
        What cross_entropy raises, IndexError for a label out of range among it.
    """
    plain = not (z_loss or softcap) and (ignore_index is None or not target.is_floating_point())
    if dispatch.may_hand_over(input) and plain and _is_tiny(input, linear_weight, linear_bias):
        try:
            logits, index = F.linear(input, linear_weight, linear_bias), -100 if ignore_index is None else ignore_index
            return F.cross_entropy(logits, target, weight, None, index, None, reduction, label_smoothing)
        except Exception:  # told again below, with the argument and its value
            pass
    problem = _problem(input, linear_weight, target, linear_bias, ignore_index)
    if problem:
        raise RuntimeError(f"pyfused.linear_cross_entropy: {problem}")
    given = (input, linear_weight, target)
    options = {
        **{"linear_bias": linear_bias, "weight": weight, "reduction": reduction, "ignore_index": ignore_index},
        **{"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap},
    }
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    if not _is_native(input, linear_weight, linear_bias):
        return reference(*given, **options)
    logits = input.new_empty(()).expand(*input.shape[:-1], linear_weight.shape[0])  # for its shape and dtype alone
    if not ce.is_native(logits, target, weight):
        return reference(*given, **options)
    index = -100 if ignore_index is None else ignore_index
    problem = ce.problem(logits, target, weight, index, reduction, label_smoothing, softcap)
    if problem:
        reject("linear_cross_entropy", problem, reference, *given, **options)
    rows = input.unsqueeze(0) if input.dim() == 1 else input
    args = (
        *(rows, linear_weight, linear_bias, ce.as_rows(logits, target)[1], weight),
        *ce.packed_options(reduction, index, label_smoothing, z_loss, softcap),
    )
    if needs_grad(input, linear_weight, linear_bias):
        loss = _LinearCrossEntropy.apply(*args)
    else:
        loss = _forward(*args[:5], [False] * 3, *args[5:])[0]
    return (loss.view(input.shape[:-1]) if reduction == "none" else loss).to(ce.loss_dtype(logits, target, weight))
