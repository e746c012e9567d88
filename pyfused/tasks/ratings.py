"""MovieLens ratings, guessed: one fifth is held out, which of the five is `fold`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..models import DotConcat, MatrixFactorization
from .task import Classification, Task

FOLDS = 5
SPLIT_SEED = 0  # of the order in which the ratings are dealt to the folds; the training's seed changes no fold
EVALUATION_ROWS = 1 << 16


class Ratings(Task):
    """Matrix factorisation with biases, squared error and a weight on the rows that a batch uses, as in Surprise."""

    name, network, metrics = "mf", MatrixFactorization, ("rmse",)
    epochs, batch_size, lr = 40, 1024, 2e-3
    dim, penalty, std = 32, 0.1, 0.05

    def __init__(self, folder: str | Path | None = None, fold: int = 0):
        if not 0 <= fold < FOLDS:
            raise ValueError(f"fold must be 0 to {FOLDS - 1}, got {fold}")
        self.ratings = data.movielens(folder)
        order = torch.randperm(len(self.ratings), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held_out = torch.arange(len(self.ratings)) % FOLDS == fold
        self.train_rows, self.test_rows = self.ratings.rows(order[~held_out]), self.ratings.rows(order[held_out])
        self.size = len(self.train_rows)
        self.settings = {"fold": fold}
        self.shape = {"num_users": len(self.ratings.user_ids), "num_items": len(self.ratings.item_ids)}

    def arguments(self) -> dict:
        mean = self.train_rows.rating.mean().item()
        return self.shape | {"dim": self.dim, "user_bias": True, "mean": mean, "std": self.std}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return SquaredError(model, self.penalty)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows[own]
        return self.train_rows.user[rows], self.train_rows.item[rows], self.train_rows.rating[rows]

    def guesses(self, model: nn.Module, user: Tensor, item: Tensor) -> Tensor:
        return model(user, item)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Root mean squared error of the guesses, clipped to the scale of the ratings."""
        device, test = next(model.parameters()).device, self.test_rows
        pairs = zip(test.user.split(EVALUATION_ROWS), test.item.split(EVALUATION_ROWS))
        guesses = torch.cat([self.guesses(model, u.to(device), i.to(device)).cpu() for u, i in pairs])
        return {"rmse": self._rmse(guesses)}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"mean rating": {"rmse": self._rmse(self.train_rows.rating.mean().expand(len(self.test_rows)))}}

    def about(self) -> dict:
        return self.ratings.about()

    def _rmse(self, guesses: Tensor) -> float:
        low, high = self.ratings.rating.min().item(), self.ratings.rating.max().item()
        return F.mse_loss(guesses.double().clamp(low, high), self.test_rows.rating.double()).sqrt().item()


class SquaredError(nn.Module):
    """Mean of (score - rating)² + penalty · (|user|² + |item|²) over the batch; no penalty with model.optimizer."""

    def __init__(self, model: nn.Module, penalty: float):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:
        error = F.mse_loss(self.model(user, item), rating)
        if self.model.optimizer is not None:  # it knows only the gradients of the scores
            return error
        norms = self.model.user(user).square().sum(-1) + self.model.item(item).square().sum(-1)
        return error + self.penalty * norms.mean()


class RatingClasses(Ratings):
    """Dot-concat: the ratings are classes, told apart by softmax cross-entropy; the guess is their expectation."""

    name, network, metrics = "dot-concat", DotConcat, ("accuracy", "rmse")
    epochs, batch_size, lr = 12, 512, 2e-3
    dim, dropout, weight_decay = 32, 0.1, 5e-4  # chosen on a fifth of the training rows of fold 0

    def __init__(self, folder: str | Path | None = None, fold: int = 0):
        super().__init__(folder, fold)
        self.values = self.ratings.rating.unique()
        self.train_classes = torch.searchsorted(self.values, self.train_rows.rating)

    def arguments(self) -> dict:
        return self.shape | {"dim": self.dim, "values": self.values, "dropout": self.dropout}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return PairClassification(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        user, item, _ = super().batch(rows, own, generator)
        return user, item, self.train_classes[rows[own]]

    def guesses(self, model: nn.Module, user: Tensor, item: Tensor) -> Tensor:
        return model.score(user, item)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device, test = next(model.parameters()).device, self.test_rows
        likeliest = model(test.user.to(device), test.item.to(device)).argmax(1).cpu()
        return {"accuracy": (self.values[likeliest] == test.rating).double().mean().item()} | super().evaluate(model)


class PairClassification(Classification):
    def forward(self, user: Tensor, item: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.model(user, item), target)
