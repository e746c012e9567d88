"""The convolutional classifiers: images in, logits out. Convolutions are 3 x 3 without padding, pools 2 x 2."""

import torch
from torch import nn


class SmallCNN(nn.Module):
    """Conv 32 ReLU, MaxPool, Dense 128 ReLU, Dense 10: images [N, 1, 28, 28] to logits [N, 10]."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(32 * 13 * 13, 128), nn.ReLU(), nn.Linear(128, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))


class MnistCNN(nn.Module):
    """Conv 32 ReLU, MaxPool, Conv 64 ReLU, MaxPool, Conv 64 ReLU, Dense 64 ReLU, Dense 10: 93,322 parameters.

    Images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3), nn.ReLU()),
        )
        self.classifier = nn.Sequential(nn.Linear(64 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))


class ImageCNN(nn.Module):
    """Conv 32 ReLU, MaxPool, Conv 64 ReLU, MaxPool, Conv 64 ReLU, Dense 64 ReLU, Dense C, for photos.

    Images [N, 3, size, size], from 0 to 1, to logits [N, num_classes].

    The first dense layer has 11 million weights at size 224 and would learn a small folder by heart. It starts as a
    dense layer on each map's mean, with the same weights at every position, and its input is divided by the number of
    positions, so that one learning rate suits it and the convolutions.
    """

    def __init__(self, num_classes: int, size: int = 224):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3), nn.ReLU()),
        )
        self.positions = (((size - 2) // 2 - 2) // 2 - 2) ** 2
        self.classifier = nn.Sequential(nn.Linear(64 * self.positions, 64), nn.ReLU(), nn.Linear(64, num_classes))
        _he(self.features)
        of_means = nn.init.kaiming_normal_(torch.empty(64, 64), nonlinearity="relu")
        with torch.no_grad():
            self.classifier[0].weight.copy_(of_means.repeat_interleave(self.positions, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(4 * images - 2).flatten(1) / self.positions)


class PhotoCNN(nn.Module):
    """Five times Conv 3x3 ReLU MaxPool, with 32, 64, 128, 256 and 256 channels, then each map's mean and Dense C.

    Images [N, 3, height, width], from 0 to 1, to logits [N, num_classes]. The convolutions are padded, so that any
    size from 32 on will do. VGG's blocks (Simonyan and Zisserman, 2015) with one convolution each; the mean instead of
    dense layers on all positions (Lin et al., 2014) leaves a million weights, where ImageCNN has eleven.
    """

    WIDTHS = (32, 64, 128, 256, 256)

    def __init__(self, num_classes: int):
        super().__init__()
        blocks = [
            (nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            for c_in, c_out in zip((3, *self.WIDTHS), self.WIDTHS)
        ]
        self.features = nn.Sequential(*(layer for block in blocks for layer in block))
        self.classifier = nn.Linear(self.WIDTHS[-1], num_classes)
        _he(self.features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(4 * images - 2).mean((2, 3)))


def _he(features: nn.Sequential) -> None:
    """Initialises the convolutions for ReLU (He et al., 2015): each keeps the variance of what it is given."""
    for conv in features[::3]:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
