"""cross_entropy in Triton. Formulas and what is saved: pyfused/ops/cross_entropy.py.

Tiles   logits are read as z[n, c, p] with any strides (2-d: one n, p the rows). A program takes ROWS positions of an n:
        forward goes through the classes in blocks of BLOCK with a running maximum; backward has a program per block.
        Few classes: many rows to a program; positions innermost: a tile as wide as memory lies.
Bytes   of the logits: forward reads them once, backward reads and writes once: 3 R C elements, the floor while backward
        is a pass of its own. H100 (3.35 TB/s), 8192 x 128256 bfloat16: 0.63 + 1.25 ms. Per element some 12 instructions
        (float32: 16) where the memory leaves time for 17 (34).
Saves   per row [maximum m, S = ∑ exp(z - m), x]. The sums leave the label out, so a confident row keeps its digits.
Sums    a row's in the order of its blocks, the rows' by program in float64: the same bits for the same shape.
Edges   A block of -inf: the running maximum stands in as 0, so no -inf - -inf. Lanes past the last class are -inf after
        the softcap, not before it. A label outside [0, C) is read nowhere: loss NaN, gradient 0, error flag.
Floats  smoothing, z-loss and softcap are compile-time constants: as arguments Triton would round them to float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...ops import cross_entropy as op
from .common import ARGUMENTS, bucket, choose, exp, index_errors, kernel, log1p, report_index_error, tanh

NONE = tl.constexpr(op.REDUCTIONS.index("none"))
TARGET = tl.constexpr(ARGUMENTS.index("target"))
MEAN = tl.constexpr(op.REDUCTIONS.index("mean"))


@triton.jit
def _logits(at, inside, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    z = tl.load(at, mask=inside, other=-float("inf")).to(DTYPE)
    if SOFTCAP > 0:
        z = tl.where(inside, SOFTCAP * tanh(z / SOFTCAP), -float("inf"))
    return z


@triton.jit
def _spread(weight, target, c, y_at, inside, classes, SMOOTHING: tl.constexpr, SOFT: tl.constexpr, DTYPE: tl.constexpr):
    """What of the target falls on each logit besides the label: w_c ((1-ε) y_c + ε/C), or w_c for labels."""
    u = tl.full(inside.shape, 1.0, DTYPE)
    if SOFT:
        y = tl.load(y_at, mask=inside, other=0.0).to(DTYPE)
        u = y * (1 - SMOOTHING) + SMOOTHING / (tl.zeros((), DTYPE) + classes)
    if weight is not None:
        u *= tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return tl.where(inside, u, 0.0)


@triton.jit
def _label(target, r, ok, classes, ignore_index, SOFT: tl.constexpr):
    """(label or -1, row counts, row is bad)."""
    if SOFT:
        return tl.full(r.shape, -1, tl.int32), ok, r < 0
    else:
        label = tl.load(target + r, mask=ok, other=0)
        ignored = label == ignore_index
        outside = (label < 0) | (label >= classes)
        kept = ok & ~ignored & ~outside
        return tl.where(kept, label, -1).to(tl.int32), kept, ok & ~ignored & outside


@triton.jit
def _row_weight(weight, label, kept, SOFT: tl.constexpr, DTYPE: tl.constexpr):
    if SOFT or weight is None:
        return kept.to(DTYPE)
    else:
        return tl.load(weight + label, mask=kept, other=0.0)


@triton.jit
def _forward_kernel(
    loss, lse, stats, partial, input, target, weight, errors, rows, classes, positions, s_n, s_c, s_p, t_n, t_c, t_p,
    ignore_index, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, SOFT: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats.dtype.element_ty
    classes *= ALIGN
    PRECISE: tl.constexpr = input.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tiles = tl.cdiv(positions, ROWS)
    n = (pid // tiles).to(tl.int64)
    p = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = p < positions
    r = n * positions + p
    z_at, y_at = input + (n * s_n + p * s_p) * ALIGN, target + (n * t_n + p * t_p) * ALIGN
    label, kept, bad = _label(target, r, ok, classes, ignore_index, SOFT)

    top = tl.full((ROWS,), -float("inf"), DTYPE)
    others = tl.zeros((ROWS,), DTYPE)  # ∑ exp(z - top) without the label
    spread, mass = tl.zeros((ROWS,), DTYPE), tl.zeros((ROWS,), DTYPE)  # ∑ u (top - z), ∑ u
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = ok[:, None] & (c < classes)[None, :]
        columns = c[None, :].to(tl.int64)
        z = _logits(z_at[:, None] + columns * s_c, inside, SOFTCAP, DTYPE)
        new_top = tl.maximum(top, tl.max(z, 1))
        ref = tl.where(new_top == -float("inf"), 0.0, new_top)
        e = tl.where(c[None, :] == label[:, None], 0.0, exp(z - ref[:, None], PRECISE))
        others = others * exp(top - ref, PRECISE) + tl.sum(e, 1)
        if SOFT or SMOOTHING > 0:
            u = _spread(weight, target, c, y_at[:, None] + columns * t_c, inside, classes, SMOOTHING, SOFT, DTYPE)
            # Where all before was -inf, `spread` holds what it has to already: infinities, or the 0 of the start.
            spread += mass * tl.where(top == -float("inf"), 0.0, ref - top)
            spread += tl.sum(tl.where(inside, u * (ref[:, None] - z), 0.0), 1)
            mass += tl.sum(u, 1)
        top = new_top

    w = _row_weight(weight, label, kept, SOFT, DTYPE)
    found = label >= 0
    z_label = _logits(z_at + label.to(tl.int64) * s_c, found, SOFTCAP, DTYPE)
    at_label = tl.where(found, exp(z_label - top, PRECISE), 0.0)
    # S - 1, which is exactly the sum of the others where the label has the maximum (at_label = 1)
    log_sum = log1p(others + (at_label - 1.0))
    all_ = others + at_label
    row_lse = top + log_sum
    if SOFT:
        row_loss = mass * log_sum + spread
        x = mass
    else:
        row_loss = w * (1 - SMOOTHING) * ((top - z_label) + log_sum)
        x = -others / all_
        if SMOOTHING > 0:
            row_loss += (mass * log_sum + spread) * (SMOOTHING / (tl.zeros((), DTYPE) + classes))
    if Z_LOSS != 0:
        row_loss += Z_LOSS * w * row_lse * row_lse
    row_loss = tl.where(bad, float("nan"), tl.where(kept, row_loss, 0.0))

    tl.store(stats + r, top, mask=ok)
    tl.store(stats + rows + r, all_, mask=ok)
    tl.store(stats + rows + rows + r, x, mask=ok)  # 2 * rows may be more than 32 bits hold
    if lse is not None:
        tl.store(lse + r, row_lse, mask=ok)
    if loss is not None:
        tl.store(loss + r, row_loss, mask=ok)
    tl.store(partial + 2 * pid.to(tl.int64), tl.sum(row_loss.to(tl.float64), 0))
    tl.store(partial + 2 * pid.to(tl.int64) + 1, tl.sum(w.to(tl.float64), 0))
    if not SOFT:
        report_index_error(errors, TARGET, r, tl.load(target + r, mask=bad, other=0), classes, bad)


@triton.jit
def _backward_kernel(
    grad_input, grad_loss, grad_lse, input, target, weight, weight_sum, stats, total, rows, classes, positions,
    g_n, g_c, g_p, s_n, s_c, s_p, t_n, t_c, t_p, ignore_index, REDUCTION: tl.constexpr, SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, SOFT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats.dtype.element_ty
    classes *= ALIGN
    PRECISE: tl.constexpr = input.dtype.element_ty == tl.float32
    pid, blocks = tl.program_id(0), tl.cdiv(classes, BLOCK)
    tiles = tl.cdiv(positions, ROWS)
    n = (pid // blocks // tiles).to(tl.int64)
    p = (pid // blocks % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = p < positions
    r = n * positions + p
    inside = ok[:, None] & (c < classes)[None, :]
    columns = c[None, :].to(tl.int64)
    label, kept, bad = _label(target, r, ok, classes, ignore_index, SOFT)
    w = _row_weight(weight, label, kept, SOFT, DTYPE)
    top = tl.load(stats + r, mask=ok, other=1.0)
    all_ = tl.load(stats + rows + r, mask=ok, other=1.0)
    x = tl.load(stats + rows + rows + r, mask=ok, other=1.0)
    g = tl.load(grad_loss + r, mask=ok, other=0.0) if REDUCTION == NONE else tl.load(grad_loss)
    if REDUCTION == MEAN:
        g = g / tl.load(total)

    z = _logits((input + (n * s_n + p * s_p) * ALIGN)[:, None] + columns * s_c, inside, SOFTCAP, DTYPE)
    softmax = exp(z - top[:, None], PRECISE) / all_[:, None]
    if SOFT or SMOOTHING > 0:
        y_at = (target + (n * t_n + p * t_p) * ALIGN)[:, None] + columns * t_c
        u = _spread(weight, target, c, y_at, inside, classes, SMOOTHING, SOFT, DTYPE)
    if SOFT:
        d = softmax * x[:, None] - u
    else:
        error = tl.where(c[None, :] == label[:, None], x[:, None], softmax)  # softmax - one-hot
        d = (w * (1 - SMOOTHING))[:, None] * error
        if SMOOTHING > 0:
            sum_w = tl.load(weight_sum) if weight is not None else tl.zeros((), DTYPE) + classes
            d += (softmax * sum_w - u) * (SMOOTHING / (tl.zeros((), DTYPE) + classes))
    if Z_LOSS != 0:
        d += (2 * Z_LOSS * w * (top + tl.log(all_)))[:, None] * softmax
    d = tl.where(kept[:, None], d * (g if REDUCTION != NONE else g[:, None]), 0.0)
    if grad_lse is not None:
        d += tl.load(grad_lse + r, mask=ok & ~bad, other=0.0)[:, None] * softmax
    if SOFTCAP > 0:
        d *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
    at = (grad_input + (n * g_n + p * g_p) * ALIGN)[:, None] + columns * g_c
    tl.store(at, d.to(grad_input.dtype.element_ty), mask=inside)


# --- Launch
def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of (n, class, position)."""
    s = x.stride()
    return (0, s[1], s[0]) if x.dim() == 2 else s


