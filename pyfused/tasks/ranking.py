"""MovieLens as "who saw what": rank what a user has not seen; a rating of any height is a positive.

Two ways to hold out test films, both ranked among all that the user has not seen in training or validation:
    last:   each user's last film (leave one out); HR@10 and NDCG@10.
    random: a tenth of each user's films at random, another tenth for validation (RecBole's 80/10/10).
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, functional
from ..models import MatrixFactorization, TwoTower
from .task import Task

K = 10
SPLITS = ("last", "random")
EVALUATION_PAIRS = 1024


class Ranking(Task):
    """The data, the two splits and the metrics."""

    metrics = ("hr@10", "ndcg@10")
    dim: int

    def __init__(self, folder: str | Path | None = None, split: str = "last", split_seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
        self.ratings = data.movielens(folder)
        if split == "last":
            self.train_rows, self.test_rows = data.leave_one_out(self.ratings)
            known = self.train_rows
        else:
            self.train_rows, validation, self.test_rows = data.split_by_user(self.ratings, split_seed)
            known = data.concatenate(self.train_rows, validation)
        self.size, self.settings = len(self.train_rows), {"split": split, "split_seed": split_seed}
        self.num_users, self.num_items = len(self.ratings.user_ids), len(self.ratings.item_ids)
        self.seen = self._pairs(self.train_rows)  # what training may not take for a negative
        self.known = self._pairs(known)  # what the test does not rank

    def arguments(self) -> dict:
        return {"num_users": self.num_users, "num_items": self.num_items, "dim": self.dim}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        users, items, bias = (x.cpu() for x in model.factors())
        return self.ranking(lambda user: users[user] @ items.T + bias)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Ranking by the number of ratings: the same list for everyone."""
        counts = self.train_rows.item.bincount(minlength=self.num_items).float()
        return {"popularity": self.ranking(lambda user: counts.expand(len(user), -1))}

    def about(self) -> dict:
        return self.ratings.about()

    def ranking(self, scores_of: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Metrics of a function from users [P] to scores [P, num_items]; ties get the middle rank.

        HR@10: share of the users with a hit among the first ten. NDCG@10: a hit at rank r (from 0) gains
        1 / log2(r + 2); a user's gains over the largest that are possible with as many test films.
        """
        gains, hits, count = (torch.zeros(self.num_users, dtype=torch.float64) for _ in range(3))
        columns = (self.test_rows.user.split(EVALUATION_PAIRS), self.test_rows.item.split(EVALUATION_PAIRS))
        for user, item in zip(*columns):
            scores = scores_of(user).masked_fill(self.known[user], -torch.inf)
            target = scores.gather(1, item[:, None])
            rank = (scores > target).sum(1) + ((scores == target).sum(1) - 1) / 2
            hit = rank < K
            gains.index_add_(0, user, hit / torch.log2(rank.double() + 2))
            hits.index_add_(0, user, hit.double())
            count.index_add_(0, user, torch.ones(len(user), dtype=torch.float64))
        tested = count > 0
        best = (1 / torch.log2(torch.arange(K) + 2.0).double()).cumsum(0)[count[tested].long().clamp(max=K) - 1]
        hr, ndcg = (hits[tested] > 0).double().mean(), (gains[tested] / best).mean()
        return {"hr@10": hr.item(), "ndcg@10": ndcg.item()}

    def _pairs(self, rows: data.Interactions) -> Tensor:
        pairs = torch.zeros(self.num_users, self.num_items, dtype=torch.bool)
        pairs[rows.user, rows.item] = True
        return pairs


class SampledNegatives(Ranking):
    """Matrix factorisation against `negatives` items drawn uniformly, without those that the user has seen.

    With one negative the softmax is that of two scores, -log sigmoid(positive - negative): BPR (Rendle et al., 2009).
    """

    name, network = "bpr", MatrixFactorization
    epochs, batch_size, lr, weight_decay = 10, 512, 5e-3, 1e-4
    dim, negatives = 64, 64

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return SampledSoftmax(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        negative = torch.randint(self.num_items, (len(rows), self.negatives), generator=generator)[own]
        user, positive = self.train_rows.user[rows[own]], self.train_rows.item[rows[own], None]
        no_negative = F.pad(self.seen[user[:, None], negative], (1, 0))  # the first column is the positive's
        return user, torch.cat([positive, negative], 1), no_negative


class SampledSoftmax(nn.Module):
    """Softmax cross-entropy of user [B] and items [B, 1 + negatives]; the first item is the right one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, user: Tensor, items: Tensor, masked: Tensor) -> Tensor:
        scores = self.model(user, items).masked_fill(masked, -torch.inf)
        return F.cross_entropy(scores, torch.zeros_like(user))


class InBatch(Ranking):
    """Two towers, each pair's item against the items of the others in the batch, with the logQ correction.

    Items that the user is known to have seen are no negatives. With `known_negatives` they are, as in most two-tower
    training, and only the pair's own item in another pair, an accidental hit, is none: then the fused loss is
    functional.in_batch_cross_entropy, which stores no scores.

    `log_q_power`: of the items' frequencies, which are the probabilities of meeting them in a batch. 1 makes the loss
    that of a softmax over all items (Yi et al., RecSys 2019), 0 leaves popularity out of the scores.
    """

    name, network = "two-tower", TwoTower
    epochs, batch_size, lr = 20, 256, 1e-3
    dim, temperature, log_q_power = 64, 0.15, 1.0

    def __init__(
        self, folder: str | Path | None = None, split: str = "last", split_seed: int = 0, known_negatives: bool = False
    ):
        super().__init__(folder, split, split_seed)
        self.known_negatives = self.settings["known_negatives"] = known_negatives
        frequency = self.train_rows.item.bincount(minlength=self.num_items) / self.size
        self.log_q = self.log_q_power * frequency.clamp(min=1 / self.size).log()

    def arguments(self) -> dict:
        return super().arguments() | {"temperature": self.temperature}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return (InBatchUnstored if fused and self.known_negatives else InBatchSoftmax)(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        """(own users [b], all items [B], the own pairs' places [b], log q [B], no negatives [b, B])."""
        user, item, place = self.train_rows.user[rows[own]], self.train_rows.item[rows], torch.arange(len(rows))
        masked = item[own, None] == item if self.known_negatives else self.seen[user[:, None], item]
        return user, item, place[own], self.log_q[item], masked & (place[own, None] != place)


class InBatchSoftmax(nn.Module):
    """Cross-entropy of the users [b] of pairs `own` [b] over the items [B] of the whole batch, several processes'."""

    def __init__(self, model: TwoTower):
        super().__init__()
        self.model = model

    def forward(self, user: Tensor, item: Tensor, own: Tensor, log_q: Tensor, masked: Tensor) -> Tensor:
        users, items, bias = self.model(user, item)
        scores = users @ items.T / self.model.temperature + (bias - log_q)
        return F.cross_entropy(scores.masked_fill(masked, -torch.inf), own)


class InBatchUnstored(InBatchSoftmax):
    """The same by functional.in_batch_cross_entropy, which finds accidental hits by itself; it wants a whole batch."""

    def forward(self, user: Tensor, item: Tensor, own: Tensor, log_q: Tensor, masked: Tensor) -> Tensor:
        if len(user) < len(item):
            return super().forward(user, item, own, log_q, masked)
        unique, item = item.unique(return_inverse=True)
        scale = 1 / self.model.temperature
        return functional.in_batch_cross_entropy(own, item, *self.model(user, unique), log_q=log_q, scale=scale)
