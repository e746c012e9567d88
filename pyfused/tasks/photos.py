"""Photos in class folders: train_data/CLASS/* and test_data/CLASS/*, or CLASS/* in folds."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data
from ..models import ImageCNN
from .task import Classification, Task, accuracy

FOLDS = 5
SPLIT_SEED = 0


class Photos(Task):
    """A small convolutional network on images of 224 x 224, decoded by Pillow whenever they are needed.

    Args:
        folder: holds train_data/ and test_data/, or class folders, of which fold number `fold` of five is the test.
            None: the food photos, fetched and cached.
        skip_bad: leave out files that cannot be decoded or are neither RGB nor grey; otherwise they are an error.
        augment: random crops and mirror images in training.
        workers: processes that look the files through; those that decode batches are the training loop's.
    """

    name, network, metrics = "image-folder", ImageCNN, ("accuracy",)
    epochs, batch_size, lr = 40, 32, 5e-4
    size_of_image, dropout = 224, 0.5

    def __init__(
        self, folder: str | Path | None = None, fold: int | None = None, skip_bad: bool = False, augment: bool = False,
        workers: int = 0,
    ):  # fmt: skip
        folder = data.food_photos() if folder is None else Path(folder)
        self.augment, self.settings = augment, {"fold": fold, "augment": augment, "skip_bad": skip_bad}
        if (folder / "train_data").is_dir() and fold is None:
            self.train = data.usable(data.photo_folder(folder / "train_data"), skip_bad, workers)
            test = data.photo_folder(folder / "test_data", self.train.classes)
            self.test = data.usable(test, skip_bad, workers)
        else:
            photos = data.usable(data.photo_folder(folder), skip_bad, workers)
            self.train, self.test = folds(photos, 0 if fold is None else fold)
        self.size = len(self.train.paths)

    def arguments(self) -> dict:
        return {"num_classes": len(self.train.classes), "size": self.size_of_image, "dropout": self.dropout}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return Classification(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seeds = torch.randint(2**62, (len(rows),), generator=generator)
        images = []
        for row, seed in zip(rows[own].tolist(), seeds[own].tolist()):
            how = torch.Generator().manual_seed(seed) if self.augment else None
            images.append(data.decode(self.train.paths[row], self.size_of_image, how))
        return torch.stack(images) / 255, self.train.labels[rows[own]]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        batches = torch.arange(len(self.test.paths)).split(self.batch_size)
        return {"accuracy": accuracy(model, map(self.test_batch, batches))}

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = [data.decode(self.test.paths[row], self.size_of_image) for row in rows.tolist()]
        return torch.stack(images) / 255, self.test.labels[rows]

    def baselines(self) -> dict[str, dict[str, float]]:
        commonest = self.train.labels.bincount().argmax()
        return {"commonest class": {"accuracy": (self.test.labels == commonest).double().mean().item()}}

    def about(self) -> dict:
        return {"classes": self.train.classes, "image_size": self.size_of_image}


def folds(photos: data.Photos, fold: int) -> tuple[data.Photos, data.Photos]:
    """(the other four fifths, fold `fold`); each class is dealt to the folds in turn, in an order that is fixed."""
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold must be 0 to {FOLDS - 1}, got {fold}")
    order = torch.randperm(len(photos.paths), generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order[photos.labels[order].argsort(stable=True)]
    held_out = torch.arange(len(order)) % FOLDS == fold
    parts = (order[~held_out].sort().values.tolist(), order[held_out].sort().values.tolist())
    return tuple(data.Photos([photos.paths[i] for i in part], photos.labels[part], photos.classes) for part in parts)
