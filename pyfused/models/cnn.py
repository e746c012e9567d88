"""The convolutional network of the MNIST demo."""

import torch
import torch.nn.functional as F
from torch import nn

import pyfused.nn


class MnistCNN(nn.Module):
    """Conv 32 ReLU, MaxPool, Conv 64 ReLU, MaxPool, Conv 64 ReLU, Dense 64 ReLU, Dense 10: 93,322 parameters.

    Convolutions are 3 x 3 without padding, pools 2 x 2. Parameters and state_dict are the same, fused or not.
    """

    def __init__(self, fused: bool = False):
        super().__init__()
        self.fused = fused
        self.conv1 = (pyfused.nn.Conv2dReLUMaxPool2d if fused else nn.Conv2d)(1, 32, 3)
        self.conv2 = (pyfused.nn.Conv2dReLUMaxPool2d if fused else nn.Conv2d)(32, 64, 3)
        self.conv3 = (pyfused.nn.Conv2dReLU if fused else nn.Conv2d)(64, 64, 3)
        self.dense1 = nn.Linear(64 * 3 * 3, 64)
        self.dense2 = nn.Linear(64, 10)
        if fused:
            self.to(memory_format=torch.channels_last)  # the layout that the fused kernels work in

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] (float)."""
        if self.fused:
            x = self.conv3(self.conv2(self.conv1(images)))
        else:
            x = F.max_pool2d(F.relu(self.conv1(images)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            x = F.relu(self.conv3(x))
        # Features are numbered (channel, row, column) whatever the memory format of x, so weights interchange.
        return self.dense2(F.relu(self.dense1(x.flatten(1))))
