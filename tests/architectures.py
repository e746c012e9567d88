"""Models as other people write them, with an example: what pyfused.fuse is tested on.

Each is (function that makes the model, function that makes its example for a dtype, patterns that must be found in
training). `loss` turns the model's output into a scalar where it is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class MnistTutorial(nn.Module):
    """Functions, the pool before the ReLU, dropout by a flag."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 8, 5)
        self.fc1, self.fc2 = nn.Linear(128, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 128)))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def vgg() -> nn.Module:
    """Sequential in Sequential, in-place ReLU."""
    layers, channels = [], 3
    for width in (8, "pool", 16, 16, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(16 * 16, 10))


class Block(nn.Module):
    """ResNet's basic block: one ReLU module used twice, the second after the addition."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1, self.bn2 = (nn.BatchNorm2d(channels) for _ in range(2)) if norm else (nn.Identity(), nn.Identity())
        self.relu, self.norm = nn.ReLU(inplace=True), norm

    def forward(self, x):
        out = self.conv1(x)
        if self.norm:
            out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        if self.norm:
            out = self.bn2(out)
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, norm: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layers = nn.Sequential(Block(8, norm), Block(8, norm))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, stride=2, padding=1)
        return self.fc(self.layers(x).mean((2, 3)))


class Inception(nn.Module):
    """Branches that are concatenated; one convolution used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.three, self.five = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(3, 4, 5, padding=2),
        )
        self.shared, self.pool = nn.Conv2d(12, 12, 3, padding="same"), nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.cat([F.relu(self.one(x)), self.three(x).relu(), torch.relu(self.five(x))], 1)
        return self.pool(F.relu(self.shared(F.relu(self.shared(x))))).flatten(1)


class UNet(nn.Module):
    """Skip connections: each activation is used twice. Loss per pixel inside."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.bottom = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.criterion = nn.CrossEntropyLoss(ignore_index=3)

    def forward(self, x, target):
        skip = self.down(x)
        x = self.up(self.bottom(self.pool(skip)))
        return self.criterion(self.head(self.last(torch.cat([x, skip], 1)).relu()), target)


class MobileNet(nn.Module):
    """Depthwise and pointwise, ReLU6, strides."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        )

    def forward(self, x):
        return self.body(x)


class Activation(nn.Module):
    """An activation as transformers writes them: a module around a function."""

    def __init__(self, function):
        super().__init__()
        self.act = function

    def forward(self, input):
        return self.act(input)


class Speech(nn.Module):
    """wav2vec2's front end: convolutions of rows with GELU, the first with a norm between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 8, 10, stride=5, bias=False), nn.GroupNorm(8, 8)
        self.second, self.third = nn.Conv1d(8, 12, 3, stride=2), nn.Conv1d(12, 12, 3, padding=1)
        self.activation, self.head = Activation(F.gelu), nn.Linear(12, 5)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        x = self.activation(self.second(x))
        x = F.gelu(self.third(x) + x, approximate="tanh")
        return self.head(x.transpose(1, 2)).mean(1)


class Activations(nn.Module):
    """Every activation, as modules and functions; a residual in place and one that is not."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(6))
        self.silu, self.leaky, self.norm = nn.SiLU(inplace=True), nn.LeakyReLU(0.2), nn.BatchNorm2d(4).eval()

    def forward(self, x):
        x = self.silu(self.norm(self.convs[0](x)))
        x = self.leaky(self.convs[1](x) + x)
        y = self.convs[2](x)
        y += x
        x = F.hardswish(y)
        x = F.relu6(self.convs[3](x))
        x = F.gelu(self.convs[4](x))
        return F.leaky_relu(self.convs[5](x), -0.1).flatten(1)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class FrozenBackbone(nn.Module):
    """BatchNorm kept in eval mode while training, and parameters that need no gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 5))
        self.body[0].requires_grad_(False)
        self.body[1].eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x):
        return self.tail(self.body(x))


class MatrixFactorization(nn.Module):
    """Biases of width 1 and a global one."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(30, 8)
        self.user_bias, self.item_bias = nn.Embedding(20, 1), nn.Embedding(30, 1)
        self.mean = nn.Parameter(torch.tensor(0.5))

    def forward(self, user, item):
        dot = (self.users(user) * self.items(item)).sum(1)
        return dot + self.user_bias(user).squeeze(1) + self.item_bias(item).squeeze(-1) + self.mean


