"""cross_entropy in Triton. Formulas and what is saved: pyfused/ops/cross_entropy.py.

Tiles   logits are read as z[n, c, p] with any strides (2-d: one n, p the rows). A program takes ROWS positions of an n:
        forward goes through the classes in blocks of BLOCK with a running maximum; backward has a program per block.
        Few classes: many rows to a program; positions innermost: a tile as wide as memory lies.
Bytes   of the logits: forward reads them once, backward reads and writes once: 3 R C elements, the floor while backward
        is a pass of its own. H200 (4.3 TB/s), 8192 x 128256 bfloat16: 0.49 + 0.98 ms. Per element 9 and 13 instructions
        (float32: 17 and 23) where the memory leaves time for 14 and 28 (28 and 55).
Saves   per row [maximum m, S = ∑ exp(z - m), x]. The sums leave the label out, so a confident row keeps its digits.
Sums    a row's in the order of its blocks, the rows' by program in float64: the same bits for the same shape.
Edges   A block of -inf: the running maximum stands in as 0, so no -inf - -inf. Lanes past the last class are -inf after
        the softcap, not before it. A label outside [0, C) is read nowhere: loss NaN, gradient 0, error flag.
Vectors With an odd number of classes rows begin anywhere: then blocks begin at a multiple of UNIT elements, the first
        before its row, and those within the row are read and written unmasked, 16 bytes at a time. (A mask that may end
        within 16 bytes makes Triton move numbers one by one.)
Floats  smoothing, z-loss and softcap are arguments, of float64 (Triton's own choice is float32): a value that changes
        from step to step compiles nothing again. Only whether they are 0 is compiled.
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
def _load(at, inside, whole, other: tl.constexpr, UNIT: tl.constexpr):
    """whole: `inside` is true throughout; said only where blocks begin at a UNIT."""
    if UNIT > 1:
        return tl.load(at) if whole else tl.load(at, mask=inside, other=other)
    else:
        return tl.load(at, mask=inside, other=other)


@triton.jit
def _capped(z, inside, softcap, CAP: tl.constexpr, DTYPE: tl.constexpr):
    z = z.to(DTYPE)
    if CAP:
        z = tl.where(inside, softcap * tanh(z / softcap), -float("inf"))
    return z


@triton.jit
def _numbers(smoothing, z_loss, softcap, classes, DTYPE: tl.constexpr):
    """(what the label keeps, what each class gets, z-loss, softcap), rounded last."""
    zero = tl.zeros((), tl.float64)  # in the interpreter the arguments are Python's
    smoothing = zero + smoothing
    each = smoothing.to(DTYPE) / (tl.zeros((), DTYPE) + classes)
    return (1.0 - smoothing).to(DTYPE), each, (zero + z_loss).to(DTYPE), (zero + softcap).to(DTYPE)


@triton.jit
def _spread(weight, c, y_at, inside, whole, classes, kept, each, SMOOTH: tl.constexpr, SOFT: tl.constexpr,
            UNIT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """What of the target falls on each logit besides the label: w_c ((1-ε) y_c + ε/C), or w_c for labels."""
    u = tl.full(inside.shape, 1.0, DTYPE)
    if SOFT:
        u = _load(y_at, inside, whole, 0.0, UNIT).to(DTYPE)
        if SMOOTH:
            u = u * kept + each
    if weight is not None:
        u *= tl.load(weight + c, mask=(c >= 0) & (c < classes), other=0.0)[None, :]
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
def _begin(tensor, n, p, s_n, s_p, ALIGN: tl.constexpr, UNIT: tl.constexpr):
    """(the last multiple of UNIT elements at or before the beginning of each row, how far before the first row's)."""
    if UNIT == 1:
        return tensor + (n * s_n + p * s_p) * ALIGN, 0
    else:  # one row
        first = (n * s_n + tl.min(p, 0) * s_p) * ALIGN
        return tensor + (first // UNIT * UNIT + p * 0), (first % UNIT).to(tl.int32)


@triton.jit
def _columns(start, head, ok, classes, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """(classes of the block that begins `start` elements after _begin, their distances from there, which exist, whether
    all do)."""
    j = start + tl.arange(0, BLOCK)
    c = j - head
    if UNIT == 1:
        return c, j[None, :].to(tl.int64), ok[:, None] & (c < classes)[None, :], False
    else:
        inside = ok[:, None] & ((c >= 0) & (c < classes))[None, :]
        return c, j[None, :].to(tl.int64), inside, (start >= head) & (start + BLOCK <= classes + head)


@triton.jit
def _holds(first, label, BLOCK: tl.constexpr):
    """Whether the only row's label is in the block of classes from `first` on."""
    label = tl.sum(label, 0)
    return (label >= first) & (label < first + BLOCK)


@triton.jit
def _forward_kernel(
    loss, lse, stats, partial, input, target, weight, errors, rows, classes, positions, s_n, s_c, s_p, t_n, t_c, t_p,
    ignore_index, smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, SMOOTH: tl.constexpr,
    PENALTY: tl.constexpr, CAP: tl.constexpr, SOFT: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats.dtype.element_ty
    classes *= ALIGN
    PRECISE: tl.constexpr = input.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tiles = (positions - 1) // ROWS + 1  # cdiv overflows just below 2^31
    n = (pid // tiles).to(tl.int64)
    p = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = p < positions
    r = n * positions + p
    label_part, each, z_loss, softcap = _numbers(smoothing, z_loss, softcap, classes, DTYPE)
    z_at, head = _begin(input, n, p, s_n, s_p, ALIGN, UNIT)
    y_at, _ = _begin(target, n, p, t_n, t_p, ALIGN, UNIT)
    label, kept, bad = _label(target, r, ok, classes, ignore_index, SOFT)

    # Of each VECTOR of a row's blocks by itself until the row ends: a thread has its own, and waits for no other.
    PARTS: tl.constexpr = BLOCK // VECTOR
    top = tl.full((ROWS, PARTS), -float("inf"), DTYPE)
    others = tl.zeros((ROWS, PARTS), DTYPE)  # ∑ exp(z - top) without the label
    spread, mass = tl.zeros((ROWS, PARTS), DTYPE), tl.zeros((ROWS, PARTS), DTYPE)  # ∑ u (top - z), ∑ u
    for start in range(0, classes + head, BLOCK):
        c, columns, inside, whole = _columns(start, head, ok, classes, UNIT, BLOCK)
        z = _load(z_at[:, None] + columns * s_c, inside, whole, -float("inf"), UNIT)
        z = tl.reshape(_capped(z, inside, softcap, CAP, DTYPE), (ROWS, PARTS, VECTOR))
        new_top = tl.maximum(top, tl.max(z, 2))
        ref = tl.where(new_top == -float("inf"), 0.0, new_top)
        e = exp(z - ref[:, :, None], PRECISE)
        if ROWS > 1 or _holds(start - head, label, BLOCK):
            e = tl.where(tl.reshape(c[None, :] == label[:, None], (ROWS, PARTS, VECTOR)), 0.0, e)
        others = others * exp(top - ref, PRECISE) + tl.sum(e, 2)
        if SOFT or SMOOTH:
            y = y_at[:, None] + columns * t_c
            u = _spread(weight, c, y, inside, whole, classes, label_part, each, SMOOTH, SOFT, UNIT, DTYPE)
            inside, u = tl.reshape(inside, (ROWS, PARTS, VECTOR)), tl.reshape(u, (ROWS, PARTS, VECTOR))
            # Where all before was -inf, `spread` holds what it has to already: infinities, or the 0 of the start.
            spread += mass * tl.where(top == -float("inf"), 0.0, ref - top)
            spread += tl.sum(tl.where(inside, u * (ref[:, :, None] - z), 0.0), 2)
            mass += tl.sum(u, 2)
        top = new_top
    parts, top = top, tl.max(top, 1)
    ref = tl.where(top == -float("inf"), 0.0, top)[:, None]
    others = tl.sum(others * exp(parts - ref, PRECISE), 1)
    spread = tl.sum(spread + mass * tl.where(parts == -float("inf"), 0.0, ref - parts), 1)
    mass = tl.sum(mass, 1)

    w = _row_weight(weight, label, kept, SOFT, DTYPE)
    found = label >= 0
    z_label = tl.load(z_at + head + label.to(tl.int64) * s_c, mask=found, other=-float("inf"))
    z_label = _capped(z_label, found, softcap, CAP, DTYPE)
    at_label = tl.where(found, exp(z_label - top, PRECISE), 0.0)
    # S - 1, which is exactly the sum of the others where the label has the maximum (at_label = 1)
    log_sum = log1p(others + (at_label - 1.0))
    all_ = others + at_label
    row_lse = top + log_sum
    if SOFT:
        row_loss = mass * log_sum + spread
        odds = mass
    else:
        row_loss = w * ((top - z_label) + log_sum)
        odds = others / at_label
        if SMOOTH:
            row_loss = row_loss * label_part + (mass * log_sum + spread) * each
    if PENALTY:
        row_loss += z_loss * w * row_lse * row_lse
    row_loss = tl.where(bad, float("nan"), tl.where(kept, row_loss, 0.0))

    tl.store(stats + r, top, mask=ok)
    tl.store(stats + rows + r, all_, mask=ok)
    tl.store(stats + rows + rows + r, odds, mask=ok)  # 2 * rows may be more than 32 bits hold
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
    g_n, g_c, g_p, s_n, s_c, s_p, t_n, t_c, t_p, ignore_index, smoothing: tl.float64, z_loss: tl.float64,
    softcap: tl.float64, REDUCTION: tl.constexpr, SMOOTH: tl.constexpr, PENALTY: tl.constexpr, CAP: tl.constexpr,
    SOFT: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats.dtype.element_ty
    classes *= ALIGN
    PRECISE: tl.constexpr = input.dtype.element_ty == tl.float32
    pid, blocks = tl.program_id(0), tl.cdiv(classes + (UNIT - 1), BLOCK)
    tiles = (positions - 1) // ROWS + 1  # cdiv overflows just below 2^31
    n = (pid // blocks // tiles).to(tl.int64)
    p = (pid // blocks % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = p < positions
    r = n * positions + p
    z_at, head = _begin(input, n, p, s_n, s_p, ALIGN, UNIT)
    y_at, _ = _begin(target, n, p, t_n, t_p, ALIGN, UNIT)
    g_at, _ = _begin(grad_input, n, p, g_n, g_p, ALIGN, UNIT)
    start = pid % blocks * BLOCK
    c, columns, inside, whole = _columns(start, head, ok, classes, UNIT, BLOCK)
    label_part, each, z_loss, softcap = _numbers(smoothing, z_loss, softcap, classes, DTYPE)
    label, kept, bad = _label(target, r, ok, classes, ignore_index, SOFT)
    w = _row_weight(weight, label, kept, SOFT, DTYPE)
    # Of each row: gradient = exp(z - top) factor - scale u, at the label at_label; 0 if not live.
    live = kept if grad_lse is None else ok & (bad == 0)
    top = tl.where(live, tl.load(stats + r, mask=ok, other=0.0), 0.0)
    all_ = tl.where(live, tl.load(stats + rows + r, mask=ok, other=1.0), 1.0)
    odds = tl.where(live, tl.load(stats + rows + rows + r, mask=ok, other=1.0), 1.0)
    scale = tl.load(grad_loss + r, mask=kept, other=0.0) if REDUCTION == NONE else tl.load(grad_loss)
    if REDUCTION == MEAN:
        scale = scale / tl.load(total)
    scale = tl.where(kept, scale, 0.0)
    lse_slope = tl.zeros((ROWS,), DTYPE)
    if PENALTY:
        lse_slope += 2 * z_loss * w * (top + tl.log(all_)) * scale
    if grad_lse is not None:
        lse_slope += tl.load(grad_lse + r, mask=live, other=0.0)
    if SOFT:
        factor = scale * odds
    else:
        factor = scale * w
        if SMOOTH:
            factor *= label_part
        p_label = 1.0 / (1.0 + odds)
        at_label = lse_slope * p_label - factor / (1.0 + 1.0 / odds)
        if SMOOTH:
            sum_w = tl.load(weight_sum) if weight is not None else tl.zeros((), DTYPE) + classes
            scale *= each
            factor += scale * sum_w
            at_label += scale * (sum_w * p_label - w)
    factor = (factor + lse_slope) / all_

    at = z_at[:, None] + columns * s_c
    if ROWS == 1:  # nothing is read of a row that is not live
        z = _load(at, inside & live[:, None], whole & (tl.max(live.to(tl.int32), 0) > 0), -float("inf"), UNIT)
    else:
        z = tl.load(at, mask=inside, other=-float("inf"))
    z = _capped(z, inside, softcap, CAP, DTYPE)
    d = exp(z - top[:, None], PRECISE) * factor[:, None]
    if SOFT or SMOOTH:
        y = y_at[:, None] + columns * t_c
        u = _spread(weight, c, y, inside, whole, classes, label_part, each, SMOOTH, SOFT, UNIT, DTYPE)
        d -= scale[:, None] * u
    if not SOFT:  # noqa: SIM102  (decided when the kernel is compiled)
        if ROWS > 1 or _holds(start - head, label, BLOCK):
            d = tl.where(c[None, :] == label[:, None], at_label[:, None], d)
    if CAP:
        d *= 1.0 - (z / softcap) * (z / softcap)
    # What was read may be NaN, or a weight; at -inf, the capped derivative is one of infinity by 0.
    if ROWS > 1 or CAP or SMOOTH:
        d = tl.where(live[:, None], d, 0.0)
    at, d = g_at[:, None] + columns * g_c, d.to(grad_input.dtype.element_ty)
    if UNIT > 1:
        if whole:
            tl.store(at, d)
        else:
            tl.store(at, d, mask=inside)
    else:
        tl.store(at, d, mask=inside)


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
    widest = 4096 if forward else 16384 // itemsize
    block = min(bucket(classes), widest)
    enough = bucket(n * positions // 512)  # rows a program may have while every processor has some programs
    rows = max(1, min(2048 // block, 128, enough, bucket(positions)))
    warps = 8 if block * rows >= 4096 else 4
    others = [(1, block // 2, 4), (1, block, 16)] if block == widest else [(2 * rows, block, 4)]
    return [(rows, block, warps), *others]


def _units(shape, *strides: tuple[int, int, int]) -> tuple[int, int, list[int]]:
    """(ALIGN, UNIT for programs of one row, sizes and strides as the kernels take them).

    Where classes lie side by side, their number and the distances between rows are in units of ALIGN, up to 8, so that
    1000 classes are read 16 bytes at a time: Triton itself sees only multiples of 16. Where that does not make 8, UNIT
    does, if all tensors' rows begin equally far from a multiple of it.
    """
    _, classes, positions = shape
    align = 1
    if all(s_c <= 1 for _, s_c, _ in strides):
        align = math.gcd(8, classes, *(distance for s_n, _, s_p in strides for distance in (s_n, s_p)))
    sizes = (classes // align, positions)
    rows = [s for s in strides if any(s)]  # not of labels
    alike = all(s[1] == 1 for s in rows) and len({(s_n % 8, s_p % 8) for s_n, _, s_p in rows}) == 1
    return (
        align,
        8 if alike and align < 8 else 1,
        [*sizes, *(x for s_n, s_c, s_p in strides for x in (s_n // align, s_c, s_p // align))],
    )


def _tile(tile, unit):
    rows, block, warps = tile
    if rows > 1 or unit == 1:
        return {"UNIT": 1, "ROWS": rows, "BLOCK": block, "num_warps": warps}
    # 8 elements to a thread: the masked read takes an address for each.
    block = min(block, 4096)
    warps = max(warps, block // (512 if torch.version.hip else 256))
    return {"UNIT": unit, "ROWS": 1, "BLOCK": block, "num_warps": warps}


def _flags(label_smoothing, z_loss, softcap):
    return {"SMOOTH": label_smoothing > 0, "PENALTY": z_loss != 0, "CAP": softcap > 0}


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
    align, unit, sizes = _units(shape, strides, _strides(target) if soft else (0, 0, 0))
    sizes = (stats.shape[1], *sizes, ignore_index, label_smoothing, z_loss, softcap)
    constants = _flags(label_smoothing, z_loss, softcap) | {"SOFT": soft, "ALIGN": align}

    def run(tile):
        programs = n * triton.cdiv(positions, tile[0])
        partial = stats.new_empty(programs, 2, dtype=torch.float64)
        outputs = (loss if reduction == NONE.value else None, lse if return_lse else None, stats, partial)
        given = (input, target, weight, index_errors(input.device))
        tile = _tile(tile, unit)
        vector = min(tile["BLOCK"], 16 // input.element_size()) if strides[1] == 1 else tile["BLOCK"]
        _forward_kernel[(programs,)](*outputs, *given, *sizes, VECTOR=vector, **constants, **tile)
        return partial

    key = ("cross_entropy", input.device, input.dtype, bucket(n * positions), classes, soft, strides[1] == 1)
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
    align, unit, sizes = _units(shape, _strides(grad_input), strides, _strides(target) if soft else (0, 0, 0))
    sizes = (stats.shape[1], *sizes, ignore_index, label_smoothing, z_loss, softcap)
    constants = _flags(label_smoothing, z_loss, softcap) | {"REDUCTION": reduction, "SOFT": soft, "ALIGN": align}

    def run(tile):
        tile = _tile(tile, unit)
        blocks = triton.cdiv(classes + tile["UNIT"] - 1, tile["BLOCK"])
        grid = (n * triton.cdiv(positions, tile["ROWS"]) * blocks,)
        _backward_kernel[grid](grad_input, *read, weight_sum, stats, total, *sizes, **constants, **tile)

    key = ("cross_entropy_backward", input.device, input.dtype, bucket(n * positions), classes, soft, strides[1] == 1)
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
