"""The recommenders: a vector for each user and item, and what makes a score of two of them.

For ranking each has `factors()`: (users [num_users, D], items [num_items, D], item bias [num_items]) such that a user's
items rank as users · items + bias. DotConcat, whose score is no such product, has `score(user, item)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional


def _table(rows: int, dim: int, std: float) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=std) if std else nn.init.zeros_(table.weight)
    return table


class MatrixFactorization(nn.Module):
    """score = ⟨user, item⟩ + item bias [+ user bias + mean] (Koren, Bell and Volinsky, 2009).

    For a ranking leave out `user_bias`: it is the same for all items of a user, so the loss gives it no gradient but
    rounding noise, which Adam would scale up to full steps.

    The attribute `optimizer`, None at first, may be one of pyfused.optim made with this module's parameters: then the
    scores are those of functional.embedding_dot, whose backward takes the steps.
    """

    def __init__(
        self, num_users: int, num_items: int, dim: int, *, user_bias: bool = False, mean: float = 0.0, std: float = 0.1
    ):
        super().__init__()
        self.optimizer, self.mean = None, mean
        self.user, self.item = _table(num_users, dim, std), _table(num_items, dim, std)
        self.item_bias = _table(num_items, 1, 0)
        self.user_bias = _table(num_users, 1, 0) if user_bias else None

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """user [B], item [B] -> scores [B]; user [B], item [B, K] -> [B, K]."""
        if self.optimizer is not None:
            biases = (self.user_bias.weight if self.user_bias else None, self.item_bias.weight)
            tables = (self.user.weight, self.item.weight, *biases)
            scores = functional.embedding_dot(user, item, *tables, optimizer=self.optimizer)
            return scores + self.mean if self.mean else scores
        rows = self.user(user).unsqueeze(1) if item.dim() == 2 else self.user(user)
        scores = (rows * self.item(item)).sum(-1) + self.item_bias(item).squeeze(-1)
        if self.user_bias is not None:
            scores = scores + (self.user_bias(user) if item.dim() == 2 else self.user_bias(user).squeeze(-1))
        return scores + self.mean if self.mean else scores

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.user.weight, self.item.weight, self.item_bias.weight.squeeze(-1)


class DotConcat(nn.Module):
    """Both embeddings and their dot product, concatenated, then Dense ReLU, Dense: logits over classes.

    The classes are ratings; `values` are what they stand for, [num_classes].
    """

    def __init__(
        self, num_users: int, num_items: int, dim: int, values: Tensor, hidden: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        self.user, self.item = _table(num_users, dim, 0.1), _table(num_items, dim, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Sequential(nn.Linear(2 * dim + 1, hidden), nn.ReLU(), nn.Linear(hidden, len(values)))
        self.register_buffer("values", values)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """user [B], item [B] -> logits [B, num_classes]."""
        users, items = self.user(user), self.item(item)
        dot = (users * items).sum(-1, keepdim=True)
        return self.dense(self.dropout(torch.cat([users, items, dot], -1)))

    def score(self, user: Tensor, item: Tensor) -> Tensor:
        """The expected rating, [B]."""
        return self(user, item).softmax(-1) @ self.values


class TwoTower(nn.Module):
    """score = ⟨user, item⟩ / (|user| |item| temperature) + item bias (Yi et al., RecSys 2019)."""

    def __init__(self, num_users: int, num_items: int, dim: int, temperature: float = 0.15):
        super().__init__()
        self.user, self.item = _table(num_users, dim, 0.1), _table(num_items, dim, 0.1)
        self.item_bias = _table(num_items, 1, 0)
        self.temperature = temperature

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """user [B], item [N] -> vectors of unit length [B, D] and [N, D], biases [N]."""
        items = F.normalize(self.item(item), dim=-1)
        return F.normalize(self.user(user), dim=-1), items, self.item_bias(item).squeeze(-1)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        users, items = (F.normalize(table.weight, dim=-1) for table in (self.user, self.item))
        return users / self.temperature, items, self.item_bias.weight.squeeze(-1)
