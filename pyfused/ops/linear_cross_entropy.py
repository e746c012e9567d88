"""Linear layer + softmax cross-entropy, without the N x V logits.

    logits = input · linear_weightᵀ + linear_bias;   loss = cross_entropy(logits, target, ...)

Rows are taken in chunks: logits of a chunk into a buffer, loss, gradient of the logits over the same buffer, and from
it the chunk's part of d_input, d_weight and d_bias. For reductions "mean" and "sum" that is in forward, for upstream
gradient 1, the mean's denominator being known from the labels; backward scales where the upstream gradient is another.
For "none", whose upstream gradients are known only then, backward computes the logits again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import dispatch
from .._library import define, differentiable_grads, needs_grad, reject
from . import cross_entropy as ce
from .conv2d_relu import autocast

# Bytes of logits below which calls go to eager PyTorch. Ours, with 50 us more a call forward and 110 us in training,
# wins from 256 x 1000 logits (float32) and 512 x 1000 (bfloat16) on, for 64 to 256 features.
TINY = 1_200_000
_NONE, _SUM = ce.REDUCTIONS.index("none"), ce.REDUCTIONS.index("sum")


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


def alloc(input, linear_weight, linear_bias, target, weight, needed, reduction, *options):
    """(loss, total, stats, d_input, d_weight, d_bias), the last three empty where not needed.

    Losses and statistics have the dtype of the arithmetic. So have float16's gradients, which are still to be
    multiplied by an upstream gradient that exists because float16 would underflow; others have the input's dtype.
    """
    wanted = [need and reduction != _NONE for need in needed]

    def empty(*shape):
        return torch.empty(shape, dtype=ce.arithmetic_dtype(input), device=input.device)

    loss = empty(input.shape[0]) if reduction == _NONE else empty()
    return loss, empty(), empty(3, input.shape[0]), *_alloc_grads(input, linear_weight, wanted)


def _alloc_grads(input, linear_weight, wanted):
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtype = torch.float32 if input.dtype == torch.float16 else input.dtype
    return tuple(input.new_empty(shape if want else (0,), dtype=dtype) for shape, want in zip(shapes, wanted))


def _logits(input, linear_weight, linear_bias, out):
    if linear_bias is None:
        return torch.mm(input, linear_weight.t(), out=out)
    return torch.addmm(linear_bias, input, linear_weight.t(), out=out)


def _denominator(target, weight, ignore_index, dtype):
    """The weights of the rows that count, summed; labels out of range are left to the kernel that names them."""
    if target.is_floating_point():
        return target.new_full((), len(target), dtype=dtype)  # unlike torch.tensor, without waiting for a GPU
    counted = target != ignore_index
    if weight is None:
        return counted.sum(dtype=dtype)
    counted &= (target >= 0) & (target < len(weight))
    return weight.double().index_select(0, target.where(counted, 0)).where(counted, 0).sum().to(dtype)


def out_of_range(target, classes, ignore_index) -> IndexError | None:
    """The error for the first label that is no class, if there is one. Waits for the device."""
    if target.is_floating_point():
        return None
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if not bad.any():
        return None
    at = bad.nonzero()[0].item()
    return IndexError(f"target {target[at].item()} is out of bounds: target[{at}] must lie in [0, {classes})")


def _add_grads(d_logits, rows, input, linear_weight, grads, needed):
    """One chunk's part of the three gradients; the first chunk overwrites what stands in `grads`."""
    d_input, d_weight, d_bias = grads
    first = rows.start == 0
    if needed[0]:
        _add_product(d_input[rows], d_logits, linear_weight, True)
    if needed[1]:
        for classes in _blocks(d_weight, d_logits):
            _add_product(d_weight[classes], d_logits[:, classes].t(), input[rows], first)
    if needed[2]:
        part = d_logits.sum(0, dtype=d_bias.dtype)
        d_bias.copy_(part) if first else d_bias.add_(part)


def _add_product(out, a, b, overwrite):
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if overwrite else out.addmm_(a, b)
    else:
        part = torch.mm(a, b)
        out.copy_(part) if overwrite else out.add_(part)


