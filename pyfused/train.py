"""One training loop, and the two tasks it trains in eager PyTorch or with the fused ops: digits and movies.

for row in train(task, task.model(fused=True), epochs=5): print(row)
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, functional
from .models import MnistCNN, Recommender

FINAL_LR = 0.02  # of the initial learning rate
EVALUATION_BATCH = 128


def train(
    task: "Digits | Movies",
    model: nn.Module,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Iterator[dict[str, float]]:
    """Trains `model` with Adam and a linear decay of the learning rate; yields a row of results after every epoch.

    What is None is the task's default. The order of the examples and the negatives depend on `seed` alone, so two
    models that start from the same parameters see the same batches. `on_step` gets the number of steps done so far.

    A row has: epoch, loss (mean over the epoch), seconds (of training; evaluation is not in it), lr (of the last
    step), and what task.evaluate returns.
    """
    epochs, batch_size = epochs or task.epochs, batch_size or task.batch_size
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr or task.lr, weight_decay=task.weight_decay)
    steps = epochs * steps_per_epoch(task, batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (1 - FINAL_LR) * step / steps)
    step = 0
    for epoch in range(1, epochs + 1):
        model.train()
        total, started = 0.0, time.perf_counter()
        for rows in torch.randperm(task.size, generator=generator).split(batch_size):
            loss = task.loss(model, rows, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
            step += 1
            on_step(step)
        seconds = time.perf_counter() - started
        result = {"epoch": epoch, "loss": total / task.size, "seconds": seconds, "lr": schedule.get_last_lr()[0]}
        model.eval()
        with torch.no_grad():
            yield result | task.evaluate(model)


def steps_per_epoch(task: "Digits | Movies", batch_size: int) -> int:
    return math.ceil(task.size / batch_size)


class Digits:
    """MNIST, 60,000 training and 10,000 test images, with a small convolutional network."""

    name, metrics = "cnn", ("accuracy",)
    epochs, batch_size, lr, weight_decay = 5, 64, 1e-3, 0.0

    def __init__(self, folder: str | Path | None = None):
        self.train_images, self.train_labels, self.test_images, self.test_labels = data.mnist(folder)
        self.size = len(self.train_images)

    def model(self, fused: bool, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return MnistCNN(fused=fused)

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        logits = model(standardise(self.train_images[rows]))
        return cross_entropy(model)(logits, self.train_labels[rows])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Share of the test images whose largest logit is that of their label."""
        batches = zip(self.test_images.split(EVALUATION_BATCH), self.test_labels.split(EVALUATION_BATCH), strict=True)
        right = sum((model(standardise(images)).argmax(1) == labels).sum().item() for images, labels in batches)
        return {"accuracy": right / len(self.test_labels)}


class Movies:
    """MovieLens with an embedding-dot recommender: rank each user's last film among all that the user has not seen.

    The loss is a sampled softmax: the film that was seen against `negatives` drawn uniformly, of which those that the
    user has seen too are left out.
    """

    name, metrics = "recommender", ("hr@10", "ndcg@10")
    epochs, batch_size, lr, weight_decay = 10, 512, 5e-3, 1e-4
    dim, negatives = 64, 64

    def __init__(self, folder: str | Path | None = None):
        ratings = data.movielens(folder)
        self.num_users, self.num_items = len(ratings.user_ids), len(ratings.item_ids)
        self.train_rows, self.test_rows = data.leave_one_out(ratings)
        self.size = len(self.train_rows)
        self.seen = torch.zeros(self.num_users, self.num_items, dtype=torch.bool)
        self.seen[self.train_rows.user, self.train_rows.item] = True

    def model(self, fused: bool, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return Recommender(self.num_users, self.num_items, self.dim, fused=fused)

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        user, positive = self.train_rows.user[rows], self.train_rows.item[rows, None]
        negative = torch.randint(self.num_items, (len(rows), self.negatives), generator=generator)
        scores = model(user, torch.cat([positive, negative], 1))
        not_negative = F.pad(self.seen[user[:, None], negative], (1, 0))  # the first column is the positive's
        scores = scores.masked_fill(not_negative, -torch.inf)
        return cross_entropy(model)(scores, torch.zeros(len(rows), dtype=torch.int64))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """HR@10 and NDCG@10 of the held-out films, ranked by score."""
        return self.ranking(model.score_all())

    def popularity(self) -> dict[str, float]:
        """The same metrics for ranking by the number of ratings: the same list for everyone."""
        counts = self.train_rows.item.bincount(minlength=self.num_items)
        return self.ranking(counts.float().expand(self.num_users, -1))

    def ranking(self, scores: Tensor) -> dict[str, float]:
        """Rank of each held-out film among those its user has not seen; ties get the middle rank."""
        user, item = self.test_rows.user, self.test_rows.item
        scores = scores[user].masked_fill(self.seen[user], -torch.inf)
        target = scores.gather(1, item[:, None])
        rank = (scores > target).sum(1) + ((scores == target).sum(1) - 1) / 2
        hit = rank < 10
        return {"hr@10": hit.float().mean().item(), "ndcg@10": (hit / torch.log2(rank + 2)).mean().item()}


TASKS = {task.name: task for task in (Digits, Movies)}


def cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return functional.cross_entropy if model.fused else F.cross_entropy


def standardise(images: Tensor) -> Tensor:
    """uint8 pixels to mean 0 and standard deviation 1 over MNIST's training images."""
    return (images / 255 - 0.1307) / 0.3081


def write_csv(rows: Iterable[dict], path: Path) -> None:
    """Writes rows that have the same keys, with a header."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
