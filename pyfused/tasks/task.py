"""What the training loop asks of a task, and what classification tasks have in common."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

EVALUATION_BATCH = 128


class Task(Dataset):
    """A model, its data and its defaults. As a Dataset, task[rows, own, seed] is a batch, so that workers can make it.

    network: the model's class, and `arguments()` what it is made with.
    settings: what the task was made with, the data aside; a checkpoint keeps them.
    size: how many training examples there are.
    metrics: what `evaluate` returns, the most telling last.
    epochs, batch_size, lr, weight_decay: defaults.
    """

    name: str
    network: type[nn.Module]
    metrics: tuple[str, ...]
    size: int
    epochs: int
    batch_size: int
    lr = 1e-3
    weight_decay = 0.0
    settings: Mapping[str, object] = {}

    def arguments(self) -> dict:
        return {}

    def model(self, seed: int = 0) -> nn.Module:
        """An untrained model."""
        torch.manual_seed(seed)
        return self.network(**self.arguments())

    def step(self, model: nn.Module, fused: bool) -> nn.Module:
        """The module whose forward takes a batch and returns the loss, a mean over the batch's examples.

        One module, so that torch.compile, pyfused.fuse and DistributedDataParallel see all that a step does. `fused`:
        use the fused functions that pyfused.fuse does not find.
        """
        raise NotImplementedError

    def batch(self, rows: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The examples rows[own]; what is random depends on `rows` and `generator`, not on who owns what."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics on the test split."""
        raise NotImplementedError

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of what needs no training, by name."""
        return {}

    def about(self) -> dict:
        """What whoever uses a checkpoint must know of the data, e.g. the names of the classes."""
        return {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, plan: tuple[Tensor, slice, int]) -> tuple[Tensor, ...]:
        rows, own, seed = plan
        return self.batch(rows, own, torch.Generator().manual_seed(seed))


class Classification(nn.Module):
    """Softmax cross-entropy; labels are indices [N] or, e.g. of mixed images, shares [N, C]."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.model(inputs), labels)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of the inputs whose largest logit is that of their label."""
    device = next(model.parameters()).device
    right = total = 0
    for inputs, labels in batches:
        right += (model(inputs.to(device)).argmax(1).cpu() == labels).sum().item()
        total += len(labels)
    return right / total
