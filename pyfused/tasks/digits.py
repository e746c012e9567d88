"""MNIST: 60,000 training and 10,000 test digits, or only the first 1,000 of the former."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data
from ..models import MnistCNN, SmallCNN
from .task import EVALUATION_BATCH, Classification, Task, accuracy


class MnistDigits(Task):
    """The demo's network on all of MNIST."""

    name, network, metrics = "mnist-cnn", MnistCNN, ("accuracy",)
    epochs, batch_size = 5, 64

    def __init__(self, folder: str | Path | None = None):
        self.train_images, self.train_labels, self.test_images, self.test_labels = data.mnist(folder)
        self.size = len(self.train_images)

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return Classification(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return standardise(self.train_images[rows[own]]), self.train_labels[rows[own]]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        pairs = zip(self.test_images.split(EVALUATION_BATCH), self.test_labels.split(EVALUATION_BATCH), strict=True)
        return {"accuracy": accuracy(model, ((standardise(images), labels) for images, labels in pairs))}


class SmallDigits(MnistDigits):
    """One convolution, learnt from 1,000 labelled images."""

    name, network = "small-cnn", SmallCNN
    epochs, batch_size = 20, 32

    def __init__(self, folder: str | Path | None = None):
        super().__init__(folder)
        self.size = min(1000, self.size)


def standardise(images: Tensor) -> Tensor:
    """uint8 pixels to mean 0 and standard deviation 1 over MNIST's training images."""
    return (images / 255 - 0.1307) / 0.3081