def _shape(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """(N, C, P): images, classes, positions. One long image where rows follow each other evenly in every tensor."""
    x = tensors[0]
    if x.dim() == 2:
        return 1, x.shape[1], x.shape[0]
    n, classes, positions = x.shape
    if all(t.stride(0) == positions * t.stride(2) for t in tensors):
        return 1, classes, n * positions
    return n, classes, positions


def tiles(shape, strides, itemsize: int, forward: bool) -> list[tuple[int, int, int]]:
    """(ROWS, BLOCK, warps) for logits of (N, C, P) and strides (n, c, p); the rule of thumb first."""
    n, classes, positions = shape
    if strides[2] == 1 and strides[1] != 1:  # positions innermost
        rows, block = min(bucket(positions), 128), min(bucket(classes), 16)
        return [(rows, block, 4), (max(rows // 4, 1), 2 * block, 4), (rows, 2 * block, 16)]
    widest = 4096 if forward else 8192 // itemsize  # 16 elements to a thread: with 32, sm_80 spills
    block = min(bucket(classes), widest)
    enough = bucket(n * positions // 512)  # rows a program may have while every processor has some programs
    rows = max(1, min(2048 // block, 128, enough, bucket(positions)))
    warps = 8 if block * rows >= 4096 else 4
    others = [(1, block // 2, 4), (1, block, 16)] if block == widest else [(2 * rows, block, 4)]
    return [(rows, block, warps), *others]


def _units(shape, *strides: tuple[int, int, int]) -> tuple[int, list[int]]:
    """(ALIGN, sizes and strides as the kernels take them).

    Where classes lie side by side, their number and the distances between rows are in units of ALIGN, up to 8, so that
    1000 classes are read 16 bytes at a time: Triton itself sees only multiples of 16.
    """
    _, classes, positions = shape
    align = 1
    if all(s_c <= 1 for _, s_c, _ in strides):
        align = math.gcd(8, classes, *(distance for s_n, _, s_p in strides for distance in (s_n, s_p)))
    sizes = (classes // align, positions)
    return align, [*sizes, *(x for s_n, s_c, s_p in strides for x in (s_n // align, s_c, s_p // align))]


def cannot(input, *args) -> str | None:
    if input.shape[1] == 0:
        return "there are no classes"
    if input.shape[1] >= 2**31 - 2**16:
        return "the kernels count classes in 32 bits"
    return None


def cannot_backward(grad_loss, grad_lse, input, *args) -> str | None:
    return cannot(input)


@kernel("cross_entropy", cannot)
def forward(input, target, weight, return_lse, reduction, ignore_index, label_smoothing, z_loss, softcap):
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    loss, lse, stats, total = op.alloc(input, target, weight, return_lse, *options)
    soft = target.is_floating_point()
    target, weight = op.as_kernels_read(input, target, weight)
    shape = _shape(input, target) if soft else _shape(input)
    strides = _strides(input)
    n, classes, positions = shape
    align, sizes = _units(shape, strides, _strides(target) if soft else (0, 0, 0))
    sizes = (stats.shape[1], *sizes, ignore_index)
    constants = {"SMOOTHING": label_smoothing, "Z_LOSS": z_loss, "SOFTCAP": softcap, "SOFT": soft, "ALIGN": align}

    def run(tile):
        rows, block, warps = tile
        programs = n * triton.cdiv(positions, rows)
        partial = stats.new_empty(programs, 2, dtype=torch.float64)
        outputs = (loss if reduction == NONE.value else None, lse if return_lse else None, stats, partial)
        given = (input, target, weight, index_errors(input.device))
        _forward_kernel[(programs,)](*outputs, *given, *sizes, **constants, ROWS=rows, BLOCK=block, num_warps=warps)
        return partial

    key = ("cross_entropy", input.dtype, bucket(n * positions), classes, soft, strides[1] == 1)
    partial = run(choose(key, tiles(shape, strides, input.element_size(), True), run)).sum(0)
    total.copy_(partial[1])
    if reduction != NONE.value:
        loss.copy_(partial[0] / partial[1] if reduction == MEAN.value else partial[0])
    return loss, lse, stats, total


def _backward(grad_input, grad_loss, grad_lse, input, target, weight, stats, total, reduction, ignore_index,
              label_smoothing, z_loss, softcap):  # fmt: skip
    soft = target.is_floating_point()
    target, weight = op.as_kernels_read(input, target, weight)
    weight_sum = weight.sum() if weight is not None and label_smoothing > 0 and not soft else None
    shape = _shape(input, grad_input, target) if soft else _shape(input, grad_input)
    strides = _strides(input)
    n, classes, positions = shape
    read = (grad_loss.contiguous(), None if grad_lse is None else grad_lse.contiguous(), input, target, weight)
    align, sizes = _units(shape, _strides(grad_input), strides, _strides(target) if soft else (0, 0, 0))
    sizes = (stats.shape[1], *sizes, ignore_index)
    constants = {"REDUCTION": reduction, "SMOOTHING": label_smoothing, "Z_LOSS": z_loss, "SOFTCAP": softcap}
    constants |= {"SOFT": soft, "ALIGN": align}

    def run(tile):
        rows, block, warps = tile
        grid = (n * triton.cdiv(positions, rows) * triton.cdiv(classes, block),)
        tile = {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        _backward_kernel[grid](grad_input, *read, weight_sum, stats, total, *sizes, **constants, **tile)

    key = ("cross_entropy_backward", input.dtype, bucket(n * positions), classes, soft, strides[1] == 1)
    candidates = tiles(shape, strides, input.element_size(), False)
    run(choose(key, candidates, None if grad_input is input else run))


@kernel("cross_entropy_backward", cannot_backward)
def backward(grad_loss, grad_lse, input, *rest):
    grad_input = op.alloc_backward(grad_loss, grad_lse, input)
    _backward(grad_input, grad_loss, grad_lse, input, *rest)
    return grad_input


@kernel("cross_entropy_backward_", cannot_backward)
def backward_(grad_loss, grad_lse, input, *rest):
    _backward(input, grad_loss, grad_lse, input, *rest)
