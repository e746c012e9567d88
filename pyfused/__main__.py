"""The command line: pyfused info | check | bench | train | recommend | demo (also python -m pyfused)."""

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
DATA_HELP = (
    "Where the data is: a folder with MNIST IDX files, with u.data, ratings.csv or .inter, or with train_data/ and "
    "test_data/CLASS/*.jpg (or CLASS/*.jpg); for gpt a text file. Without it: cache, or download."
)
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
Data = Annotated[Path | None, typer.Option(help=DATA_HELP, show_default=False)]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's default.")]
Seed = Annotated[int, typer.Option(help="Of the initial parameters, the order of examples and the negatives.")]


class Model(str, Enum):
    small_cnn = "small-cnn"
    mnist_cnn = "mnist-cnn"
    image_folder = "image-folder"
    photo_cnn = "photo-cnn"
    dot_concat = "dot-concat"
    mf = "mf"
    bpr = "bpr"
    two_tower = "two-tower"
    gpt = "gpt"


class Mode(str, Enum):
    eager = "eager"
    compile = "compile"
    fused = "fused"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Split(str, Enum):
    last = "last"
    random = "random"


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
    try:
        from .bench.__main__ import main as run_bench
    except ModuleNotFoundError:
        console.print("error: pyfused.bench exists once the package is installed; in a checkout: python -m bench")
        raise typer.Exit(1) from None
    command = typer.Typer(add_completion=False)
    command.command()(run_bench)
    command(context.args, prog_name="pyfused bench")


@app.command()
def train(
    model: Annotated[Model, typer.Argument(help="Each with its data, real and fetched unless --data names others.")],
    data: Data = None,
    mode: Annotated[Mode, typer.Option(help="Plain PyTorch, torch.compile, or pyfused.fuse.")] = Mode.fused,
    compare: Annotated[bool, typer.Option("--compare", help="All modes, one seed: time, memory, quality.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the model's, as for the next two.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of each process.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Initial learning rate; it falls linearly to 2%.")] = None,
    precision: Annotated[Precision, typer.Option(help="16 bits: autocast.")] = Precision.float32,
    channels_last: Annotated[
        bool | None, typer.Option(help="Memory format of convolutions. Default: if fused.", show_default=False)
    ] = None,
    step_in_backward: Annotated[
        bool, typer.Option("--step-in-backward", help="mf, bpr: pyfused.optim.Adam, no gradients of tables.")
    ] = False,
    fold: Annotated[int | None, typer.Option(min=0, max=4, help="Photos, mf, dot-concat: test fold.")] = None,
    split: Annotated[Split | None, typer.Option(help="bpr, two-tower: what is held out.", show_default="last")] = None,
    known_negatives: Annotated[
        bool | None, typer.Option("--known-negatives", help="two-tower: also items that the user has seen.")
    ] = None,
    augment: Annotated[bool | None, typer.Option("--augment", help="Photos: crops, flips, mixtures.")] = None,
    skip_bad: Annotated[bool | None, typer.Option("--skip-bad", help="Photos: skip unusable files.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode.")] = 0,
    seed: Seed = 0,
    threads: Threads = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoint (.pt) and the curves.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the checkpoint in --out.")] = False,
) -> None:
    """Train a model; print its test results after every epoch. For several processes: torchrun -m pyfused train."""
    from . import command

    settings = {"fold": fold, "split": split and split.value, "augment": augment, "skip_bad": skip_bad}
    settings |= {"known_negatives": known_negatives}
    settings |= {"workers": workers} if model in (Model.image_folder, Model.photo_cnn) else {}
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "mode": mode.value, "precision": precision.value}
    options |= {"channels_last": mode is Mode.fused if channels_last is None else channels_last, "device": device}
    options |= {"step_in_backward": step_in_backward, "workers": workers, "seed": seed}
    torch.set_num_threads(threads or torch.get_num_threads())
    with readable_errors():
        run = command.compare if compare else command.train
        run(model.value, data, settings, options, out, resume, console)


@app.command()
def recommend(
    checkpoint: Annotated[Path, typer.Argument(help="What pyfused train wrote for mf, bpr, two-tower or dot-concat.")],
    user: Annotated[int, typer.Option(help="The user's id in the data.")],
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option("--seen", help="Also items that the user has rated.")] = False,
) -> None:
    """Print the items that a trained recommender ranks first for a user."""
    from .recommend import recommend as best

    with readable_errors():
        table = Table("rank", "item", "score")
        for rank, (item, score) in enumerate(best(checkpoint, user, top, seen), 1):
            table.add_row(str(rank), str(item), f"{score:.4f}")
    console.print(table)


@app.command()
def demo(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder for the plots (PNG) and tables (CSV).")] = Path("pyfused-demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Of both models. Default: 5 (mnist-cnn), 10 (bpr).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1 epoch (mnist-cnn), 2 (bpr): two minutes.")] = False,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train a CNN (MNIST) and a recommender (MovieLens), eager and fused, and compare: under 10 minutes on 2 cores."""
    from .demo import EPOCHS, QUICK, run_demo

    lengths = {name: epochs or default for name, default in (QUICK if quick else EPOCHS).items()}
    with readable_errors():
        run_demo(data, out, lengths, seed, threads or torch.get_num_threads(), console)


def cell(finding) -> str:
    if finding.problem:
        return f"[red]{finding.error:.1e}[/]"
    return f"[green]{finding.error:.1e}[/]" if finding.error >= 0 else "-"


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
