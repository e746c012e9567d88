"""embedding_dot in Triton. Formulas: pyfused/ops/embedding_dot.py.

Forward   a program computes SCORES scores; columns in blocks of BLOCK. Bytes: two rows and two ids in, a score out, the
          floor if no id occurs twice. 65,536 x 64 float32: 35 MB, 10 us on an H100; 2 flops for 8 bytes.
Backward  of one table. Occurrences are sorted by id (torch.sort, stable), so each row of the gradient is the sum of one
          run of the sorted order. A program stands at every occurrence and works only where a piece begins: at the
          begin of a run or of a chunk of CHUNK occurrences, so that a hot id occupies many programs. Whole runs go
          straight to the output; a piece of a longer run goes to `partial`, and _join adds up the pieces of a run.
          No atomics, each sum in a fixed order and in float32 (float64): the same bits every time.
Bytes     of backward, n occurrences: n (D + 1) elements gathered, the rows that occur written once (dense: the whole
          table, zeroed first), ids 12 n and what sorting them takes. 65,536 x 64 float32: 17 MB gathered, 5 us on an
          H100, the floor; the sort and the launches take longer. _key: 12 n bytes, an id in and a key out. _join: of
          each piece of a run longer than a chunk its D + 1 sums, at most 2 n / CHUNK of them, a 64th of the gathered
          bytes.
Edges     Ids that are no row, and padding, get the key `rows`: sorted last, no gradient. A score of a bad id is NaN.
Update    embedding_dot_update.py takes an optimizer's step on a row where its gradient would be written.
Sparse    How many rows occur is known on the device only, and PyTorch wants it as a shape: one wait, after all work
          is queued (torch's own coalesce() waits as well). The dense form never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import embedding_dot as op
from .common import ARGUMENTS, bucket, choose, index_errors, kernel, report_index_error
from .embedding_dot_step import write

USER = tl.constexpr(ARGUMENTS.index("user"))
ITEM = tl.constexpr(ARGUMENTS.index("item"))


@triton.jit
def _forward_kernel(
    out, user, item, user_weight, item_weight, user_bias, item_bias, errors, scores, per_user, users, items, columns,
    u_row, u_column, i_row, i_column, DTYPE: tl.constexpr, SCORES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * SCORES + tl.arange(0, SCORES)
    ok = n < scores
    u = tl.load(user + n // per_user, mask=ok, other=0).to(tl.int64)
    i = tl.load(item + n, mask=ok, other=0).to(tl.int64)
    bad_u, bad_i = (u < 0) | (u >= users), (i < 0) | (i >= items)
    report_index_error(errors, USER, n // per_user, u, users, ok & bad_u)
    report_index_error(errors, ITEM, n, i, items, ok & bad_i)
    good = ok & ~bad_u & ~bad_i  # masks every access; a select on the ids besides is lost by Triton 3.7's layouts
    dot = tl.zeros((SCORES,), DTYPE)
    for start in range(0, columns, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = good[:, None] & (d < columns)[None, :]
        d = d[None, :].to(tl.int64)
        x = tl.load(user_weight + u[:, None] * u_row + d * u_column, mask=inside, other=0.0).to(DTYPE)
        y = tl.load(item_weight + i[:, None] * i_row + d * i_column, mask=inside, other=0.0).to(DTYPE)
        dot += tl.sum(x * y, 1)
    if user_bias is not None:
        dot += tl.load(user_bias + u, mask=good, other=0.0).to(DTYPE)
    if item_bias is not None:
        dot += tl.load(item_bias + i, mask=good, other=0.0).to(DTYPE)
    tl.store(out + n, tl.where(good, dot, float("nan")).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _key_kernel(key, ids, n, rows, padding, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + i, mask=i < n, other=0)
    taken = (id >= 0) & (id < rows) & (id != padding)
    tl.store(key + i, tl.where(taken, id, rows).to(key.dtype.element_ty), mask=i < n)


@triton.jit
def _gather(grad, other_ids, other_weight, occurrence, valid, per_other, others, w_row, w_column, d, columns,
            IN_ORDER: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(upstream gradients of these occurrences, rows they multiply): a bad other id counts as a row of 0.

    IN_ORDER: other_weight holds the rows of other_ids one after the other, not a table.
    """
    other = tl.load(other_ids + occurrence // per_other, mask=valid, other=0).to(tl.int64)
    valid &= (other >= 0) & (other < others)
    g = tl.load(grad + occurrence, mask=valid, other=0.0).to(DTYPE)
    row = occurrence // per_other if IN_ORDER else tl.where(valid, other, 0)
    at = other_weight + row[:, None] * w_row + d[None, :] * w_column
    return g, tl.load(at, mask=valid[:, None] & (d < columns)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _sum_kernel(
    table, bias_table, partial, bias_partial, occurring, key, order, rank, grad, other_ids, other_weight, n, rows,
    per_id, per_other, others, columns, w_row, w_column, lr: tl.float64, alpha: tl.float64, beta: tl.float64,
    eps: tl.float64, bias_lr: tl.float64, bias_alpha: tl.float64, bias_beta: tl.float64, bias_eps: tl.float64,
    IN_ORDER: tl.constexpr, RULE: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64)
    mine = tl.load(key + begin)
    continued = (begin > 0) & (tl.load(key + tl.maximum(begin - 1, 0)) == mine)
    if (mine < rows) & ((begin % CHUNK == 0) | (continued == 0)):
        end = tl.minimum((begin // CHUNK + 1) * CHUNK, n)
        d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row, bias = tl.zeros((BLOCK,), DTYPE), tl.zeros((), DTYPE)
        term = begin * per_id
        more = term < end * per_id
        while more:
            t = term + tl.arange(0, TERMS)
            at = t // per_id
            valid = at < end
            valid &= tl.load(key + at, mask=valid, other=0) == mine
            occurrence = tl.load(order + at, mask=valid, other=0) * per_id + t % per_id
            g, other = _gather(grad, other_ids, other_weight, occurrence, valid, per_other, others, w_row, w_column, d,
                               columns, IN_ORDER, DTYPE)  # fmt: skip
            row += tl.sum(g[:, None] * other, 0)
            bias += tl.sum(g, 0)
            term += TERMS
            more = (term < end * per_id) & (tl.sum(valid.to(tl.int32), 0) == TERMS)
        # The run goes on in the next chunk if that begins with the same id.
        goes_on = (end < n) & (tl.load(key + tl.minimum(end, n - 1)) == mine)
        first = tl.program_id(1) == 0
        if continued | goes_on:
            slot = begin // CHUNK * 2 + (continued == 0).to(tl.int64)
            tl.store(partial + slot * columns + d, row, mask=d < columns)
            tl.store(bias_partial + slot, bias, mask=first)
        else:
            at = tl.load(rank + begin) if rank is not None else mine.to(tl.int64)
            if table is not None:
                write(table, at, d, d < columns, row, columns, lr, alpha, beta, eps, RULE)
            if bias_table is not None:
                one = tl.zeros((1,), tl.int64)
                write(bias_table, at, one, (one == 0) & first, one.to(DTYPE) + bias, 1, bias_lr, bias_alpha, bias_beta,
                       bias_eps, RULE)  # fmt: skip
        if occurring is not None:  # noqa: SIM102  (decided when the kernel is compiled)
            if continued == 0:
                tl.store(occurring + tl.load(rank + begin), mine.to(tl.int64), mask=first)


@triton.jit
def _join_kernel(
    table, bias_table, partial, bias_partial, key, rank, n, rows, columns, lr: tl.float64, alpha: tl.float64,
    beta: tl.float64, eps: tl.float64, bias_lr: tl.float64, bias_alpha: tl.float64, bias_beta: tl.float64,
    bias_eps: tl.float64, RULE: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a run begins in chunk c and goes on in c + 1, ...: its sum from the pieces, [c, 1], [c + 1, 0], ..."""
    chunk = tl.program_id(0).to(tl.int64)
    border = (chunk + 1) * CHUNK
    if border < n:
        mine = tl.load(key + border)
        starts_before = tl.load(key + border - CHUNK) == mine
        starts_before &= (chunk > 0) & (tl.load(key + tl.maximum(border - CHUNK - 1, 0)) == mine)
        if (mine < rows) & (tl.load(key + border - 1) == mine) & (starts_before == 0):
            d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            row = tl.load(partial + (2 * chunk + 1) * columns + d, mask=d < columns, other=0.0)
            bias = tl.load(bias_partial + 2 * chunk + 1)
            at = chunk + 1
            more = at == chunk + 1
            while more:
                c = at + tl.arange(0, TERMS)
                valid = c * CHUNK < n
                valid &= tl.load(key + c * CHUNK, mask=valid, other=0) == mine
                inside = valid[:, None] & (d < columns)[None, :]
                row += tl.sum(tl.load(partial + 2 * c[:, None] * columns + d[None, :], mask=inside, other=0.0), 0)
                bias += tl.sum(tl.load(bias_partial + 2 * c, mask=valid, other=0.0), 0)
                at += TERMS
                more = tl.sum(valid.to(tl.int32), 0) == TERMS
            to = tl.load(rank + border) if rank is not None else mine.to(tl.int64)
            if table is not None:
                write(table, to, d, d < columns, row, columns, lr, alpha, beta, eps, RULE)
            if bias_table is not None:
                one = tl.zeros((1,), tl.int64)
                inside = (one == 0) & (tl.program_id(1) == 0)
                write(bias_table, to, one, inside, one.to(DTYPE) + bias, 1, bias_lr, bias_alpha, bias_beta, bias_eps,
                       RULE)  # fmt: skip


# --- Launch
def _dtype(weight):
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


def cannot(*args) -> str | None:
    return None


@kernel("embedding_dot", cannot)
def forward(user, item, user_weight, item_weight, user_bias, item_bias):
    out = op.alloc(user, item, user_weight, item_weight, user_bias, item_bias)
    if not out.numel():
        return out
    given = (user.contiguous(), item.contiguous(), user_weight, item_weight, op.flat(user_bias), op.flat(item_bias))
    columns = user_weight.shape[1]
    sizes = (out.numel(), out.numel() // user.numel(), len(user_weight), len(item_weight), columns)
    strides = (*user_weight.stride(), *item_weight.stride())

    def run(tile):
        scores, block, warps = tile
        grid = (triton.cdiv(out.numel(), scores),)
        tile = {"SCORES": scores, "BLOCK": block, "num_warps": warps}
        errors = index_errors(out.device)
        _forward_kernel[grid](out, *given, errors, *sizes, *strides, DTYPE=_dtype(user_weight), **tile)

    block = min(bucket(columns), 256)
    # Where columns are no multiple of 16, Triton reads a number at a time, with an address for each: half as many.
    scores = max(1, min((2048 if columns % 16 == 0 else 1024) // block, 64))
    candidates = [(scores, block, 4), (2 * scores, block, 4), (max(scores // 4, 1), block, 1)]
    run(choose(("embedding_dot", out.device, user_weight.dtype, columns, bucket(out.numel())), candidates, run))
    return out


@kernel("embedding_dot_backward", cannot)
def backward(grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse):
    given = (grad, ids, other_ids, other_weight, rows, padding, weight, bias, sparse)
    n = ids.numel()
    weight_grad, bias_grad, occurring = op.alloc_backward(*given, occurring=min(n, rows))
    if not sparse:
        weight_grad.zero_()
        bias_grad.zero_()
    if not grad.numel() or not rows:
        # K = 0: the ids occur, with gradients of 0; that is the reference's to say.
        return op.reference_backward(*given) if sparse else (weight_grad, bias_grad, occurring)
    key, order = sorted_ids(ids, rows, padding)
    rank = None
    if sparse:
        rank = torch.zeros(n, dtype=torch.int64, device=ids.device)
        torch.cumsum(key[1:] != key[:-1], 0, out=rank[1:])
    outputs = tuple((x, x.stride(0)) if wanted else None for x, wanted in ((weight_grad, weight), (bias_grad, bias)))
    terms = (grad, other_ids, other_weight, len(other_weight))
    sum_runs(outputs, occurring if sparse else None, key, order, rank, terms, rows)
    if not sparse:
        return weight_grad, bias_grad, occurring
    count = (rank[-1] + (key[-1] < rows)).item()
    return tuple(x[:count] for x in (weight_grad, bias_grad, occurring))


def sorted_ids(ids, rows, padding):
    """The ids as keys, increasing, and where each was."""
    ids = ids.reshape(-1).contiguous()
    key = torch.empty(len(ids), dtype=torch.int32 if rows < 2**31 else torch.int64, device=ids.device)
    _key_kernel[(triton.cdiv(len(ids), 1024),)](key, ids, len(ids), rows, padding, BLOCK=1024)
    return key.sort(stable=True)


def sum_runs(outputs, occurring, key, order, rank, terms, rows, rule="", numbers=(0.0,) * 8, in_order=False):
    """_sum_kernel and, where a run may be longer than a chunk, _join_kernel.

    Args:
        outputs: what `write` takes for the table and for its bias, or None.
        terms: (upstream gradient, other ids, the rows that they name, or `in_order` one row for each, how many ids are
            good).
        rule, numbers: the optimizer's step to take instead of writing gradients.
    """
    grad, other_ids, other_weight, others = terms
    n, columns, per_id = len(key), other_weight.shape[1], grad.numel() // len(key)
    dtype = _dtype(other_weight)
    block = bucket(columns) if rule == "rowwise_adagrad" else min(bucket(columns), 256)
    blocks = max(1, triton.cdiv(columns, block))
    # A chunk gives one program some 128 terms to add; many chunks would make _join's sum the long one.
    chunk = max(128 // bucket(per_id), 1, bucket(n) // 4096)
    chunks = triton.cdiv(n, chunk)
    work = torch.float64 if dtype == tl.float64 else torch.float32
    partial, bias_partial = (torch.empty(2 * chunks, x, dtype=work, device=key.device) for x in (columns, 1))
    constants = {"RULE": rule, "DTYPE": dtype, "CHUNK": chunk, "BLOCK": block, "TERMS": max(1, min(8, 2048 // block))}
    constants["num_warps"] = 1 if block <= 64 else 2 if block <= 256 else 8
    sizes = (n, rows, per_id, grad.numel() // other_ids.numel(), others, columns, *other_weight.stride())
    given = (partial, bias_partial, occurring, key, order, rank)
    read = (grad.contiguous(), other_ids.contiguous(), other_weight)
    _sum_kernel[(n, blocks)](*outputs, *given, *read, *sizes, *numbers, IN_ORDER=in_order, **constants)
    if chunks > 1:
        given = (partial, bias_partial, key, rank, n, rows, columns)
        _join_kernel[(chunks - 1, blocks)](*outputs, *given, *numbers, **constants)
