"""`pyfused demo`: the same two models trained with eager PyTorch and with the fused ops, on real data.

Each training runs in a process of its own, so that its peak memory is its own; the processes of a task take turns, one
epoch each and in alternating order, so that a disturbance of the machine hits all of them.
"""

import contextlib
import multiprocessing
import signal
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .train import TASKS, Digits, Movies, steps_per_epoch, train, write_csv

EARLY_STEPS = 10  # rounding differences grow with every step, so eager and fused are compared after these
REPORT_EVERY = 20  # steps between two messages of a training process
COLORS = {"eager": "#79706e", "eager NHWC": "#4c78a8", "fused": "#e45756"}


@dataclass(frozen=True)
class Job:
    """What a training process needs to know."""

    task: str
    contender: str
    data: Path | None
    epochs: int
    seed: int
    threads: int


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
        return statistics.median(row["seconds"] for row in self.rows)


def run_demo(data: Path | None, out: Path, epochs: dict[str, int], seed: int, threads: int, console) -> None:
    """Trains everything, prints the table to the rich `console`, writes CSV files and PNG plots into `out`.

    Raises FileNotFoundError or ValueError if the data cannot be had or read, RuntimeError if a training fails.
    """
    console.print(f"training on {threads} threads; eager runs with the C library's default malloc", highlight=False)
    tasks = [TASKS[name](data) for name in epochs]  # here first: a download must not happen in every process
    results = []
    for task in tasks:
        contenders = COLORS if isinstance(task, Digits) else ("eager", "fused")
        jobs = [Job(task.name, contender, data, epochs[task.name], seed, threads) for contender in contenders]
        results.append((task, compete(jobs, steps_per_epoch(task, task.batch_size), console)))
    out.mkdir(parents=True, exist_ok=True)
    for task, outcomes in results:
        rows = [{"contender": outcome.job.contender} | row for outcome in outcomes for row in outcome.rows]
        write_csv(rows, out / f"{task.name}.csv")
    write_csv([summary(outcome, outcomes[0]) for _, outcomes in results for outcome in outcomes], out / "summary.csv")
    plot_curves(results, out / "curves.png")
    console.print(table(results))
    time_kernels(out, threads, console)
    console.print(f"curves, summary, kernel timings and plots are in {out}", highlight=False)


def compete(jobs: Sequence[Job], epoch_steps: int, console) -> list[Outcome]:
    """Runs the jobs, one process each, an epoch at a time in turns."""
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
            total = job.epochs * epoch_steps
            bars.append(progress.add_task(f"{job.task}, {job.contender}", total=total, start=False))
            processes.append(process)
            pipes.append(pipe)
        for epoch in range(jobs[0].epochs):
            for k in list(range(len(jobs)))[:: -1 if epoch % 2 else 1]:
                progress.start_task(bars[k])
                take_turn(outcomes[k], pipes[k], lambda steps, k=k: progress.update(bars[k], completed=steps))
                progress.update(bars[k], completed=(epoch + 1) * epoch_steps)
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
        task = TASKS[job.task](job.data)
        model = task.model(job.contender == "fused", job.seed)
        if "NHWC" in job.contender:
            model.to(memory_format=torch.channels_last)
        rows = train(task, model, epochs=job.epochs, seed=job.seed, on_step=on_step)
        reset_peak_memory()
        with contextlib.suppress(EOFError, BrokenPipeError):  # the demo is done, or was stopped
            while pipe.recv():
                pipe.send(("epoch", (next(rows), peak_memory())))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def reset_peak_memory() -> None:
    """From here on the peak is what training needs, not what reading the files needed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes this process had resident. On Linux not ru_maxrss: that is inherited from the parent process."""
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
        **{metric: last.get(metric) for metric in ("accuracy", "hr@10", "ndcg@10")},
        "seconds_per_epoch": outcome.epoch_seconds,
        "speed_up": eager.epoch_seconds / outcome.epoch_seconds,
        "peak_mib": outcome.peak / 2**20,
        "early_difference": max(differences, default=None),
        "epochs": job.epochs,
        "seed": job.seed,
        "threads": job.threads,
        "torch": torch.__version__,
    }


Results = list[tuple[Digits | Movies, list[Outcome]]]


def table(results: Results):
    """The table that the demo prints."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = (
        "s/epoch: median, training only. MiB: the most the whole process had resident (Python, PyTorch, data, model, "
        f"activations). differs: the largest difference of any parameter from eager's after {EARLY_STEPS} Adam steps."
    )
    layout = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "caption": caption}  # fits a terminal of 80 columns
    result = Table("model", "run", title="eager PyTorch and pyfused on real data, same seed", **layout)
    for name in ("accuracy", "HR@10", "NDCG@10", "s/epoch", "speed-up", "MiB", "differs"):
        result.add_column(name, justify="right", no_wrap=True)
    for task, outcomes in results:
        label = "MNIST CNN" if isinstance(task, Digits) else "MovieLens"
        for outcome in outcomes:
            row = summary(outcome, outcomes[0])
            result.add_row(
                label if outcome is outcomes[0] else "",
                outcome.job.contender,
                *("" if row[m] is None else f"{row[m]:.4f}" for m in ("accuracy", "hr@10", "ndcg@10")),
                f"{row['seconds_per_epoch']:.2f}",
                f"{row['speed_up']:.2f}x",
                f"{row['peak_mib']:.0f}",
                f"{row['early_difference']:.1e}" if row["early_difference"] else "",  # eager's own is 0
            )
        if isinstance(task, Movies):
            result.add_row("", "popularity", "", *(f"{value:.4f}" for value in task.popularity().values()))
        result.add_section()
    return result


def plot_curves(results: Results, path: Path) -> None:
    """Loss by epoch (the curves should coincide) and quality by training time (they should not)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6 * len(results)), layout="constrained")
    for (task, outcomes), (left, right) in zip(results, figure.subplots(len(results), 2, squeeze=False), strict=True):
        metric = task.metrics[-1]
        for outcome in outcomes:
            style = {"label": outcome.job.contender, "color": COLORS[outcome.job.contender], "marker": "o"}
            style["linestyle"] = "-" if outcome.job.contender == "fused" else "--"
            epochs = [row["epoch"] for row in outcome.rows]
            seconds = list(accumulate(row["seconds"] for row in outcome.rows))
            left.plot(epochs, [row["loss"] for row in outcome.rows], **style)
            right.plot(seconds, [row[metric] for row in outcome.rows], **style)
        left.set(title=task.name, xlabel="epoch", ylabel="training loss")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set(title=f"{task.name}, test split", xlabel="seconds of training", ylabel=metric)
        if isinstance(task, Movies):
            right.axhline(task.popularity()[metric], color="black", linewidth=0.8, label="popularity")
        right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def time_kernels(out: Path, threads: int, console) -> None:
    """Times every op, eager and fused, with the benchmark's quick cases; writes kernels.csv and kernels.png."""
    from .bench import harness, report

    torch.set_num_threads(threads)
    with console.status("timing the ops") as status:
        rows = harness.compare(quick=True, announce=status.update)
    (out / "kernels.csv").unlink(missing_ok=True)  # the benchmark's files grow; a demo's rows replace the last demo's
    report.write_csv(rows, out / "kernels.csv")
    report.plot_speedups(rows, out / "kernels.png")
