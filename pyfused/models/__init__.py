"""The reference models that `pyfused train` and `pyfused demo` train, each in eager PyTorch or with the fused ops."""

from .cnn import MnistCNN
from .recommender import Recommender

__all__ = ["MnistCNN", "Recommender"]
