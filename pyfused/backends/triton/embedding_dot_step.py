"""Where the sums of embedding_dot's backward end: a row of a gradient, or an optimizer's step on the row itself."""

import triton
import triton.language as tl


@triton.jit
def write(table, at, d, inside, g, columns, lr, alpha, beta, eps, RULE: tl.constexpr):
    """The gradient g of the elements d of row `at`, or, with a RULE, the step that it makes.

    table: (first element, distance of rows, and the tensors of the rule's state). None within: Triton 3.6 cannot.
    """
    w_at = table[0] + at * table[1] + d
    if RULE == "":
        tl.store(w_at, g.to(table[0].dtype.element_ty), mask=inside)
    else:
        zero = tl.zeros((), tl.float64)
        lr, eps = (zero + lr).to(g.dtype), (zero + eps).to(g.dtype)
        w = tl.load(w_at, mask=inside, other=0.0).to(g.dtype)
        if RULE == "sgd":
            step = g
        elif RULE == "adam":
            alpha, beta = (zero + alpha).to(g.dtype), (zero + beta).to(g.dtype)
            m_at, v_at = table[2] + at * columns + d, table[3] + at * columns + d
            m, v = tl.load(m_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=1.0)
            m += alpha * (g - m)
            v += beta * (g * g - v)
            tl.store(m_at, m, mask=inside)
            tl.store(v_at, v, mask=inside)
            step = m / (tl.sqrt(v) + eps)
        else:
            s_at = table[2] + (at + d * 0 if RULE == "rowwise_adagrad" else at * columns + d)
            s = tl.load(s_at, mask=inside, other=1.0)
            if RULE == "rowwise_adagrad":
                s += tl.sum(tl.where(inside, g * g, 0.0), 0) / columns
                tl.debug_barrier()  # all threads have read the row's one sum
                tl.store(s_at, s, mask=inside & (d == 0))
            else:
                s += g * g
                tl.store(s_at, s, mask=inside)
            step = g / (tl.sqrt(s) + eps)
        tl.store(w_at, (w - lr * step).to(table[0].dtype.element_ty), mask=inside)
