"""Softmax cross-entropy of logits.

    z = softcap · tanh(input / softcap), or input;   lse = log ∑_c exp(z_c)
    labels          loss = w_t (1-ε) (lse - z_t) + ε/C ∑_c w_c (lse - z_c) + w_t z_loss lse²  (0 where t = ignore_index)
    probabilities   loss = ∑_c w_c ((1-ε) y_c + ε/C) (lse - z_c) + z_loss lse²
    mean            divides the sum by total = ∑ w_t over rows not ignored, or by the number of rows for probabilities

Label smoothing ε: Szegedy et al. 2015, arXiv:1512.00567. z-loss: Chowdhery et al. 2022, arXiv:2204.02311. Softcap:
Gemma 2, arXiv:2408.00118. Forward keeps three numbers per row and backward recomputes the softmax from the logits,
unless the forward could guess its grad_loss and made the gradient as well (expected_grad.py):

    stats = [m = max z,  S = ∑_c exp(z_c - m),  o],   o = ∑_{c≠t} exp(z_c - z_t) for labels, ∑ of the target otherwise

The odds o against the label give p_t = 1 / (1 + o) and p_t - 1 = -1 / (1 + 1/o), neither with cancellation: rows
already classified with certainty keep their gradient, and improbable labels that of lse.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import autocasts, by_signature, define, differentiable_grads, is_transformed, needs_grad, reject
from .expected_grad import ExpectedGrad

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
# Bytes of logits below which calls go to eager PyTorch. Ours cost 10 to 50 us more a call forward and 30 to 100 in
# training, the more the less of Python is left in the caches. In turns with eager they win from 200 to 300 KB (one
# thread) and 400 KB (two) of 40 to 8000 classes on, in training from 500 and 800 KB, but one row of 128,256 classes
# takes them 1.4 times as long, and two on two threads. 17 to 24 classes: 150 to 200 KB; 10 classes: 8 and 11 KB, eager
# being slow on rows that are shorter than a vector of 64 bytes.
TINY, TINY_TRAINING = 170_000, 350_000  # for each thread
TINY_ROWS_OF_96, TINY_ROWS_OF_60, TINY_FEW_ROWS = 200_000, 12_000, 2_000_000


def reference(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, *, z_loss=0.0, softcap=None,
    return_lse=False, inplace=False,
):  # fmt: skip
    """The op in eager PyTorch."""
    z = input if softcap is None else softcap * torch.tanh(input / softcap)
    loss = F.cross_entropy(z, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if not z_loss and not return_lse:
        return loss
    lse = torch.logsumexp(z.to(arithmetic_dtype(z)), dim=0 if z.dim() == 1 else 1)
    if z_loss:
        row_weight = _row_weight(z, target, weight, ignore_index).to(lse.dtype)
        penalty = z_loss * row_weight * torch.where(row_weight != 0, lse, 0).square()
        if reduction != "none":
            penalty = penalty.sum() / (row_weight.sum() if reduction == "mean" else 1)
        loss = loss + penalty.to(loss.dtype)
    return (loss, lse) if return_lse else loss


def _row_weight(z, target, weight, ignore_index):
    """What each row counts in the mean: its label's weight, 0 where ignored; 1 for probabilities."""
    if target.shape == z.shape:
        return torch.ones_like(z.select(0 if z.dim() == 1 else 1, 0))
    kept = target != ignore_index
    return kept if weight is None else torch.where(kept, weight[torch.where(kept, target, 0).long()], 0)


def arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of losses and statistics inside."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- Forward. The registered ops take [R, C] or [N, C, P] logits; labels are int64, one per row.
_OPTIONS = "int reduction, SymInt ignore_index, float label_smoothing, float z_loss, float softcap"  # softcap 0: none


