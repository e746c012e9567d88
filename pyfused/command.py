"""What `pyfused train` does around the loop: processes, progress bars, files."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from . import compare as comparison
from . import curves
from .tasks import Task, make_task
from .train import Options, describe, rank, steps_per_epoch, write_csv
from .train import train as run


def train(name: str, data: Path | None, settings: dict, options: dict, out: Path | None, resume: bool, console) -> None:
    """`pyfused train NAME`. Raises what make_task and train raise, ValueError for --resume without --out."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the checkpoint")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with processes(options):
        console.quiet = rank() > 0
        task = first_alone(name, data, settings)
        how = Options.of(task, **options)
        for label, metrics in task.baselines().items():
            console.print(f"for comparison, {label}: {describe(metrics)}", highlight=False)
        stem = out / f"{name}-{how.mode}" if out else None
        file, rows = stem and stem.with_suffix(".pt"), []
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"{name}, {how.mode}", total=how.epochs * steps_per_epoch(task, how))
            rest = {"file": file, "resume": resume, "on_step": lambda steps: progress.update(bar, completed=steps)}
            for row in run(task, task.model(how.seed), how, **rest):
                console.print(describe(row), highlight=False)
                rows.append(row)
                if stem and rank() == 0:  # after every epoch: who stops early has them
                    write_csv(rows, stem.with_suffix(".csv"))
                    curves.plot([(task, {how.mode: rows})], stem.with_suffix(".png"))
        if stem:
            console.print(f"checkpoint and curves are in {stem}.pt, .csv and .png", highlight=False)


def compare(
    name: str, data: Path | None, settings: dict, options: dict, out: Path | None, resume: bool, console
) -> None:
    """`pyfused train NAME --compare`."""
    if resume:
        raise ValueError("--compare trains from the start; it goes without --resume")
    task = make_task(name, data, **settings)
    how, threads = Options.of(task, **options), torch.get_num_threads()
    outcomes = comparison.compare(task, data, how, threads, console)
    console.print(comparison.table(task, outcomes))
    if out:
        comparison.write_rows(outcomes, out / f"train-{name}.csv")
        curves.plot([(task, {outcome.job.contender: outcome.rows for outcome in outcomes})], out / f"train-{name}.png")
        console.print(f"rows and curves are in {out / f'train-{name}'}.csv and .png", highlight=False)


@contextlib.contextmanager
def processes(options: dict) -> Iterator[None]:
    """Under torchrun, joins the group of processes; each takes the GPU of its number."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpu = options["device"] == "cuda"
    if on_gpu:
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options["device"])
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        gc.collect()  # DistributedDataParallel goes before its group: after it, it now and then waits for ever
        dist.destroy_process_group()


def first_alone(name: str, data: Path | None, settings: dict) -> Task:
    """The task; where there are several processes the first makes it first, for it may download."""
    if rank() > 0:
        dist.barrier()
    task = make_task(name, data, **settings)
    if dist.is_initialized() and rank() == 0:
        dist.barrier()
    return task
