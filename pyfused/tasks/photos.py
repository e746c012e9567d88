"""Photos in class folders: train_data/CLASS/* and test_data/CLASS/*, or CLASS/* in folds."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..models import ImageCNN
from .task import Classification, Task, accuracy

FOLDS = 5
SPLIT_SEED = 0
MIXUP = 0.4  # of the Beta distribution of two images' shares (Zhang et al., 2018)


class Photos(Task):
    """A small convolutional network on images of 224 x 224, decoded by Pillow whenever they are needed.

    Args:
        folder: holds train_data/ and test_data/, or class folders, of which fold number `fold` of five is the test.
            None: the food photos, fetched and cached.
        skip_bad: leave out files that cannot be decoded or are neither RGB nor grey; otherwise they are an error.
        augment: in training random crops, mirrored or upside down at random, and each image mixed with another (mixup).
        workers: processes that look the files through; those that decode batches are the training loop's.
    """

    name, network, metrics = "image-folder", ImageCNN, ("accuracy",)
    epochs, batch_size, lr = 60, 32, 3e-3
    size_of_image = 224

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
        return {"num_classes": len(self.train.classes), "size": self.size_of_image}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return Classification(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels; if they are mixed, the shares of the classes [N, C]."""
        if not self.augment:
            return self.images(self.train, rows[own]), self.train.labels[rows[own]]
        others = rows[torch.randperm(len(rows), generator=generator)]
        seeds = torch.randint(2**62, (2, len(rows)), generator=generator)
        share = np.random.default_rng(seeds[0, 0].item()).beta(MIXUP, MIXUP)
        images = targets = 0
        for weight, who, how in ((share, rows[own], seeds[0, own]), (1 - share, others[own], seeds[1, own])):
            images = images + weight * self.images(self.train, who, how)
            targets = targets + weight * F.one_hot(self.train.labels[who], len(self.train.classes))
        return images, targets

    def images(self, photos: data.Photos, rows: Tensor, seeds: Tensor | None = None) -> Tensor:
        """float32 [N, 3, size, size], from 0 to 1; augmented if there are seeds, one for each."""
        how = [None] * len(rows) if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        paths = [photos.paths[row] for row in rows.tolist()]
        return torch.stack([data.decode(path, self.size_of_image, g) for path, g in zip(paths, how)]) / 255

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        batches = torch.arange(len(self.test.paths)).split(self.batch_size)
        return {"accuracy": accuracy(model, map(self.test_batch, batches))}

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(self.test, rows), self.test.labels[rows]

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