def alloc(input, target, weight, return_lse, reduction, ignore_index, label_smoothing, z_loss, softcap):
    """(loss, lse, stats, total) in the dtype of the arithmetic; lse has no elements unless asked for."""
    shape, dtype = input.shape, arithmetic_dtype(input)
    rows = (shape[0], *shape[2:])
    total = input.new_empty((), dtype=dtype)
    loss = total.new_empty(rows) if REDUCTIONS[reduction] == "none" else torch.empty_like(total)
    return loss, total.new_empty(rows if return_lse else 0), total.new_empty((3, math.prod(rows))), total


def _target_matrix(z, target, weight, label_smoothing, ignore_index):
    """(what of the target falls on each logit besides the label, what falls on the label, the label or 0)."""
    w = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    w = w.view(-1, *[1] * (z.dim() - 2))
    if target.is_floating_point():
        return w * (target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / z.shape[1]), None, None
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    row_weight = torch.where(kept, w.flatten()[label], 0)
    smooth = label_smoothing if label_smoothing > 0 else 0
    return (w * smooth / z.shape[1]) * kept.unsqueeze(1), row_weight * (1 - smooth), label


def _reference_forward(input, target, weight, return_lse, reduction, ignore_index, label_smoothing, z_loss, softcap):
    z = input.to(arithmetic_dtype(input))
    options = {"z_loss": z_loss, "softcap": softcap or None, "return_lse": True}
    weight = None if weight is None else weight.to(z.dtype)
    mode = REDUCTIONS[reduction]
    loss, lse = reference(z, target, weight, ignore_index, mode, label_smoothing, **options)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    top = z.amax(1) if z.shape[1] else z.new_zeros(lse.shape)
    e = torch.exp(z - top.unsqueeze(1))
    spread, _, label = _target_matrix(z, target, weight, label_smoothing, ignore_index)
    if label is None:
        odds = spread.sum(1)
    else:
        at = label.unsqueeze(1)
        odds = e.scatter(1, at, 0).sum(1) / e.gather(1, at).squeeze(1)
    total = _row_weight(z, target, weight, ignore_index).sum().to(z.dtype)
    stats = torch.stack([top.flatten(), e.sum(1).flatten(), odds.flatten()])
    return loss.to(z.dtype).clone(), lse if return_lse else lse.new_empty(0), stats, total


_forward = define(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, bool return_lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    alloc,
    _reference_forward,
)


# --- Backward
def alloc_backward(grad_loss, grad_lse, input, *args):
    return torch.empty_like(input)


