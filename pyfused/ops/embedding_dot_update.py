"""The backward of embedding_dot that takes an optimizer's step on the tables and biases instead of giving gradients.

With g[n] the gradient of row n of a table, summed over all scores that use the row, both tables' gradients being those
of the rows before the step. Rows that no id names, and padding rows, stay as they are, and so does their state:

    sgd               w -= lr·g
    adagrad           s += g²;  w -= lr·g / (√s + eps)                        (Duchi, Hazan and Singer, 2011)
    rowwise_adagrad   s += mean over the row of g²;  w -= lr·g / (√s + eps)   (one s per row: DLRM, FBGEMM)
    adam              m += α·(g - m);  v += β·(g² - v);  w -= lr·m / (√v + eps)   (Kingma and Ba, 2015: α = 1 - β₁, ...)

pyfused.optim turns its options into these numbers; a bias is a table of one column. Everything is computed in float32
(float64 tables: float64), state is kept in it, and a 16-bit weight is rounded to nearest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._library import define


def _sgd(weight, grad, lr):
    return weight - lr * grad


def _adagrad(weight, grad, s, lr, eps):
    s += grad.square()
    return weight - lr * grad / (s.sqrt() + eps)


def _rowwise_adagrad(weight, grad, s, lr, eps):
    s += grad.square().mean(-1)
    return weight - lr * grad / (s.sqrt() + eps).unsqueeze(-1)


def _adam(weight, grad, m, v, lr, alpha, beta, eps):
    m += alpha * (grad - m)
    v += beta * (grad.square() - v)
    return weight - lr * m / (v.sqrt() + eps)


# rule: (its step in eager PyTorch on some rows, state tensors per table, numbers per table)
RULES = {"sgd": (_sgd, 0, 1), "adagrad": (_adagrad, 1, 2), "rowwise_adagrad": (_rowwise_adagrad, 1, 2),
         "adam": (_adam, 2, 4)}  # fmt: skip


def arithmetic_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def per_table(rule: str, state: list, settings: list, needed: list[bool]) -> list[tuple]:
    """(state tensors, numbers) of user_weight, item_weight, user_bias and item_bias; empty where not needed."""
    _, states, numbers = RULES[rule]
    given = []
    for need in needed:
        given.append((state[:states], settings[:numbers]) if need else ((), ()))
        state, settings = (state[states:], settings[numbers:]) if need else (state, settings)
    return given


def reference(
    grad, user, item, user_weight, item_weight, user_bias, item_bias, state, padding, needed, rule, settings
) -> None:
    """The step in eager PyTorch: the specification.

    Args:
        grad: gradient of the scores, of item's shape. padding: the padding row of each table, -1: none.
        needed: which of user_weight, item_weight, user_bias and item_bias to update, at least one.
        state: the rule's tensors for each table that is needed, one after the other, in the tables' order.
        settings: the rule's numbers, likewise.
    """
    tables, dtype = (user_weight, item_weight, user_bias, item_bias), arithmetic_dtype(user_weight)
    for name, ids, weight in (("user", user, user_weight), ("item", item, item_weight)):
        check_ids(name, ids, weight)
    grad, per_user = grad.to(dtype), item.dim() > user.dim()
    user_rows, item_rows = F.embedding(user, user_weight).to(dtype), F.embedding(item, item_weight).to(dtype)
    terms = grad.unsqueeze(-1) * item_rows
    user_terms, user_grad = (terms.sum(-2), grad.sum(-1)) if per_user else (terms, grad)
    item_terms = grad.unsqueeze(-1) * (user_rows.unsqueeze(-2) if per_user else user_rows)
    gradients = (user_terms, item_terms, user_grad.unsqueeze(-1), grad.unsqueeze(-1))
    for at, options in enumerate(per_table(rule, state, settings, needed)):
        if not needed[at]:
            continue
        ids, keep = (user, item)[at % 2], (user, item)[at % 2] != padding[at % 2]
        rows, slots = ids[keep].long().unique(return_inverse=True)
        terms = gradients[at][keep]
        found = terms.new_zeros(len(rows), terms.shape[-1]).index_add_(0, slots, terms)
        # A view as long as a row of the table, or of its state: a bias may be [n] or [n, 1].
        weight = tables[at] if tables[at].dim() == 2 else tables[at].unsqueeze(-1)
        states = [s.view(len(s)) if rule == "rowwise_adagrad" else s.view(weight.shape) for s in options[0]]
        before = [s[rows] for s in states]
        weight[rows] = RULES[rule][0](weight[rows].to(dtype), found, *before, *options[1]).to(weight.dtype)
        for s, values in zip(states, before, strict=True):
            s[rows] = values


def cannot(grad, user, item, user_weight, item_weight, user_bias, item_bias, state, *rest) -> str | None:
    """Why a kernel that changes the tables in place cannot take these; None if it can."""
    for name, table in (("user_weight", user_weight), ("item_weight", item_weight)):
        if table.stride(1) != 1 and table.shape[1] > 1:
            return f"the rows of {name} have gaps between their numbers, so it cannot be changed in place"
    if not all(s.is_contiguous() for s in state):
        return "the optimizer's state is not contiguous"
    return None


def bias_column(bias):
    """The bias as kernels change it in place: [rows], any distance between its numbers."""
    return bias if bias is None or bias.dim() == 1 else bias[:, 0]


def of_side(options, side):
    """What kernels take for a weight and its bias: four state tensors, None where the rule has none, and 8 numbers."""
    pair = (options[side], options[side + 2])
    tensors = [tensor for given in pair for tensor in (*given[0], None, None)[:2]]
    return tensors, [number for given in pair for number in (*given[1], 0.0, 0.0, 0.0, 0.0)[:4]]


def check_ids(name: str, ids: torch.Tensor, weight: torch.Tensor) -> None:
    """As F.embedding would, but before anything is written."""
    if ids.numel() and (ids.min() < 0 or ids.max() >= len(weight)):
        raise IndexError(f"{name} ids must lie in [0, {len(weight)}), got {ids.min().item()} to {ids.max().item()}")


update = define(
    "embedding_dot_update(Tensor grad, Tensor user, Tensor item, Tensor(a!) user_weight, Tensor(b!) item_weight,"
    " Tensor(c!)? user_bias, Tensor(d!)? item_bias, Tensor(e!)[] state, SymInt[] padding, bool[] needed, str rule,"
    " float[] settings) -> ()",
    lambda *args: None,
    reference,
)
