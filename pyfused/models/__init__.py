"""The reference models: plain torch.nn, written as anybody would, so that `pyfused.fuse` has something to find."""

from .cnn import ImageCNN, MnistCNN, SmallCNN
from .gpt import GPT
from .recommender import DotConcat, MatrixFactorization, TwoTower
from .resnet import ResNet, resnet18, resnet50

__all__ = [
    "GPT",
    "DotConcat",
    "ImageCNN",
    "MatrixFactorization",
    "MnistCNN",
    "ResNet",
    "SmallCNN",
    "TwoTower",
    "resnet18",
    "resnet50",
]