def _blocks(d_weight, d_logits):
    """Slices of the classes. A 16-bit product is added to a float32 gradient while it is still in the cache."""
    on_cpu = d_weight.device.type == "cpu" and d_weight.dtype != d_logits.dtype
    step = max(256, (2 << 20) // (d_weight.shape[1] * d_weight.itemsize)) if on_cpu else len(d_weight)
    return [slice(begin, min(begin + step, len(d_weight))) for begin in range(0, len(d_weight), step)]


@torch.no_grad()
def run_forward(
    chunk, input, linear_weight, linear_bias, target, weight, needed, reduction, *options, adjust=None, recycle=None
):  # fmt: skip
    """The registered op; `chunk` is a buffer [rows, V] for the logits of as many rows at a time.

    adjust: called with a chunk's logits and the number of its first row, may change them before the softmax.
    recycle: gives a tensor like its argument, in memory that was in use before.
    """
    given = (input, linear_weight, linear_bias, target, weight, needed, reduction, *options)
    late = input.dtype == torch.float16  # gradients of the logits divided by a large batch would underflow
    if 0 < len(input) <= len(chunk) and not late:
        return _one_chunk(chunk[: len(input)], *given, adjust=adjust, recycle=recycle)
    loss, total, stats, *grads = alloc(*given)
    needed = [bool(g.numel()) for g in grads]
    grads, partial = _ready(grads, input, chunk, recycle)
    mode = _NONE if reduction == _NONE else _SUM
    total.copy_(_denominator(target, weight, options[0], total.dtype))
    mean = reduction not in (_NONE, _SUM)
    factor = torch.where(total == 0, 0, 1 / total) if mean else loss.new_ones(())  # 0: every row ignored
    sums = []
    for begin in range(0, input.shape[0], len(chunk)):
        rows = slice(begin, min(begin + len(chunk), input.shape[0]))
        logits = _logits(input[rows], linear_weight, linear_bias, chunk[: rows.stop - begin])
        if adjust is not None:
            adjust(logits, begin)
        given = (target[rows], weight)
        try:
            part, _, part_stats, part_total = ce._forward(logits, *given, False, mode, *options)
        except IndexError as error:  # which counts from the chunk's first row
            raise out_of_range(target, len(linear_weight), options[0]) or error from None
        stats[:, rows] = part_stats
        if mode == _NONE:
            loss[rows] = part
        else:
            sums.append(part)
        if any(needed):
            upstream = torch.ones_like(factor) if late else factor
            ce._backward_(upstream, None, logits, *given, part_stats, part_total, mode, *options)
            _add_grads(logits, rows, input, linear_weight, partial, needed)
    if mode == _SUM:
        loss.copy_(torch.stack(sums).sum(dtype=torch.float64) if sums else 0)
        if mean:
            loss.div_(total)
    if late:
        for g in partial:
            g.mul_(factor)
    return loss, total, stats, *_finished(grads, partial)


def _one_chunk(logits, input, linear_weight, linear_bias, target, weight, needed, reduction, *options, adjust, recycle):
    """The same for all rows at once, which is cross_entropy: nothing to add up, and a third of the calls."""
    _logits(input, linear_weight, linear_bias, logits)
    if adjust is not None:
        adjust(logits, 0)
    loss, _, stats, total = ce._forward(logits, target, weight, False, reduction, *options)
    needed = [need and reduction != _NONE for need in needed]
    grads, _ = _ready(_alloc_grads(input, linear_weight, needed), input, logits, recycle)
    if any(needed):
        ce._backward_(loss.new_ones(()), None, logits, target, weight, stats, total, reduction, *options)
        _add_grads(logits, slice(0, len(input)), input, linear_weight, grads, needed)
    return loss, total, stats, *grads


def _ready(grads, input, chunk, recycle):
    """The gradients to return and those to add the chunks to, which are the same, or float32."""
    recycle = recycle or (lambda fresh: fresh)
    grads = [recycle(g) for g in grads]
    if not len(input):
        return grads, [g.zero_() for g in grads]
    if len(chunk) >= len(input) or grads[0].dtype == ce.arithmetic_dtype(input):
        return grads, grads
    return grads, [recycle(torch.empty_like(g, dtype=torch.float32)) for g in grads]


def _finished(grads, partial):
    return tuple(g if g is p else g.copy_(p) for g, p in zip(grads, partial))


@torch.no_grad()
def run_backward(
    chunk, grad_loss, input, linear_weight, linear_bias, target, weight, total, stats, needed, *options, adjust=None,
    recycle=None,
):  # fmt: skip
    """The registered op for reduction "none": the logits again, chunk by chunk."""
    grads, partial = _ready(_alloc_grads(input, linear_weight, needed), input, chunk, recycle)
    for begin in range(0, input.shape[0], len(chunk)):
        rows = slice(begin, min(begin + len(chunk), input.shape[0]))
        logits = _logits(input[rows], linear_weight, linear_bias, chunk[: rows.stop - begin])
        if adjust is not None:
            adjust(logits, begin)
        given = (target[rows], weight, stats[:, rows].contiguous(), total)
        ce._backward_(grad_loss[rows].contiguous(), None, logits, *given, _NONE, *options)
        _add_grads(logits, rows, input, linear_weight, partial, needed)
    return _finished(grads, partial)


def chunk_buffer(like, rows, classes, most, dtype=None):
    """A buffer [r, classes] for `rows` rows in chunks of equal length, of `most` rows at most."""
    chunks = max(1, -(-rows // most))
    return like.new_empty(max(1, -(-rows // chunks)), classes, dtype=dtype)


def all_rows(input, linear_weight):
    """A chunk buffer for everything at once."""
    return input.new_empty(max(input.shape[0], 1), linear_weight.shape[0])


_forward = define(
    f"linear_cross_entropy({_GIVEN}, bool[3] needed, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    alloc,
    lambda *args: run_forward(all_rows(*args[:2]), *args),
)
_backward = define(
    f"linear_cross_entropy_backward(Tensor grad_loss, {_GIVEN}, Tensor total, Tensor stats, bool[3] needed,"
    " SymInt ignore_index, float label_smoothing, float z_loss, float softcap) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, input, linear_weight, linear_bias, target, weight, total, stats, needed, *options: _alloc_grads(
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
