"""The command line: pyfused info | check | bench | train | demo (also python -m pyfused)."""

import contextlib
import platform
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__, _binary, dispatch

app = typer.Typer(
    help="Fused kernels for PyTorch: convolution + ReLU (+ max-pool), softmax-cross-entropy, embedding dot product.\n\n"
    "Start with [bold]pyfused demo[/]: it trains two models on real data, with and without the fused kernels.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()
DATA_HELP = "Folder with the data (MNIST IDX files; u.data, ratings.csv or .inter). Without it: cache, or download."
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
Data = Annotated[Path | None, typer.Option(help=DATA_HELP, show_default=False)]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's default.")]
Seed = Annotated[int, typer.Option(help="Of the initial parameters, the order of examples and the negatives.")]


class Task(str, Enum):
    cnn = "cnn"
    recommender = "recommender"


def main() -> None:
    app()


@app.command()
def info() -> None:
    """Show versions, how the package was built, and which backend can run which op, or why not."""
    from .check import CHECKS, dtypes_taken

    build = _binary._C.build_info() if _binary._C else {}
    build |= {"instruction set in use": _binary._C.isa()} if _binary._C else {}
    facts = {"pyfused": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"machine": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads()}
    for key, value in (facts | {f"build: {key}": value for key, value in build.items()}).items():
        console.print(f"{key:32} {value}", highlight=False)
    for backend, reason in dispatch.available_backends().items():
        state = f"[yellow]no: {escape(reason)}[/]" if reason else "[green]usable[/]"
        console.print(f"{'backend ' + backend:32} {state}", highlight=False)
    usable = [backend for backend, reason in dispatch.available_backends().items() if reason is None]
    table = Table("op", *usable, title="dtypes that each backend trains in")
    for op in dict.fromkeys(check.op for check in CHECKS):
        taken = (" ".join(SHORT[dtype] for dtype in dtypes_taken(op, backend)) for backend in usable)
        table.add_row(op, *(names or "-" for names in taken))
    console.print(table)


@app.command()
def check() -> None:
    """Check every op on this machine, forward and backward, against float64. Exit status 1 if anything is wrong."""
    from .check import DTYPES, run_checks

    titles = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = Table("op", "backend", *titles, title="largest error relative to the largest value")
    problems = []
    for findings in run_checks():
        table.add_row(findings[0].op, findings[0].backend, *map(cell, findings))
        problems += [finding for finding in findings if finding.problem]
    console.print(table)
    by_problem = {}
    for finding in problems:
        by_problem.setdefault((finding.op, finding.backend, finding.problem), []).append(SHORT[finding.dtype])
    for (op, backend, problem), dtypes in by_problem.items():
        console.print(f"[red]wrong:[/] {op}, {backend}, {' '.join(dtypes)}: {escape(problem)}", highlight=False)
    for backend, reason in dispatch.available_backends().items():
        if reason:
            console.print(f"not checked: {backend}: {reason}", highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print("[green]all results are as exact as eager PyTorch's[/]")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Race eager PyTorch, torch.compile and pyfused, op by op ([bold]pyfused bench --help[/] for the options)."""
    from .bench.__main__ import main as run_bench

    command = typer.Typer(add_completion=False)
    command.command()(run_bench)
    command(context.args, prog_name="pyfused bench")


@app.command()
def train(
    task: Annotated[Task, typer.Argument(help="cnn: MNIST digits; recommender: MovieLens films.")],
    data: Data = None,
    fused: Annotated[bool, typer.Option("--fused/--eager", help="Fused ops, or plain eager PyTorch.")] = True,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 5 (cnn), 10 (recommender).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 64 (cnn), 512 (recommender).")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Initial learning rate. Default: 0.001, 0.005.")] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the curves (CSV) and the trained parameters (.pt).")
    ] = None,
) -> None:
    """Train one model on real data and print its test results after every epoch."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .train import TASKS, steps_per_epoch, write_csv
    from .train import train as run

    torch.set_num_threads(threads or torch.get_num_threads())
    with readable_errors():
        job = TASKS[task.value](data)
        if hasattr(job, "popularity"):
            console.print(f"for comparison, popularity: {describe(job.popularity())}", highlight=False)
        model = job.model(fused, seed)
        total = (epochs or job.epochs) * steps_per_epoch(job, batch_size or job.batch_size)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        rows = []
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"{task.value}, {'fused' if fused else 'eager'}", total=total)
            options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
            for row in run(job, model, **options, on_step=lambda step: progress.update(bar, completed=step)):
                progress.console.print(describe(row), highlight=False)
                rows.append(row)
    if out:
        stem = f"{task.value}-{'fused' if fused else 'eager'}"
        write_csv(rows, out / f"{stem}.csv")
        torch.save(model.state_dict(), out / f"{stem}.pt")
        console.print(f"curves and parameters are in {out / stem}.csv and .pt", highlight=False)


@app.command()
def demo(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder for the plots (PNG) and tables (CSV).")] = Path("pyfused-demo"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of both models. Default: 5 (cnn), 10 (recommender).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch of each: a minute or two.")] = False,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train a CNN (MNIST) and a recommender (MovieLens), eager and fused, and compare: under 10 minutes on 2 cores."""
    from .demo import run_demo
    from .train import TASKS

    lengths = {name: 1 if quick else epochs or task.epochs for name, task in TASKS.items()}
    with readable_errors():
        run_demo(data, out, lengths, seed, threads or torch.get_num_threads(), console)


def cell(finding) -> str:
    if finding.problem:
        return f"[red]{finding.error:.1e}[/]"
    return f"[green]{finding.error:.1e}[/]" if finding.error >= 0 else "-"


def describe(row: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in row.items())


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Data that cannot be had or read is the user's business, not a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
