"""linear_cross_entropy on the CPU: three ways.

csrc/cpu/kernels/linear_cross_entropy.cpp does all of it, for labels in float32 without softcap. Else the
BLAS multiplies, with cross_entropy's kernel on blocks of logits between: chunks of rows, as the op's page describes, or
blocks of classes for all rows. By classes every row's log-sum-exp is known only after the last block, so gradients need
the logits a second time: four products instead of three. Still blocks of classes are taken

- where no gradients are made: one product either way, and the BLAS packs the weight once, not for every chunk;
- for bfloat16 on a CPU with AMX, where a product costs less than what a chunk of rows costs besides: packing the weight
  and adding to all of d_weight in float32. By classes each part of d_weight is complete at once.

16-bit logits are float32 on CPUs that multiply float32 faster (see `widen`).
"""

import torch

from ... import _C
from ...dispatch import kernel
from ...memory import cached
from ...ops import cross_entropy as ce
from ...ops import linear_chunks as op
from .widen import product_dtype

_NONE, _SUM = (ce.REDUCTIONS.index(r) for r in ("none", "sum"))
_BLOCK = 8 << 20  # bytes of a block of logits: at 2 MiB forward of 1024 x 384 x 50257 is a fifth slower
_KERNEL_ROWS = 128  # of a chunk, at most: 192 are 2% faster, 96 4% slower
_KERNEL_DIMS = 1536  # at most: a BLAS packs 2048 or more to advantage and trains 5 to 15% faster, 1024 8% slower
_SKEW = 16  # floats behind each row of the kernel's buffer


def _fast_products(input) -> bool:
    return input.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _chunk(input, linear_weight):
    """A buffer for some rows of logits: 8 MiB or 256 rows, but 34 MiB at most; where products are fast, 32 MiB.

    For every chunk the BLAS packs all of linear_weight and adds to all of d_weight: at 128 rows that makes the whole a
    fifth slower than one chunk of 1024 rows, at 256 a tenth. But at 200 rows of 50257 classes MKL begins to allocate
    as much again as the logits take: 74 to 84 MiB in all, against 38 MiB at 171 rows, which are 3% slower than 256.
    """
    rows, classes = input.shape[0], linear_weight.shape[0]
    dtype = product_dtype(input)

    def rows_in(mebibytes):
        return (mebibytes << 20) // (classes * dtype.itemsize)

    most = max(rows_in(32), 256) if _fast_products(input) else max(rows_in(8), min(256, rows_in(34)), 128)
    return cached(op.chunk_buffer(input, rows, classes, most, dtype))


def _by_classes(chunk, input, target, label_smoothing, with_grads) -> bool:
    """Whether blocks of classes are faster, and can be: the spread part of a target needs sums over all classes."""
    if target.is_floating_point() or label_smoothing != 0 or len(input) > 1 << 14:
        return False
    if not with_grads:
        return chunk.nbytes > _BLOCK
    return _fast_products(input) and len(chunk) < len(input)


