"""The same training by several contenders from one seed: time, memory, quality (`pyfused train --compare`, the demo).

Each training runs in a process of its own, so that its peak memory is its own; the processes of a task take turns, one
epoch each and in alternating order, so that a disturbance of the machine hits all of them.
"""

import contextlib
import multiprocessing
import signal
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from .tasks import TASKS, Task, make_task
from .train import Options, describe, steps_per_epoch, train, write_csv

EARLY_STEPS = 10  # rounding differences grow with every step, so eager and the others are compared after these
REPORT_EVERY = 20  # steps between two messages of a training process
CONTENDERS = {  # what of the options each changes
    "eager": {"mode": "eager", "channels_last": False},
    "eager NHWC": {"mode": "eager", "channels_last": True},
    "compile": {"mode": "compile", "channels_last": False},
    "compile NHWC": {"mode": "compile", "channels_last": True},
    "fused": {"mode": "fused", "channels_last": True},
}


@dataclass(frozen=True)
class Job:
    """What a training process needs to know. settings: what else the task is made with."""

    task: str
    contender: str
    data: Path | None
    options: Options
    threads: int
    settings: dict = field(default_factory=dict)


@dataclass
class Outcome:
    """What a training process measured. peak: bytes resident at the worst moment of training and evaluation, the whole
    process: Python, PyTorch, data, model, activations. early: the parameters after EARLY_STEPS steps."""

    job: Job
    rows: list[dict] = field(default_factory=list)
    peak: int = 0
    early: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def epoch_seconds(self) -> float:
        """Median, without the first epoch if there are others: torch.compile's work is in it."""
        return statistics.median(row["seconds"] for row in self.rows[1:] or self.rows)


def compare(task: Task, data: Path | None, options: Options, threads: int, console, contenders=None) -> list[Outcome]:
    """Trains with every contender, or those named; memory formats are told apart where there are convolutions only.

    Raises RuntimeError if a training fails.
    """
    layouts = any(isinstance(module, nn.Conv2d) for module in task.model().modules())
    names = [name for name in contenders or CONTENDERS if layouts or "NHWC" not in name]
    jobs = [
        Job(task.name, name, data, replace(options, **CONTENDERS[name]), threads, dict(task.settings)) for name in names
    ]
    return compete(jobs, steps_per_epoch(task, options), console)


