"""The embedding-dot recommender of the MovieLens demo."""

import torch
from torch import nn

from pyfused import functional


class Recommender(nn.Module):
    """Matrix factorisation with an item bias: score = <user, item> + item bias (Koren, Bell and Volinsky, 2009).

    There is no user bias: it is the same for all items of a user, so a ranking loss gives it no gradient but rounding
    noise, which Adam would scale up to full steps. Parameters and state_dict are the same, fused or not.
    """

    def __init__(self, num_users: int, num_items: int, dim: int, fused: bool = False):
        super().__init__()
        self.fused = fused
        self.user = nn.Embedding(num_users, dim)
        self.item = nn.Embedding(num_items, dim)
        self.item_bias = nn.Embedding(num_items, 1)
        nn.init.normal_(self.user.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.item_bias.weight)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Scores: user [B], item [B] -> [B]; user [B], item [B, K] -> [B, K]."""
        if self.fused:
            weights = (self.user.weight, self.item.weight)
            return functional.embedding_dot(user, item, *weights, item_bias=self.item_bias.weight)
        rows = self.user(user).unsqueeze(1) if item.dim() == 2 else self.user(user)
        return (rows * self.item(item)).sum(-1) + self.item_bias(item).squeeze(-1)

    @torch.no_grad()
    def score_all(self) -> torch.Tensor:
        """Scores [num_users, num_items] of every pair, for ranking."""
        return self.user.weight @ self.item.weight.T + self.item_bias.weight.squeeze(-1)
