"""The reference models trained by eager PyTorch, torch.compile and pyfused.fuse from one seed: time, memory, quality.

    python -m bench.training                   # everything
    python -m bench.training mnist-cnn gpt     # some of it

`pyfused train MODEL --compare` with few epochs; appends a row for each contender to results/training-cpu.csv and draws
the newest rows of each model. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console

from pyfused.compare import Outcome, compare, summary, table
from pyfused.curves import COLORS
from pyfused.tasks import make_task
from pyfused.train import Options, steps_per_epoch

from . import machine

RESULTS = Path(__file__).parent / "results" / "training-cpu.csv"
SETTING = ("date", "commit", "torch", "hardware", "isa", "threads", "malloc")
EPOCHS = {"small-cnn": 11, "mnist-cnn": 2, "image-folder": 2, "photo-cnn": 4, "gpt": 2}
EPOCHS |= {"dot-concat": 4, "mf": 11, "bpr": 4, "two-tower": 4}


def rows_of(outcomes: Sequence[Outcome], epoch_steps: int) -> list[dict]:
    setting = {name: value for name, value in machine.describe(torch.device("cpu")).items() if name in SETTING}
    rows = []
    for outcome in outcomes:
        found, last = summary(outcome, outcomes[0]), outcome.rows[-1]
        metric = list(last)[-1]
        row = {"model": found["task"], "contender": found["contender"]}
        row |= {"step_ms": outcome.epoch_seconds / epoch_steps * 1e3}
        row |= {name: found[name] for name in ("seconds_per_epoch", "speed_up", "peak_mib", "early_difference")}
        row |= {"first_epoch_seconds": outcome.rows[0]["seconds"], "loss": last["loss"], "metric": metric}
        row |= {"value": last[metric], **{name: found[name] for name in ("epochs", "batch_size", "precision", "seed")}}
        rows.append(setting | {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def append(rows: list[dict]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def plot(path: Path) -> None:
    """Bars of the newest row of each model and contender: how much faster than eager, and the peak of memory."""
    with RESULTS.open(newline="") as file:
        newest = {(row["model"], row["contender"]): row for row in csv.DictReader(file)}
    models = [model for model in EPOCHS if (model, "fused") in newest]
    figure = Figure(figsize=(10, 1.2 + 0.6 * len(models)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (contender, color) in enumerate(COLORS.items()):
        here = [k for k, model in enumerate(models) if (model, contender) in newest]
        rows = [newest[models[k], contender] for k in here]
        for axes, column in ((left, "speed_up"), (right, "peak_mib")):
            heights = [k + 0.16 * (place - 2) for k in here]
            axes.barh(heights, [float(row[column]) for row in rows], 0.15, color=color, label=contender)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(models)), models)
    left.invert_yaxis()
    left.set(title="an epoch: times faster than eager")
    right.set(title="most MiB that the process had resident")
    right.legend(fontsize=8)
    figure.suptitle("{hardware}, {threads} threads, {malloc} malloc".format(**newest[models[-1], "fused"]), fontsize=10)
    figure.savefig(path, dpi=120)


def main(models: Annotated[list[str] | None, typer.Argument(help="Some of the models; all if none.")] = None) -> None:
    """Train the reference models by all contenders."""
    console = Console()
    if unknown := set(models or ()) - set(EPOCHS):
        raise typer.BadParameter(f"no model {', '.join(sorted(unknown))}")
    for model in models or EPOCHS:
        task = make_task(model)
        options = Options.of(task, epochs=EPOCHS[model])
        outcomes = compare(task, None, options, torch.get_num_threads(), console)
        append(rows_of(outcomes, steps_per_epoch(task, options)))
        plot(RESULTS.with_suffix(".png"))
        console.print(table(task, outcomes))


if __name__ == "__main__":
    typer.run(main)
