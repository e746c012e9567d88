"""What the reference models reach on real data, over seeds or folds, beside what others report.

    python -m bench.accuracy                   # everything: an hour on two cores
    python -m bench.accuracy mf two-tower      # some of it

Trains with the defaults of `pyfused train`; appends a row for each training to results/accuracy.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyfused.tasks import make_task
from pyfused.train import Options, train

from . import machine

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
SEEDS = tuple({"seed": seed} for seed in range(3))
FOLDS = tuple({"fold": fold} for fold in range(5))


@dataclass(frozen=True)
class Study:
    """A model and the trainings whose mean is reported; what the project asks of it, and what others report."""

    model: str
    trainings: tuple[dict, ...]
    settings: dict = field(default_factory=dict)
    asked: dict = field(default_factory=dict)
    published: dict[str, dict] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return " ".join([self.model, *(f"{k}={v}" for k, v in self.settings.items())])


STUDIES = [
    Study("small-cnn", SEEDS),
    Study("mnist-cnn", SEEDS, asked={"accuracy": 0.9925}, published={"the network's source": {"accuracy": 0.9882}}),
    Study("image-folder", FOLDS, {"augment": True}, {"accuracy": 0.80}),
    Study("photo-cnn", FOLDS, {"augment": True}, {"accuracy": 0.80}),
    Study("dot-concat", FOLDS),
    Study("mf", FOLDS, {}, {"rmse": 0.91}, {"Surprise SVD": {"rmse": 0.934}, "Surprise SVD++": {"rmse": 0.919}}),
    Study(
        "bpr",
        tuple({"seed": seed, "split_seed": seed} for seed in range(3)),
        {"split": "random"},
        {"hr@10": 0.77, "ndcg@10": 0.28},
        {"RecBole BPR": {"hr@10": 0.7614, "ndcg@10": 0.2768}},
    ),
    Study("two-tower", SEEDS, {"split": "last"}, {"hr@10": 0.146, "ndcg@10": 0.079}),
]


def results(study: Study) -> Iterator[tuple[dict, dict]]:
    """(last row of the training, baselines of its data) of each training."""
    for training in study.trainings:
        given = dict(training)
        seed = given.pop("seed", 0)
        task = make_task(study.model, **study.settings, **given)
        *_, last = train(task, task.model(seed), Options.of(task, seed=seed))
        yield {metric: last[metric] for metric in task.metrics}, task.baselines()


def mean(rows: list[dict]) -> dict:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def table(study: Study, found: list[tuple[dict, dict]]) -> Table:
    metrics, labels = list(found[0][0]), [", ".join(f"{k} {v}" for k, v in t.items()) for t in study.trainings]
    result = Table(study.title, *metrics)

    def add(label: str, row: dict) -> None:
        result.add_row(label, *(f"{row[metric]:.4f}" if metric in row else "" for metric in metrics))

    for name in found[0][1]:
        add(name, mean([baselines[name] for _, baselines in found]))
    for label, row in {**study.published, "asked": study.asked}.items():
        if row:
            add(label, row)
    result.add_section()
    for label, (row, _) in zip(labels, found, strict=True):
        add(label, row)
    add(f"mean of {len(found)}", mean([row for row, _ in found]))
    return result


def append(study: Study, found: list[tuple[dict, dict]]) -> None:
    columns = ("date", "commit", "torch", "hardware", "isa", "study", "training", "metric", "value")
    common = {key: value for key, value in machine.describe(torch.device("cpu")).items() if key in columns}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for training, (row, _) in zip(study.trainings, found, strict=True):
            label = " ".join(f"{k}={v}" for k, v in training.items())
            for metric, value in row.items():
                writer.writerow(common | {"study": study.title, "training": label, "metric": metric, "value": value})


def main(models: Annotated[list[str] | None, typer.Argument(help="Some of the models; all if none.")] = None) -> None:
    """Train the reference models for their accuracy."""
    console = Console()
    if unknown := set(models or ()) - {study.model for study in STUDIES}:
        raise typer.BadParameter(f"no study of {', '.join(sorted(unknown))}")
    for study in STUDIES:
        if not models or study.model in models:
            found = list(track(results(study), study.title, len(study.trainings), console=console, transient=True))
            append(study, found)
            console.print(table(study, found))


if __name__ == "__main__":
    typer.run(main)
