"""`pyfused demo`: two models trained with eager PyTorch and with the fused ops, on real data, and the ops timed."""

from pathlib import Path

import torch

from . import curves
from .compare import compare, summary, table, write_rows
from .tasks import make_task
from .train import Options, write_csv

EPOCHS = {"mnist-cnn": 5, "bpr": 10}
QUICK = {"mnist-cnn": 1, "bpr": 2}  # as few as beat popularity
CONTENDERS = ("eager", "eager NHWC", "fused")


def run_demo(data: Path | None, out: Path, epochs: dict[str, int], seed: int, threads: int, console) -> None:
    """Trains everything, prints tables to the rich `console`, writes CSV files and PNG plots into `out`.

    Raises FileNotFoundError or ValueError if the data cannot be had or read, RuntimeError if a training fails.
    """
    console.print(f"training on {threads} threads; eager runs with the C library's default malloc", highlight=False)
    tasks = [make_task(name, data) for name in epochs]  # here first: a download must not happen in every process
    results = []
    for task in tasks:
        options = Options.of(task, epochs=epochs[task.name], seed=seed)
        results.append((task, compare(task, data, options, threads, console, CONTENDERS)))
    out.mkdir(parents=True, exist_ok=True)
    for task, outcomes in results:
        write_rows(outcomes, out / f"{task.name}.csv")
        write_csv([summary(outcome, outcomes[0]) for outcome in outcomes], out / f"{task.name}-summary.csv")
        console.print(table(task, outcomes))
    runs = [(task, {outcome.job.contender: outcome.rows for outcome in outcomes}) for task, outcomes in results]
    curves.plot(runs, out / "curves.png")
    time_kernels(out, threads, console)
    console.print(f"curves, summaries, kernel timings and plots are in {out}", highlight=False)


def time_kernels(out: Path, threads: int, console) -> None:
    """Times every op, eager and fused, with the benchmark's quick cases; writes kernels.csv and kernels.png."""
    try:
        from .bench import harness, report
    except ModuleNotFoundError:
        console.print("the ops are timed by an installed pyfused, or by python -m bench in a checkout")
        return
    torch.set_num_threads(threads)
    with console.status("timing the ops") as status:
        rows = harness.compare(quick=True, announce=status.update)
    (out / "kernels.csv").unlink(missing_ok=True)  # the benchmark's files grow; a demo's rows replace the last demo's
    report.write_csv(rows, out / "kernels.csv")
    report.plot_speedups(rows, out / "kernels.png")