def kernel_rows(rows, dims, classes, dtype, most=_KERNEL_ROWS) -> int:
    """How many rows the kernel should take at a time; 0 where it cannot do this or is not the fastest."""
    threads = torch.get_num_threads()
    if dtype != torch.float32 or _C.isa() == "baseline":  # the BLAS may have vectors that baseline has not
        return 0
    chunk = -(-rows // max(-(-rows // most), 1) // 32) * 32
    few = rows < 48 or dims < 8 or classes < 512 * threads
    return 0 if few or dims > _KERNEL_DIMS or threads * chunk * dims > 16 << 20 else chunk


def _rows(input, linear_weight, target, weight, reduction, label_smoothing, softcap) -> int:
    smoothed = label_smoothing != 0 and (weight is not None or reduction == _NONE)
    if target.is_floating_point() or softcap or smoothed:  # not in the kernel
        return 0
    return kernel_rows(*input.shape, len(linear_weight), input.dtype)


def _counted_rows(input, target, weight, classes, ignore_index):
    """(which rows count, their weights); raises IndexError for a label that is no class."""
    counted = target != ignore_index
    if error := op.out_of_range(target, classes, ignore_index):
        raise error
    weights = counted.to(ce.arithmetic_dtype(input))
    if weight is not None:
        weights *= weight[target.where(counted, 0)]
    return counted, weights


class _Classes:
    """The logits of all rows, a block of classes at a time."""

    def __init__(self, input, linear_weight, linear_bias, target, weight, ignore_index, z_loss, softcap):
        input = input.to(product_dtype(input))
        self.layer, self.target = (input, linear_weight, linear_bias), target
        self.z_loss, self.softcap = z_loss, softcap
        self.counted, self.weights = _counted_rows(input, target, weight, len(linear_weight), ignore_index)
        step = max(256, _BLOCK // (input.element_size() * len(input)))
        self.buffer = cached(input.new_empty(len(input) * min(step, len(linear_weight))))
        self.ends = [(c, min(c + step, len(linear_weight))) for c in range(0, len(linear_weight), step)]

    def blocks(self):
        """(slice of classes, logits, rows whose label is in the block, their labels in it; ignored for the others)"""
        input, weight, bias = self.layer
        for begin, end in self.ends:
            classes = slice(begin, end)
            logits = self.buffer[: len(input) * (end - begin)].view(len(input), end - begin)
            op.product(input, weight[classes], None if bias is None else bias[classes], logits)
            inside = self.counted & (self.target >= begin) & (self.target < end)
            yield classes, logits, inside, (self.target - begin).where(inside, -1)

    def losses(self):
        """(loss per row, stats); None where a block's log-sum-exp is NaN: a NaN, or a block with nothing but -inf."""
        lse = self.weights.new_empty(len(self.ends), len(self.target))
        own, own_lse = torch.zeros_like(lse[0]), torch.zeros_like(lse[0])
        rest = torch.empty_like(lse)
        for i, (_, logits, inside, label) in enumerate(self.blocks()):
            loss, lse[i], *_ = ce._forward(logits, label, None, True, _NONE, -1, 0.0, 0.0, self.softcap)
            own, own_lse = loss.where(inside, own), lse[i].where(inside, own_lse)
            rest[i] = lse[i].masked_fill(inside, -torch.inf)
        if not lse.isfinite().all():
            return None
        # Both terms are positive: a confident row's loss keeps its digits.
        loss = own + torch.logaddexp(rest.logsumexp(0) - own_lse, own.new_zeros(()))
        lse = lse.logsumexp(0)
        stats = torch.stack([lse, torch.ones_like(lse), torch.expm1(loss).where(self.counted, 0)])
        return (loss * self.weights + self.z_loss * self.weights * lse * lse).where(self.counted, 0), stats

    def add_grads(self, upstream, stats, grads, needed):
        """The gradients for losses whose upstream gradients are `upstream`, one per row."""
        input, weight, _ = self.layer
        d_input, d_weight, d_bias = grads
        sums = torch.zeros(d_input.shape, dtype=stats.dtype) if needed[0] else None
        g = upstream * self.weights
        of_lse, one = g * (2 * self.z_loss) * stats[0], g.new_ones(())
        for classes, logits, inside, label in self.blocks():
            # Rows with their label elsewhere: this block has their log-sum-exp's gradient only.
            given = (g.where(inside, 0), of_lse + g.masked_fill(inside, 0), logits, label, None, stats, one)
            ce._backward_(*given, _NONE, -1, 0.0, 0.0, self.softcap)
            if needed[0]:
                sums += torch.mm(logits, weight[classes].to(logits.dtype))
            if needed[1]:
                op.add_product(d_weight[classes], logits.t(), input, True)
            if needed[2]:
                d_bias[classes] = logits.sum(0, dtype=stats.dtype)
        if needed[0]:
            d_input.copy_(sums)


def run_kernel(rows, grads, input, linear_weight, linear_bias, labels, upstream, label_smoothing, z_loss, ids):
    """(loss per row, stats), and the gradients; None where a result is not finite, for which the kernel is not made.

    labels: int64, none where outside [0, V). ids: those of the rows and those of the classes, int32; where they are the
    same a logit counts as -inf, but at the label.
    """
    losses, stats = torch.empty_like(upstream), upstream.new_empty(3, len(input))
    grads = [d if d.numel() else None for d in grads]
    with_grads = any(d is not None for d in grads)
    buffer = cached(input.new_empty(len(linear_weight), rows + _SKEW)) if with_grads else None
    given = (input.contiguous(), linear_weight.contiguous(), None if linear_bias is None else linear_bias.contiguous())
    given += (labels, *(ids or (None, None)), upstream.contiguous())
    options = (label_smoothing, z_loss, rows, torch.get_num_threads())
    _C.linear_cross_entropy(losses, stats, *grads, buffer, *given, *options)
    return (losses, stats) if losses.isfinite().all() and stats[0].isfinite().all() else None


def _spread(grads, input, linear_weight, linear_bias, upstream, label_smoothing):
    """Each row's mean logit. Takes from the gradients what the share of a label that all classes have puts there."""
    classes, weights = len(linear_weight), linear_weight.sum(0)
    d_input, d_weight, d_bias = grads
    share = upstream * (label_smoothing / classes)
    if d_input.numel():
        d_input.addr_(share, weights, alpha=-1)
    if d_weight.numel():
        d_weight -= share @ input
    if d_bias.numel():
        d_bias -= share.sum()
    mean = input @ (weights / classes)
    return mean if linear_bias is None else mean + linear_bias.mean()


@torch.no_grad()
def forward_in_kernel(rows, input, linear_weight, linear_bias, target, weight, needed, reduction, *options, ids=None):
    """The registered op, `rows` at a time, or None. ids: as `run_kernel`'s."""
    ignore_index, label_smoothing, z_loss, _ = options
    counted, weights = _counted_rows(input, target, weight, len(linear_weight), ignore_index)
    loss, total, _, *grads = op.alloc(input, linear_weight, linear_bias, target, weight, needed, reduction)
    total.copy_(weights.sum(dtype=torch.float64))
    mean = reduction not in (_NONE, _SUM)
    upstream = weights * torch.where(total == 0, 0, 1 / total) if mean else weights
    grads = [cached(d) for d in grads]
    layer = (input, linear_weight, linear_bias)
    labels = target.to(torch.int64).where(counted, -1)
    found = run_kernel(rows, grads, *layer, labels, upstream, label_smoothing, z_loss, ids)
    if found is None:
        return None
    losses, stats = found
    if label_smoothing:
        losses.lerp_(stats[0] - _spread(grads, *layer, upstream, label_smoothing), label_smoothing)
    losses = (losses + z_loss * stats[0] * stats[0]) * weights
    loss.copy_(losses if reduction == _NONE else losses.sum(dtype=torch.float64) / (total if mean else 1))
    return loss, total, stats, *grads


@torch.no_grad()
def backward_in_kernel(
    rows, grad_loss, input, linear_weight, linear_bias, target, weight, needed, *options, ids=None
):  # fmt: skip
    """The same for the op's backward, where the reduction is "none"."""
    ignore_index, _, z_loss, _ = options
    counted, weights = _counted_rows(input, target, weight, len(linear_weight), ignore_index)
    grads = [cached(d) for d in op.alloc_grads(input, linear_weight, needed)]
    layer = (input, linear_weight, linear_bias)
    labels = target.to(torch.int64).where(counted, -1)
    found = run_kernel(rows, grads, *layer, labels, grad_loss * weights, 0.0, z_loss, ids)
    return None if found is None else tuple(grads)


@torch.no_grad()
def _forward_by_classes(input, linear_weight, linear_bias, target, weight, needed, reduction, *options):
    ignore_index, _, z_loss, softcap = options
    rows = _Classes(input, linear_weight, linear_bias, target, weight, ignore_index, z_loss, softcap)
    found = rows.losses()
    if found is None:
        return None
    losses, stats = found
    loss, total, _, *grads = op.alloc(input, linear_weight, None, target, weight, needed, reduction)
    total.copy_(rows.weights.sum(dtype=torch.float64))
    mean = reduction not in (_NONE, _SUM)
    loss.copy_(losses if reduction == _NONE else losses.sum(dtype=torch.float64) / (total if mean else 1))
    grads = [cached(d) for d in grads]
    needed = [bool(d.numel()) for d in grads]
    if any(needed):
        factor = torch.where(total == 0, 0, 1 / total) if mean else total.new_ones(())
        rows.add_grads(factor.expand(len(input)), stats, grads, needed)
    return loss, total, stats, *grads


@torch.no_grad()
def _backward_by_classes(grad_loss, input, linear_weight, linear_bias, target, weight, stats, needed, *options):
    ignore_index, _, z_loss, softcap = options
    rows = _Classes(input, linear_weight, linear_bias, target, weight, ignore_index, z_loss, softcap)
    grads = [cached(d) for d in op.alloc_grads(input, linear_weight, needed)]
    rows.add_grads(grad_loss, stats, grads, needed)
    return tuple(grads)


@kernel("linear_cross_entropy", "cpu")
def forward(input, linear_weight, linear_bias, target, weight, needed, reduction, *options):
    given = (input, linear_weight, linear_bias, target, weight, needed, reduction, *options)
    _, label_smoothing, _, softcap = options
    with_grads = reduction != _NONE and any(needed)
    rows = _rows(input, linear_weight, target, weight, reduction, label_smoothing, softcap)
    if rows and (done := forward_in_kernel(rows, *given)):
        return done
    chunk = _chunk(input, linear_weight)
    done = _forward_by_classes(*given) if _by_classes(chunk, input, target, label_smoothing, with_grads) else None
    return done or op.run_forward(chunk, *given, recycle=cached)


@kernel("linear_cross_entropy_backward", "cpu")
def backward(grad_loss, input, linear_weight, linear_bias, target, weight, total, stats, needed, *options):
    given = (grad_loss, input, linear_weight, linear_bias, target, weight)
    _, label_smoothing, _, softcap = options
    rows = _rows(input, linear_weight, target, weight, _NONE, label_smoothing, softcap)
    if rows and (done := backward_in_kernel(rows, *given, needed, *options)):
        return done
    chunk = _chunk(input, linear_weight)
    if _by_classes(chunk, input, target, label_smoothing, True) and stats.isfinite().all():
        return _backward_by_classes(*given, stats, needed, *options)
    return op.run_backward(chunk, *given, total, stats, needed, *options, recycle=cached)
