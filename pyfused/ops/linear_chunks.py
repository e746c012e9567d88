"""The loop that linear_cross_entropy and in_batch_cross_entropy share: a linear layer's logits, some rows at a time.

Logits of a chunk go into a buffer, then the loss is taken, then the gradient of the logits over the same buffer, and
from it the chunk's part of d_input, d_weight and d_bias. A mean's denominator is known from the labels beforehand.

A float32 buffer for 16-bit arguments asks for the arithmetic in float32; the layer's weight is then converted some
classes at a time.
"""

from __future__ import annotations

import torch

from . import cross_entropy as ce

_NONE, _SUM = ce.REDUCTIONS.index("none"), ce.REDUCTIONS.index("sum")


def alloc(input, linear_weight, linear_bias, target, weight, needed, reduction, *options):
    """(loss, total, stats, d_input, d_weight, d_bias), the last three empty where not needed.

    Losses and statistics have the dtype of the arithmetic. So have float16's gradients, which are still to be
    multiplied by an upstream gradient that exists because float16 would underflow; others have the input's dtype.
    """
    wanted = [need and reduction != _NONE for need in needed]

    def empty(*shape):
        return torch.empty(shape, dtype=ce.arithmetic_dtype(input), device=input.device)

    loss = empty(input.shape[0]) if reduction == _NONE else empty()
    return loss, empty(), empty(3, input.shape[0]), *alloc_grads(input, linear_weight, wanted)


def alloc_grads(input, linear_weight, wanted):
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtype = torch.float32 if input.dtype == torch.float16 else input.dtype
    return tuple(input.new_empty(shape if want else (0,), dtype=dtype) for shape, want in zip(shapes, wanted))


def product(input, linear_weight, linear_bias, out):
    """out = input linear_weightᵀ + linear_bias, in the dtype of `out`."""
    input, linear_bias = _like(out, input), _like(out, linear_bias)
    for classes in _blocks(linear_weight, linear_weight.dtype != out.dtype):
        weight, to = _like(out, linear_weight[classes]).t(), out[:, classes]
        if linear_bias is None:
            torch.mm(input, weight, out=to)
        else:
            torch.addmm(linear_bias[classes], input, weight, out=to)
    return out


def _like(chunk, x):
    """`x` in the dtype of the arithmetic; None, and labels, as they are."""
    return x if x is None or not x.is_floating_point() else x.to(chunk.dtype)


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
    first, mixed = rows.start == 0, linear_weight.dtype != d_logits.dtype
    if needed[0]:
        sums = d_logits.new_empty(d_input[rows].shape) if mixed else d_input[rows]
        for classes in _blocks(linear_weight, mixed):
            weight = _like(d_logits, linear_weight[classes])
            add_product(sums, d_logits[:, classes], weight, classes.start == 0)
        if mixed:
            d_input[rows] = sums
    if needed[1]:
        input = _like(d_logits, input[rows])
        # On a CPU a product of another dtype is added to the gradient while it is still in the cache.
        for classes in _blocks(d_weight, d_weight.is_cpu and d_weight.dtype != d_logits.dtype):
            add_product(d_weight[classes], d_logits[:, classes].t(), input, first)
    if needed[2]:
        part = d_logits.sum(0, dtype=ce.arithmetic_dtype(d_logits))
        d_bias.copy_(part) if first else d_bias.add_(part)


def add_product(out, a, b, overwrite):
    """out += a b, or out = a b. Elsewhere than on NVIDIA's GPUs a product has the factors' dtype before it is added."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if overwrite else out.addmm_(a, b)
    elif out.is_cuda and torch.version.cuda:
        kept = {"out_dtype": out.dtype, "out": out}
        torch.mm(a, b, **kept) if overwrite else torch.addmm(out, a, b, **kept)
    else:
        part = torch.mm(a, b)
        out.copy_(part) if overwrite else out.add_(part)


def _blocks(of_classes, split):
    """Slices of the classes: all, or if `split` such that 2 MiB of float32 belong to each."""
    rows, columns = of_classes.shape
    step = max(256, (2 << 20) // (4 * columns)) if split else rows
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@torch.no_grad()
def run_forward(
    chunk, input, linear_weight, linear_bias, target, weight, needed, reduction, *options, adjust=None, recycle=None
):  # fmt: skip
    """The registered op; `chunk` is a buffer [rows, V] for the logits of as many rows at a time.

    adjust: called with a chunk's logits and the number of its first row, may change them before the softmax.
    recycle: gives a tensor like its argument, in memory that was in use before.
    """
    weight = _like(chunk, weight)
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
        logits = product(input[rows], linear_weight, linear_bias, chunk[: rows.stop - begin])
        if adjust is not None:
            adjust(logits, begin)
        given = (_like(chunk, target[rows]), weight)
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
        loss.copy_(torch.stack(sums).sum(dtype=torch.float64)) if sums else loss.zero_()  # a GPU waits to copy a number
        if mean:
            loss.div_(total)
    if late:
        for g in partial:
            g.mul_(factor)
    return loss, total, stats, *_finished(grads, partial)


def _one_chunk(logits, input, linear_weight, linear_bias, target, weight, needed, reduction, *options, adjust, recycle):
    """The same for all rows at once, which is cross_entropy: nothing to add up, and a third of the calls."""
    product(input, linear_weight, linear_bias, logits)
    target = _like(logits, target)
    if adjust is not None:
        adjust(logits, 0)
    loss, _, stats, total = ce._forward(logits, target, weight, False, reduction, *options)
    needed = [need and reduction != _NONE for need in needed]
    grads, _ = _ready(alloc_grads(input, linear_weight, needed), input, logits, recycle)
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
    weight = _like(chunk, weight)
    grads, partial = _ready(alloc_grads(input, linear_weight, needed), input, chunk, recycle)
    for begin in range(0, input.shape[0], len(chunk)):
        rows = slice(begin, min(begin + len(chunk), input.shape[0]))
        logits = product(input[rows], linear_weight, linear_bias, chunk[: rows.stop - begin])
        if adjust is not None:
            adjust(logits, begin)
        given = (_like(chunk, target[rows]), weight, stats[:, rows].contiguous(), total)
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