def _reference_backward(
    grad_loss, grad_lse, input, target, weight, stats, total, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    z = input.to(arithmetic_dtype(input))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    rows = (*z.shape[:1], *z.shape[2:])
    top, all_, odds = (s.view(rows).unsqueeze(1) for s in stats)
    p = torch.exp(z - top) / all_
    spread, on_label, label = _target_matrix(z, target, weight, label_smoothing, ignore_index)
    d = p * spread.sum(1, keepdim=True) - spread
    if label is not None:
        d += on_label.unsqueeze(1) * p.scatter(1, label.unsqueeze(1), -1 / (1 + 1 / odds))
    if z_loss:
        row_weight = _row_weight(z, target, weight, ignore_index).to(z.dtype).unsqueeze(1)
        d += 2 * z_loss * row_weight * (top + torch.log(all_)) * p
    mode = REDUCTIONS[reduction]
    d *= grad_loss.unsqueeze(1) if mode == "none" else grad_loss / total if mode == "mean" else grad_loss
    if label is not None:
        d = torch.where((target == ignore_index).unsqueeze(1), 0, d)
    if grad_lse is not None:
        d += grad_lse.unsqueeze(1) * p
    if softcap:
        d *= 1 - (z / softcap).square()
    return torch.empty_like(input).copy_(d)


_GIVEN = "Tensor target, Tensor? weight, Tensor stats, Tensor total"
_backward = define(
    f"cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor input, {_GIVEN}, {_OPTIONS}) -> Tensor",
    alloc_backward,
    _reference_backward,
)
_backward_ = define(
    f"cross_entropy_backward_(Tensor grad_loss, Tensor? grad_lse, Tensor(a!) input, {_GIVEN}, {_OPTIONS}) -> ()",
    lambda *args: None,
    lambda *args: (args[2].copy_(_reference_backward(*args)), None)[1],  # the op returns nothing
)


# --- Both at once, for labels or probabilities without class weights
def alloc_with_grad(grad_loss, input, target, *options):
    loss, _, stats, total = alloc(input, target, None, False, *options)
    return loss, stats, total, torch.empty_like(input)


def _reference_with_grad(grad_loss, input, target, *options):
    loss, _, stats, total = _reference_forward(input, target, None, False, *options)
    grad = loss.new_full((), grad_loss)
    return loss, stats, total, _reference_backward(grad, None, input, target, None, stats, total, *options)


_forward_with_grad = define(
    f"cross_entropy_with_grad(float grad_loss, Tensor input, Tensor target, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    alloc_with_grad,
    _reference_with_grad,
)
_expected = ExpectedGrad()


class _CrossEntropy(torch.autograd.Function):
    """Returns the loss, or with return_lse (loss, lse)."""

    @staticmethod
    def forward(ctx, input, target, weight, return_lse, inplace, options, guesses):
        ctx.options, ctx.inplace, ctx.grad_input = options, inplace, None
        ctx.kind = (input.dtype, input.shape[1], options) if guesses else None
        ctx.guess = _expected.guess(ctx.kind) if guesses else None
        if ctx.guess is None:
            loss, lse, stats, total = _forward(input, target, weight, return_lse, *options)
        else:  # an attribute, not a saved tensor: nothing else may hold the gradient when the backward hands it on
            loss, stats, total, ctx.grad_input = _forward_with_grad(ctx.guess, input, target, *options)
        ctx.save_for_backward(input, target, weight, stats, total)
        return (loss, lse) if return_lse else loss

    @staticmethod
    def backward(ctx, grad_loss, grad_lse=None):
        input, target, weight, stats, total = ctx.saved_tensors
        none = (None,) * 6
        if torch.is_grad_enabled():
            return _differentiable(ctx, input, target, weight, grad_loss, grad_lse), *none
        if ctx.kind:
            grad_input, ctx.grad_input = ctx.grad_input, None
            if _expected.is_right(ctx.kind, ctx.guess, grad_loss) and grad_input is not None:
                return grad_input, *none
            del grad_input  # before another is allocated
        args = (grad_loss, grad_lse, input, target, weight, stats, total, *ctx.options)
        if not ctx.inplace:
            return _backward(*args), *none
        _backward_(*args)
        # Whatever else saved these logits for its backward, this function's second backward included, must now raise.
        torch.autograd.graph.increment_version(input)
        return input.detach(), *none


def _differentiable(ctx, input, target, weight, grad_loss, grad_lse):
    reduction, ignore_index, label_smoothing, z_loss, softcap = ctx.options
    options = {"z_loss": z_loss, "softcap": softcap or None, "return_lse": True}
    dtype = arithmetic_dtype(input)
    weight = None if weight is None else weight.to(dtype)
    mode = REDUCTIONS[reduction]

    def losses(input):
        return reference(input.to(dtype), target, weight, ignore_index, mode, label_smoothing, **options)

    if grad_lse is None:
        grad_lse = torch.zeros_like(input.select(1, 0), dtype=dtype)
    return differentiable_grads(losses, (input,), (True,), (grad_loss, grad_lse))[0]


# --- Arguments
def is_native(input, target, weight) -> bool:
    """Whether the registered op takes these; eager PyTorch judges and runs everything else."""
    if not (isinstance(input, torch.Tensor) and isinstance(target, torch.Tensor)) or is_transformed():
        return False
    if input.dtype not in DTYPES or input.dim() == 0 or not (input.is_cpu or input.is_cuda):
        return False
    if input.layout != torch.strided or target.layout != torch.strided or target.device != input.device:
        return False
    if weight is None and target.dim() != input.dim():  # labels
        return True
    # Gradients for probabilities or for class weights, and probabilities of more precision than the arithmetic: eager.
    exact = (input.dtype, arithmetic_dtype(input))
    return (
        (weight is None or weight.device == input.device)
        and not needs_grad(target, weight)
        and (target.shape != input.shape or all(x is None or x.dtype in exact for x in (target, weight)))
    )


def problem(input, target, weight, ignore_index, reduction, label_smoothing, softcap) -> str | None:
    shape = input.shape
    classes, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    if reduction not in REDUCTIONS:
        return f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
    if label_smoothing > 1:
        return f"label_smoothing must be at most 1, got {label_smoothing}"
    if softcap is not None and not softcap > 0:
        return f"softcap must be positive or None, got {softcap}"
    if weight is not None and weight.shape != (classes,):
        return f"weight must have one element per class, ({classes},), got {tuple(weight.shape)}"
    if target.shape == shape:
        return f"ignore_index must be negative with probabilities, got {ignore_index}" if ignore_index >= 0 else None
    if target.dtype != torch.int64 and not (target.dtype == torch.uint8 and len(shape) <= 2):
        return f"target must be int64 class indices of shape {rows}, got {target.dtype} {tuple(target.shape)}"
    if target.shape != rows:
        return f"target must have the shape {rows} (class indices) or {tuple(shape)}, got {tuple(target.shape)}"
    if weight is not None and weight.dtype != input.dtype and not autocasts(input):
        return f"weight must have the dtype of input, {input.dtype}, got {weight.dtype}"
    return None


def _is_tiny(input) -> bool:
    size, threads = input.nbytes, torch.get_num_threads()
    if size < TINY_ROWS_OF_60 or input.dim() != 2:
        return size < TINY * threads
    rows = input.shape[0]
    if size <= 96 * rows:
        return 64 * rows <= size < TINY_ROWS_OF_96
    return size < (TINY_TRAINING if needs_grad(input) else TINY) * threads or (rows <= 4 and size < TINY_FEW_ROWS)


@by_signature
def _way(_threads, _autocast, input, target, weight, ignore_index, reduction) -> str | None:
    """How a right call on CPU tensors goes: to "eager" PyTorch if it is small, else to the "kernel".
    None: not known yet. The first two arguments are what `_is_tiny` and `problem` ask for besides."""
    if not is_native(input, target, weight) or input.dim() == 1:
        return None
    if problem(input, target, weight, ignore_index, reduction, 0.0, None):
        return None
    return "eager" if _is_tiny(input) else "kernel"


def _check_inplace(input: torch.Tensor) -> None:
    base = input if input._base is None else input._base
    if base.is_leaf:
        raise RuntimeError(
            "pyfused.cross_entropy: inplace=True would overwrite input, a leaf that requires grad, with its gradient"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape)):
        raise RuntimeError("pyfused.cross_entropy: inplace=True needs an input without expanded dimensions")


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    inplace: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax cross-entropy: the logits are read once forward and once backward; only the gradient has their size.

    On a CPU, few logits, for which a call costs more than a kernel saves (`_is_tiny`: 170 kB for each thread, 350 in
    training; less in short rows), go to eager PyTorch with its rounding, unless an option below that eager lacks or a
    backend is asked for.

    In training on a CPU, with a reduction and without class weights, return_lse and inplace, the forward also computes
    the gradient for the factor that the backward before was given, and keeps it until its own backward.

    Args: as torch.nn.functional.cross_entropy, and
        input: logits (C,), (N, C) or (N, C, d1, ...) with any strides; float32, float64, bfloat16 or float16.
        target: labels, int64 of shape (), (N,) or (N, d1, ...); or probabilities of the shape of `input`.
        z_loss: adds z_loss · lse² to the loss of every row that is not ignored, times the class weight of its label,
            before the reduction.
        softcap: replaces each logit by softcap · tanh(logit / softcap) first.
        return_lse: also return log ∑ exp(logits), ignored rows included; float32 (float64), differentiable. NaN for
            a row with +inf or nothing but -inf, whose loss is NaN as in PyTorch; torch.logsumexp gives the infinity.
        inplace: backward may write the gradient into the memory of `input`. A second backward, or the backward of
            anything else that saved `input`, then raises RuntimeError. No effect under torch.compile.

    Returns:
        The loss, or (loss, lse). The arithmetic is float32 (float64); the loss has eager's dtype: that of `input`,
        float32 under autocast. Gradients for probabilities or their class weights come from eager PyTorch.

    Raises:
        What torch.nn.functional.cross_entropy raises; IndexError for a label outside [0, C) that is not ignore_index.
        ValueError: softcap is not positive.
        RuntimeError: inplace=True on a leaf that requires grad, or on an expanded tensor.
    """
    given = (input, target, weight, ignore_index, reduction, label_smoothing)
    way = None
    plain = not (z_loss or softcap or return_lse or inplace) and label_smoothing <= 1  # eager has no more options
    as_it_comes = dispatch.may_hand_over(input) and not is_transformed()  # eager, plain tensors on a CPU
    if plain and as_it_comes:
        way = _way(torch.get_num_threads(), autocasts(input), *given[:-1])
    if way == "eager":
        with contextlib.suppress(Exception):  # told again below, with the argument and its value
            return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if way != "kernel":
        if not is_native(input, target, weight) or (input.dim() == 1 and target.shape == (1,)):
            return reference(*given, z_loss=z_loss, softcap=softcap, return_lse=return_lse)
        if wrong := problem(*given, softcap):
            reject("cross_entropy", wrong, reference, *given, z_loss=z_loss, softcap=softcap, return_lse=return_lse)
    flat, flat_target = as_rows(input, target)
    options = packed_options(reduction, ignore_index, label_smoothing, z_loss, softcap)
    if needs_grad(input):
        if inplace:
            _check_inplace(input)
            inplace = not torch.compiler.is_compiling()
        guesses = as_it_comes and weight is None and reduction != "none" and not (return_lse or inplace)
        out = _CrossEntropy.apply(flat, flat_target, weight, return_lse, inplace, options, guesses)
        loss, lse = out if return_lse else (out, None)
    else:
        loss, lse, _, _ = _forward(flat, flat_target, weight, return_lse, *options)
    if loss.dtype != input.dtype:
        loss = loss.to(loss_dtype(input, target, weight))
    if reduction != "none" and not return_lse:
        return loss
    shape = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    loss = loss.view(shape) if reduction == "none" else loss
    return (loss, lse.view(shape)) if return_lse else loss


def packed_options(reduction, ignore_index, label_smoothing, z_loss, softcap) -> tuple:
    """The registered ops' last arguments. Eager takes a negative label_smoothing for 0."""
    return (
        REDUCTIONS.index(reduction),
        ignore_index,
        max(float(label_smoothing), 0.0),
        float(z_loss),
        float(softcap or 0),
    )


def as_rows(input, target):
    """Logits as [R, C] or [N, C, P], views where the strides allow it; labels int64; probabilities like the logits."""
    if target.dtype == torch.uint8:
        target = target.to(torch.int64)
    if input.dim() == 1:
        return input.unsqueeze(0), target.unsqueeze(0)
    if input.dim() > 3:
        return input.flatten(2), target.flatten(2 if target.shape == input.shape else 1)
    return input, target


def as_kernels_read(input, target, weight):
    """Labels and class weights without gaps, the weights in the dtype of the arithmetic."""
    if not target.is_floating_point():
        target = target.contiguous()
    return target, None if weight is None else weight.to(arithmetic_dtype(input)).contiguous()


def loss_dtype(input, target, weight) -> torch.dtype:
    if autocasts(input):
        return arithmetic_dtype(input)
    dtype = input.dtype
    for x in (target, weight):
        if x is not None and x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype
