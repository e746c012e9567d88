"""One training loop for every task: eager, compiled or fused, in one process or in several under torchrun.

task = TASKS["mnist-cnn"]()
for row in train(task, task.model(), Options.of(task, mode="fused")): print(row)
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from . import checkpoint, fusion, optim
from .tasks import Task

FINAL_LR = 0.02  # of the initial learning rate
MODES = ("eager", "compile", "fused")
PRECISIONS = ("float32", "bfloat16", "float16")
ANY_VALUE = {"device", "workers"}  # options that a resumed run may change


@dataclass(frozen=True)
class Options:
    """How to train. `batch_size` is one process's.

    mode: "eager", "compile" (torch.compile) or "fused" (pyfused.fuse). channels_last: memory format of images and
    convolutions. precision: float32, or what autocast computes in; float16 with a gradient scaler. workers: processes
    that make batches. step_in_backward: pyfused.optim.Adam steps within the backward, for MatrixFactorization.
    """

    epochs: int
    batch_size: int
    lr: float
    mode: str = "fused"
    channels_last: bool = True
    precision: str = "float32"
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    step_in_backward: bool = False

    @classmethod
    def of(cls, task: Task, **given) -> "Options":
        """The task's defaults, but for what is given and not None."""
        defaults = {"epochs": task.epochs, "batch_size": task.batch_size, "lr": task.lr}
        return cls(**defaults | {name: value for name, value in given.items() if value is not None})

    def autocast(self) -> torch.autocast:
        kind, reduced = torch.device(self.device).type, self.precision != "float32"
        return torch.autocast(kind, getattr(torch, self.precision) if reduced else None, enabled=reduced)


def train(
    task: Task,
    model: nn.Module,
    options: Options,
    *,
    file: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Iterator[dict[str, float]]:
    """Trains `model` with Adam and a linear decay of the learning rate; yields a row of results after every epoch.

    All that is random depends on options.seed and the epoch, so two models that start from the same parameters see the
    same batches. After every epoch a checkpoint goes to `file`. `resume` begins with the one that is there, yields the
    rows it holds, and on the CPU ends where an uninterrupted run would, to the last bit. `on_step` gets the number of
    steps done so far.

    A row has: epoch, loss (mean over the epoch), seconds (of training; evaluation is not in it), lr (of the last
    step), and what task.evaluate returns.

    Raises ValueError for options that do not go together, FileNotFoundError or ValueError for a checkpoint that is
    missing or of another run.
    """
    step, optimizer = prepare(task, model, options)
    epoch_steps = steps_per_epoch(task, options)
    schedule = LambdaLR(optimizer, lambda step: 1 - (1 - FINAL_LR) * step / (epoch_steps * options.epochs))
    scaler = torch.amp.GradScaler(torch.device(options.device).type, enabled=options.precision == "float16")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    rows = restore(task, options, parts, file) if resume else []
    yield from rows
    for epoch in range(len(rows) + 1, options.epochs + 1):
        model.train()
        total, started = torch.zeros((), dtype=torch.float64, device=options.device), time.perf_counter()
        for number, (weight, size, batch) in enumerate(batches(task, options, epoch), (epoch - 1) * epoch_steps + 1):
            optimizer.zero_grad()
            with options.autocast():
                loss = weight * step(*batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += loss.detach() * size
            on_step(number)
        if world_size() > 1:
            dist.all_reduce(total)
        row = {"epoch": epoch, "loss": total.item() / world_size() / task.size}
        row |= {"seconds": time.perf_counter() - started, "lr": schedule.get_last_lr()[0]}
        model.eval()
        with torch.no_grad():
            rows.append(row | task.evaluate(model))
        if file is not None and rank() == 0:
            checkpoint.save(state_of(task, options, parts, rows), file)
        yield rows[-1]


def prepare(task: Task, model: nn.Module, options: Options) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module that a training step calls, which holds `model`, and the optimizer."""
    model.to(options.device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    if options.step_in_backward:
        if not hasattr(model, "optimizer") or options.precision == "float16" or world_size() > 1:
            raise ValueError("step_in_backward is for mf and bpr, in one process, not in float16")
        optimizer = model.optimizer = optim.Adam(model.parameters(), options.lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=task.weight_decay)
    step = task.step(model, options.mode == "fused")
    if options.mode == "fused" and not options.step_in_backward:
        _, _, example = next(batches(task, options, 1))
        with options.autocast():
            fusion.fuse(step, example, verbose=False)
    if options.mode == "compile":
        step = torch.compile(step)
    return (DistributedDataParallel(step) if world_size() > 1 else step), optimizer


def batches(task: Task, options: Options, epoch: int) -> Iterator[tuple[float, int, tuple[Tensor, ...]]]:
    """(weight of its loss, examples of all processes, this process's part) of every batch of an epoch.

    DistributedDataParallel takes the plain mean over processes; a weight makes it the mean over examples where the last
    batch does not split evenly. A process that gets nothing of it takes part with an example of weight 0.
    """
    generator = torch.Generator().manual_seed((options.seed << 20) + epoch)
    torch.manual_seed(torch.randint(2**62, (), generator=generator).item() + rank())  # dropout
    parts = torch.randperm(task.size, generator=generator).split(options.batch_size * world_size())
    seeds = torch.randint(2**62, (len(parts),), generator=generator).tolist()
    first, end = ([len(rows) * r // world_size() for rows in parts] for r in (rank(), rank() + 1))
    plans = [(rows, slice(a, b) if a < b else slice(1), seed) for rows, a, b, seed in zip(parts, first, end, seeds)]
    loader = DataLoader(task, None, sampler=plans, num_workers=options.workers, generator=generator)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    for rows, a, b, batch in zip(parts, first, end, loader):
        batch = tuple(
            x.to(options.device, memory_format=layout if x.dim() == 4 else torch.preserve_format) for x in batch
        )
        yield (b - a) * world_size() / len(rows), len(rows), batch


def steps_per_epoch(task: Task, options: Options) -> int:
    return math.ceil(task.size / (options.batch_size * world_size()))


def state_of(task: Task, options: Options, parts: dict, rows: list[dict]) -> dict:
    """A checkpoint: what `restore` and `checkpoint.load_model` need."""
    state = {"format": checkpoint.FORMAT, "task": task.name, "settings": task.settings, "options": asdict(options)}
    state |= {"world_size": world_size(), "arguments": task.arguments(), "about": task.about(), "rows": rows}
    return state | {name: part.state_dict() for name, part in parts.items()}


def restore(task: Task, options: Options, parts: dict, file: Path) -> list[dict]:
    """Puts a checkpoint into `parts`; returns its rows."""
    state = checkpoint.load(file)
    now = {"task": task.name, "world_size": world_size(), **task.settings, **asdict(options)}
    then = {"task": state["task"], "world_size": state["world_size"], **state["settings"], **state["options"]}
    differing = [k for k in now | then if k not in ANY_VALUE and now.get(k) != then.get(k)]
    if differing:
        text = ", ".join(f"{k} {then.get(k)} (now {now.get(k)})" for k in differing)
        raise ValueError(f"{file} is of another run: it has {text}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["rows"]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def describe(row: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in row.items())


def write_csv(rows: Iterable[dict], path: Path) -> None:
    """Writes rows that have the same keys, with a header."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
