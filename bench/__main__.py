"""Command line of the benchmark: ``python -m bench --help``."""

from __future__ import annotations

import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import pyfused

from . import machine, report
from .harness import Incomplete, compare


class Direction(str, Enum):
    forward = "forward"
    training = "training"


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Malloc(str, Enum):
    default = "default"
    tuned = "tuned"
    both = "both"


def results_folder(quick: bool) -> Path:
    """bench/results of a checkout, whose rows are committed; elsewhere, and for quick runs, a folder here."""
    root = machine.checkout()
    return root / "bench" / "results" if root and not quick else Path("pyfused-bench")


def _in_children(malloc: Malloc) -> None:
    """Run this command line again, once per malloc mode: the C library reads its settings when a process starts."""
    modes = [Malloc.default, Malloc.tuned] if malloc is Malloc.both else [malloc]
    arguments = sys.argv[1:]
    if arguments[:1] == ["bench"]:  # `pyfused bench ...`
        arguments = arguments[1:]
    for mode in modes:
        environment = {k: v for k, v in os.environ.items() if k not in machine.TUNED_MALLOC}
        environment |= machine.TUNED_MALLOC if mode is Malloc.tuned else {}
        if __package__ != "bench":  # installed: a checkout in the current folder must not be imported instead
            environment["PYTHONSAFEPATH"] = "1"
        # The last --malloc on a command line wins.
        command = [sys.executable, "-m", __package__, *arguments, "--malloc", mode.value]
        if code := subprocess.run(command, env=environment).returncode:
            raise typer.Exit(code)


def main(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to measure, e.g. cross_entropy. All if none is named.")
    ] = None,
    case: Annotated[str, typer.Option(help="Only cases with this in their name, e.g. resnet18.")] = "",
    direction: Annotated[
        Direction | None, typer.Option(help="Only the forward pass, or only the training step.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Run the float32 cases at this dtype instead.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's default.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, no torch.compile: under a minute.")] = False,
    with_compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Race torch.compile too. Default: not with --quick.")
    ] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="Measure peak extra memory. Default: not with --quick.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each contender of a case; 0: 0.5, with --quick 0.1.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    malloc: Annotated[
        Malloc, typer.Option(help="The C library's allocator as it comes, or tuned to keep freed memory.")
    ] = Malloc.default,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Append rows to a CSV file and draw plots.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows and plots. Default: bench/results, or ./pyfused-bench.")
    ] = None,
) -> None:
    """Race eager PyTorch, torch.compile and pyfused on the same inputs, in turns."""
    if malloc is Malloc.both or malloc.value != machine.malloc_mode():
        return _in_children(malloc)
    if device == "cpu" and (reason := pyfused.available_backends()["cpu"]):
        raise typer.BadParameter(f"there are no fused CPU kernels to measure: {reason}")
    if threads:
        torch.set_num_threads(threads)
    console, failure = Console(), ""

    def announce(text: str) -> None:
        status.update(text)
        if "left out" in text:
            console.print(text, markup=False)

    try:
        with console.status("starting") as status:
            rows = compare(
                quick,
                ops or (),
                text=case,
                directions=[direction.value] if direction else ("forward", "training"),
                dtype=getattr(torch, dtype.value) if dtype else None,
                device=device,
                with_compile=with_compile,
                memory=memory,
                seconds=seconds,
                announce=announce,
            )
    except Incomplete as error:
        rows, failure = error.rows, str(error)
    except ValueError as error:
        rows, failure = [], str(error)
    if rows:
        console.print(report.tables(rows))
    if rows and save:
        folder = out or results_folder(quick)
        path = folder / f"{torch.device(device).type}.csv"
        report.write_csv(rows, path)
        everything = report.latest(path, rows[0])  # a run of some ops does not take the others off the plots
        suffix = f"{torch.device(device).type}-{torch.get_num_threads()}-threads-{machine.malloc_mode()}-malloc.png"
        report.plot_speedups(everything, folder / f"speedup-{suffix}")
        report.plot_roofline(everything, folder / f"roofline-{suffix}")
        console.print(f"rows and plots in {folder}")
    if failure:
        console.print(failure, style="red", markup=False)
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
