"""Bytes of a text, each guessed from those before it, by a small GPT."""

import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import GPT
from .task import Classification, Task

TEST_SHARE = 0.1
TEST_WINDOWS = 200


class Text(Task):
    """A byte-level language model of one file; by default of the manual that comes with Python, half a megabyte.

    An example is a window of `context` bytes; the last tenth of the text is the test.
    """

    name, network, metrics = "gpt", GPT, ("bits per byte",)
    epochs, batch_size, lr = 3, 16, 1e-3
    context, dim, layers, heads = 128, 128, 4, 4

    def __init__(self, folder: str | Path | None = None):
        path = Path(pydoc_data.topics.__file__) if folder is None else Path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no text file (--data FILE)")
        text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        end = int(len(text) * (1 - TEST_SHARE))
        if len(text) - end <= self.context:
            raise ValueError(f"{path} has {len(text)} bytes, too few for windows of {self.context} in its last tenth")
        self.train, self.test = (self.windows(part) for part in (text[:end], text[end:]))
        self.size = len(self.train)

    def windows(self, text: Tensor) -> Tensor:
        """[N, context + 1]: each window's last byte is the next one's first."""
        return text.unfold(0, self.context + 1, self.context)

    def arguments(self) -> dict:
        return {"vocabulary": 256, "context": self.context, "dim": self.dim, "layers": self.layers, "heads": self.heads}

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        return NextToken(model)

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        windows = self.train[rows[own]]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device, step = next(model.parameters()).device, NextToken(model)
        windows = self.test[:TEST_WINDOWS].to(device)
        losses = [step(part[:, :-1], part[:, 1:]).item() * len(part) for part in windows.split(self.batch_size)]
        return {"bits per byte": sum(losses) / len(windows) / torch.log(torch.tensor(2.0)).item()}


class NextToken(Classification):
    """Cross-entropy of all positions alike."""

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        return self.criterion(self.model(tokens).flatten(0, 1), following.flatten())
