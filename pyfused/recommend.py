"""The best items for users, exactly, without the scores of all pairs in memory.

    scores = users · itemsᵀ + bias,    the k largest of each row

Items are taken in blocks: a block's scores are made, its k best merged with the k best so far. What is stored are
[users, block + 2k] numbers, not [users, items]. Bytes: each item's vector is read once per block of users.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint

BLOCK = 8192  # items; with 64 users 2 MiB of scores, which stay in a cache


def top_k(
    users: Tensor, items: Tensor, k: int, bias: Tensor | None = None, exclude: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The k largest scores of each user and their items, best first; among equal scores any order.

    Args:
        users: [B, D]. items: [N, D]. bias: [N] or None.
        k: how many; where fewer than k are left, the rest are -inf and item -1.
        exclude: (row of users, item) pairs that are left out, int64 [2, M], or None.
        block: items at a time.

    Returns:
        scores [B, k] and items [B, k], int64.

    Raises:
        ValueError: k is less than 1.
    """

    def scores_of(first: int, end: int) -> Tensor:
        scores = users @ items[first:end].T
        return scores if bias is None else scores + bias[first:end]

    return top_k_of(scores_of, len(users), len(items), k, exclude, block)


def top_k_of(
    scores_of: Callable[[int, int], Tensor], rows: int, columns: int, k: int, exclude: Tensor | None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """As top_k, of any function from a range of items to scores [rows, end - first]."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    best, ids = torch.full((rows, k), -torch.inf), torch.full((rows, k), -1)
    for first in range(0, columns, block):
        scores = scores_of(first, min(first + block, columns))
        if exclude is not None:
            row, item = exclude[:, (exclude[1] >= first) & (exclude[1] < first + block)]
            scores[row, item - first] = -torch.inf
        found, where = scores.topk(min(k, scores.shape[1]), 1)
        best = torch.cat([best.to(found), found], 1)
        ids = torch.cat([ids.to(where.device), where + first], 1)
        best, order = best.topk(k, 1)
        ids = ids.gather(1, order).masked_fill(best == -torch.inf, -1)
    return best, ids


@torch.no_grad()
def recommend(file: Path, user: int, top: int, seen: bool = False) -> list[tuple[int, float]]:
    """The best items for a user, as (id, score), best first; ids are those of the data. `seen`: also what is known.

    Raises FileNotFoundError or ValueError for a file that is no recommender's checkpoint, ValueError for a user that it
    does not know.
    """
    model, state = checkpoint.load_model(file)
    about = state["about"]
    if "user_ids" not in about:
        raise ValueError(f"{file} is of {state['task']}, which recommends nothing")
    row = (about["user_ids"] == user).nonzero().flatten()
    if not len(row):
        raise ValueError(f"user {user} is not among the {len(about['user_ids'])} users of {file}")
    exclude = None
    if not seen:
        items = about["seen"][1, about["seen"][0] == row]
        exclude = torch.stack([torch.zeros_like(items), items])
    if hasattr(model, "factors"):
        users, items, bias = model.factors()
        best, ids = top_k(users[row], items, top, bias, exclude)
    else:

        def scores(first: int, end: int) -> Tensor:
            return model.score(row.expand(end - first), torch.arange(first, end))[None]

        best, ids = top_k_of(scores, 1, len(about["item_ids"]), top, exclude)
    pairs = zip(ids[0].tolist(), best[0].tolist())
    return [(about["item_ids"][item].item(), score) for item, score in pairs if item >= 0]
