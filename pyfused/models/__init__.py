"""The reference models: plain torch.nn, written as anybody would, so that `pyfused.fuse` has something to find."""

from .cnn import ImageCNN, MnistCNN, PhotoCNN, SmallCNN
from .gpt import GPT
from .recommender import DotConcat, MatrixFactorization, TwoTower
from .resnet import ResNet, resnet18, resnet50

__all__ = [
    "GPT",
    "DotConcat",
    "ImageCNN",
    "MatrixFactorization",
    "MnistCNN",
    "PhotoCNN",
    "ResNet",
    "SmallCNN",
    "TwoTower",
    "resnet18",
    "resnet50",
]