class Ranker(nn.Module):
    """K candidates for every user, or one, by the rank of the argument; softmax loss over them."""

    def __init__(self):
        super().__init__()
        self.user, self.item, self.item_bias = (
            nn.Embedding(20, 8),
            nn.Embedding(30, 8, padding_idx=0),
            nn.Embedding(30, 1, padding_idx=0),
        )

    def forward(self, user, item, target=None):
        rows = self.user(user).unsqueeze(1) if item.dim() == 2 else self.user(user)
        scores = (rows * self.item(item)).sum(-1) + self.item_bias(item).squeeze(-1)
        return scores if target is None else F.cross_entropy(scores, target, label_smoothing=0.1)


class LanguageModel(nn.Module):
    """Head and loss within a forward that does not trace: control flow on values, shifted labels."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(40, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 40)

    def forward(self, tokens, labels=None):
        if tokens.max() >= 40:
            raise ValueError("no such token")
        logits = self.head(self.body(self.embedding(tokens))[0])
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, 40).float(), labels[:, 1:].reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def images(channels: int, size: int):
    def make(dtype):
        g = torch.Generator().manual_seed(0)
        return (torch.randn(4, channels, size, size, generator=g, dtype=torch.float64).to(dtype),)

    return make


def sound(dtype):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(3, 1, 200, generator=g, dtype=torch.float64).to(dtype),)


def integers(*bounds_and_shapes):
    def make(dtype=None):
        g = torch.Generator().manual_seed(0)
        return tuple(torch.randint(bound, shape, generator=g) for bound, shape in bounds_and_shapes)

    return make


def pixels(dtype):
    return (*images(3, 16)(dtype), *integers((4, (4, 16, 16)))())


@dataclass(frozen=True)
class Architecture:
    name: str
    make: type
    example: object
    patterns: tuple[str, ...]


POOLED, CONV, ALONE, DOT = "conv2d + relu + max_pool2d", "conv2d + relu", "conv2d", "embedding dot + bias"
ADDED = "conv2d + add + relu"
LOSS, HEAD = "cross_entropy", "linear + cross_entropy"
ARCHITECTURES = [
    Architecture("mnist tutorial", MnistTutorial, images(1, 28), ("conv2d + max_pool2d + relu",) * 2),
    Architecture("vgg", vgg, images(3, 16), (POOLED, CONV, POOLED)),
    Architecture("resnet", lambda: ResNet(True), images(3, 32), (CONV, *(ALONE,) * 4)),
    Architecture("resnet without norm", lambda: ResNet(False), images(3, 32), (*(CONV,) * 3, *(ADDED,) * 2)),
    Architecture("inception", Inception, images(3, 12), (*(CONV,) * 4, POOLED)),
    Architecture("unet", UNet, pixels, (*(CONV,) * 3, ALONE, LOSS)),
    Architecture("mobilenet", MobileNet, images(3, 16), ("conv2d + relu6", *(CONV,) * 2)),
    Architecture("frozen", FrozenBackbone, images(3, 16), ("conv2d + batch_norm + relu + max_pool2d", CONV)),
    Architecture("matrix factorization", MatrixFactorization, integers((20, (9,)), (30, (9,))), (DOT,)),
    Architecture(
        "ranker", Ranker, integers((20, (9,)), (30, (9, 5)), (5, (9,))), (DOT, LOSS)
    ),
    Architecture("speech", Speech, sound, ("conv1d + gelu", "conv1d + add + gelu")),
    Architecture("activations", Activations, images(3, 12), (
        "conv2d + batch_norm + silu", "conv2d + add + leaky_relu", "conv2d + add + hardswish", "conv2d + relu6",
        "conv2d + gelu", "conv2d + leaky_relu",
    )),
    Architecture("language model", LanguageModel, integers((40, (3, 7)), (40, (3, 7))), (HEAD,)),
]  # fmt: skip


def loss_of(output) -> torch.Tensor:
    """The loss a model returns, or one made of what it returns."""
    if isinstance(output, dict):
        return output["loss"]
    return (
        output
        if output.dim() == 0
        else (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(output)).sum()
    )
