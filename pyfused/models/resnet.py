"""ResNet-18 and ResNet-50 (He et al., 2016; in the latter the stride is in the 3 x 3, as in torchvision's)."""

import torch
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """relu(x + convolutions(x)): two of 3 x 3, or, where `bottleneck`, 1 x 1, 3 x 3 and 1 x 1 to four times as many."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            layers, outputs = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)], 4 * width
        else:
            layers, outputs = [(inputs, width, 3, stride), (width, width, 3, 1)], width
        *first, last = (_conv(*layer) for layer in layers)
        self.body = nn.Sequential(*(part for conv in first for part in (*conv, nn.ReLU())), *last)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, num_classes]; `depths` blocks in each of the four stages."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool, num_classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        blocks, inputs = [], 64
        for stage, depth in enumerate(depths):
            width = 64 << stage
            for number in range(depth):
                blocks.append(Block(inputs, width, 2 if stage and not number else 1, bottleneck))
                inputs = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def resnet18(num_classes: int = 1000) -> ResNet:
    return ResNet((2, 2, 2, 2), False, num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    return ResNet((3, 4, 6, 3), True, num_classes)
