"""Plots of training runs."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from .tasks import Task

COLORS = {
    "eager": "#79706e",
    "eager NHWC": "#4c78a8",
    "compile": "#54a24b",
    "compile NHWC": "#b279a2",
    "fused": "#e45756",
}


def plot(runs: Sequence[tuple[Task, dict[str, list[dict]]]], path: Path) -> None:
    """For each task the rows of its contenders: loss by epoch (the curves should coincide) and quality by training
    time (they should not)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6 * len(runs)), layout="constrained")
    for (task, contenders), (left, right) in zip(runs, figure.subplots(len(runs), 2, squeeze=False), strict=True):
        metric = task.metrics[-1]
        for name, rows in contenders.items():
            style = {"label": name, "color": COLORS[name], "marker": "o"}
            style["linestyle"] = "-" if name == "fused" else "--"
            left.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], **style)
            right.plot(list(accumulate(row["seconds"] for row in rows)), [row[metric] for row in rows], **style)
        left.set(title=task.name, xlabel="epoch", ylabel="training loss")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set(title=f"{task.name}, test split", xlabel="seconds of training", ylabel=metric)
        for name, metrics in task.baselines().items():
            right.axhline(metrics[metric], color="black", linewidth=0.8, label=name)
        right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