def compete(jobs: Sequence[Job], epoch_steps: int, console) -> list[Outcome]:
    """Runs the jobs, one process each, an epoch at a time in turns. Prints what each epoch gave when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    outcomes, processes, pipes, bars = [Outcome(job) for job in jobs], [], [], []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console))
        for job in jobs:
            pipe, far_end = context.Pipe()
            process = context.Process(target=work, args=(job, far_end), daemon=True)
            process.start()
            far_end.close()  # so that the pipe ends when the process does
            stack.callback(process.terminate)
            total = job.options.epochs * epoch_steps
            bars.append(progress.add_task(f"{job.task}, {job.contender}", total=total, start=False))
            processes.append(process)
            pipes.append(pipe)
        for epoch in range(jobs[0].options.epochs):
            for k in list(range(len(jobs)))[:: -1 if epoch % 2 else 1]:
                progress.start_task(bars[k])
                if epoch == 0:  # with what comes before it: fuse's measurements, torch.compile's work
                    console.print(f"{jobs[k].task}, {jobs[k].contender}: begins", highlight=False)
                take_turn(outcomes[k], pipes[k], lambda steps, k=k: progress.update(bars[k], completed=steps))
                progress.update(bars[k], completed=(epoch + 1) * epoch_steps)
                done = f"{jobs[k].task}, {jobs[k].contender}: {describe(outcomes[k].rows[-1])}"
                console.print(done, highlight=False, soft_wrap=True)
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()
            process.join()
    return outcomes


def take_turn(outcome: Outcome, pipe: Connection, on_step: Callable[[int], object]) -> None:
    """Lets a process train one epoch and takes what it reports."""
    name = f"{outcome.job.task}, {outcome.job.contender}"
    try:
        pipe.send("train an epoch")
        while True:
            kind, value = pipe.recv()
            if kind == "step":
                on_step(value)
            elif kind == "early":
                outcome.early = {key: torch.from_numpy(array) for key, array in value.items()}
            elif kind == "error":
                raise RuntimeError(f"{name}: training failed:\n{value}")
            else:
                row, outcome.peak = value
                outcome.rows.append(row)
                return
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"{name}: the training process died") from error


def work(job: Job, pipe: Connection) -> None:
    """A training process: one epoch for each message, until the pipe is closed."""

    def on_step(step: int) -> None:
        if step == EARLY_STEPS:
            pipe.send(("early", {key: value.numpy().copy() for key, value in model.state_dict().items()}))
        if step % REPORT_EVERY == 0:
            pipe.send(("step", step))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's to handle: it ends its processes
    try:
        torch.set_num_threads(job.threads)
        task = make_task(job.task, job.data, **job.settings)
        model = task.model(job.options.seed)
        rows = train(task, model, job.options, on_step=on_step)
        reset_peak_memory()
        with contextlib.suppress(EOFError, BrokenPipeError):  # the demo is done, or was stopped
            while pipe.recv():
                pipe.send(("epoch", (next(rows), peak_memory(job.options.device))))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def reset_peak_memory() -> None:
    """From here on the peak is what training needs, not what reading the files needed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str = "cpu") -> int:
    """Most bytes this process had resident, or allocated on a GPU. On Linux not ru_maxrss: the parent's counts too."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def summary(outcome: Outcome, eager: Outcome) -> dict:
    """One row of the table; `eager` is the run to compare with. early_difference is None if training was too short."""
    job, last = outcome.job, outcome.rows[-1]
    differences = [(value - eager.early[key]).abs().max().item() for key, value in outcome.early.items()]
    return {
        "task": job.task,
        "contender": job.contender,
        **{metric: last[metric] for metric in TASKS[job.task].metrics},
        "seconds_per_epoch": outcome.epoch_seconds,
        "speed_up": eager.epoch_seconds / outcome.epoch_seconds,
        "peak_mib": outcome.peak / 2**20,
        "early_difference": max(differences, default=None),
        **{name: asdict(job.options)[name] for name in ("epochs", "batch_size", "precision", "seed")},
        "threads": job.threads,
        "torch": torch.__version__,
    }


def table(task: Task, outcomes: Sequence[Outcome]):
    """The rich table of one task's outcomes, the first of which is what the others are compared with."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = (
        "s/epoch: median after the first epoch, training only. MiB: the most the whole process had resident (Python, "
        "PyTorch, data, model, activations). differs: the largest difference of any parameter from eager's after "
        f"{EARLY_STEPS} Adam steps."
    )
    title = f"{task.name}: the same training, seed {outcomes[0].job.options.seed}"
    result = Table("run", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)  # 80 columns suffice
    for name in (*task.metrics, "s/epoch", "speed-up", "MiB", "differs"):
        result.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        row = summary(outcome, outcomes[0])
        result.add_row(
            outcome.job.contender,
            *(f"{row[metric]:.4f}" for metric in task.metrics),
            f"{row['seconds_per_epoch']:.2f}",
            f"{row['speed_up']:.2f}x",
            f"{row['peak_mib']:.0f}",
            f"{row['early_difference']:.1e}" if row["early_difference"] else "",  # eager's own is 0
        )
    for name, metrics in task.baselines().items():
        result.add_row(name, *(f"{metrics[m]:.4f}" if m in metrics else "" for m in task.metrics))
    return result


def write_rows(outcomes: Sequence[Outcome], path: Path) -> None:
    """A row for every epoch of every contender, with what the run as a whole gave."""
    write_csv([summary(o, outcomes[0]) | row for o in outcomes for row in o.rows], path)
