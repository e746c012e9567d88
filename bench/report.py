"""Rows into a table, a CSV file and plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table

from .harness import COLUMNS

Row = dict[str, object]
COLORS = {
    "eager": "#79706e",
    "eager NHWC": "#bab0ac",
    "eager bmm": "#d4a6c8",
    "torch chunked": "#b279a2",
    "compile": "#4c78a8",
    "compile NHWC": "#9ecae9",
    "pyfused": "#2f8f3a",
    "pyfused NHWC": "#8cd17d",
}
OP_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d")


def _group(row: Row) -> tuple:
    return row["op"], row["case"], row["dtype"], row["direction"], row["malloc"]


def _rate(row: Row) -> str:
    """GFLOP/s where arithmetic is what costs, else GB/s."""
    if row["flops"] > 4 * row["bytes"]:
        return f"{row['gflop_s']:.0f} GF/s"
    return f"{row['gb_s']:.1f} GB/s"


def _times(row: Row, column: str) -> str:
    """A ratio, green where pyfused is ahead and red where it is behind."""
    if row[column] is None:
        return ""
    text = f"{row[column]:.2f}"
    if not row["contender"].startswith("pyfused"):
        return text
    return f"[{'green' if row[column] >= 1 else 'red'}]{text}[/]"


def tables(rows: Sequence[Row]) -> Group:
    """One table an op, one line a contender, cases kept apart."""
    head = rows[0]
    parts: list[Table | str] = [
        "{hardware}, {threads} threads ({isa}), torch {torch}, malloc {malloc}. ".format(**head),
        "Medians of interleaved runs; x: times faster than; share: of the measured copy or matrix-product rate.\n",
    ]
    for op, of_op in groupby(rows, lambda row: row["op"]):
        of_op = list(of_op)
        with_memory = any(row["extra_mib"] is not None for row in of_op)
        table = Table(
            "case", "contender", title=f"[bold]{op}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for name in ["ms", "x eager", "x compile", "rate", "share", *["extra MiB"] * with_memory]:
            table.add_column(name, justify="right")
        for (_, case, dtype, direction, _), group in groupby(of_op, _group):
            labels = chain([case, f"{direction}, {dtype}"], repeat(""))
            for label, row in zip(labels, group, strict=False):
                cells = [f"{row['p50_ms']:.3f}", _times(row, "vs_eager"), _times(row, "vs_compile")]
                cells += [_rate(row), f"{row['share']:.0%}"]
                if with_memory:
                    cells.append("" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}")
                table.add_row(label, row["contender"], *cells)
            table.add_section()
        parts.append(table)
    return Group(*parts)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Append rows to `path`, with a header if the file is new. Raises ValueError if it has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def latest(path: Path, like: Row) -> list[Row]:
    """The newest row of every case and contender in `path` that was measured as `like` was, ordered by case."""
    setting = ("hardware", "isa", "device", "threads", "malloc")
    newest: dict[tuple, Row] = {}
    with path.open(newline="") as file:
        for text in csv.DictReader(file):
            if all(text[name] == str(like[name]) for name in setting):
                row = {k: v if isinstance(like[k], str) else _number(v) for k, v in text.items()}
                newest[(*_group(row), row["contender"])] = row
    return sorted(newest.values(), key=lambda row: tuple(map(str, _group(row))))


def _number(text: str) -> float | None:
    return float(text) if text else None


def plot_speedups(rows: Sequence[Row], path: Path) -> None:
    """Grouped bars, one group a case: how many times faster than eager each contender is."""
    groups = [list(group) for _, group in groupby(rows, _group)]
    figure = Figure(figsize=(11, 1.5 + 0.16 * sum(len(group) for group in groups)), layout="constrained")
    axes = figure.add_subplot()
    for index, group in enumerate(groups):
        bars = {row["contender"]: row["vs_eager"] for row in group if row["contender"] != "eager"}
        for slot, (name, value) in enumerate(bars.items()):
            height = 0.8 / len(bars)
            y = index - 0.4 + (slot + 0.5) * height
            axes.barh(y, value - 1, height, left=1, color=COLORS.get(name, "black"), label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    labels = ["{op} {case} {dtype}, {direction}".format(**group[0]) for group in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("times faster than eager (1 = equal)")
    axes.set_title(f"{rows[0]['hardware']}, {rows[0]['threads']} threads, {rows[0]['malloc']} malloc", fontsize=9)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    figure.savefig(path, dpi=120)


def plot_roofline(rows: Sequence[Row], path: Path) -> None:
    """Attained GFLOP/s over flops per byte, under the measured ceilings, of the rows with the first row's dtype.

    A copy is as fast as the cache that its working set fits: the slowest and the fastest that a row was held against.
    """
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"] and row["contender"] in ("eager", "pyfused")]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    peak = max(row["matmul_gflop_s"] for row in rows)
    above = {"xytext": (2, 4), "textcoords": "offset points", "fontsize": 7}
    rates = sorted({row["copy_gb_s"] for row in rows})
    for rate, label in {rates[0]: "slowest copy", rates[-1]: "fastest copy"}.items():
        points = [low, min(max(peak / rate, low), high), high]
        axes.plot(points, [min(peak, x * rate) for x in points], color="black", linewidth=0.8)
        axes.annotate(f"{label} {rate:.0f} GB/s", (low, low * rate), **above)
    axes.annotate(f"matrix product {peak:.0f} GFLOP/s", (high, peak), ha="right", **above)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for row in rows:
        color, fused = OP_COLORS[ops.index(row["op"]) % len(OP_COLORS)], row["contender"] == "pyfused"
        label = row["op"] if fused and row["op"] not in axes.get_legend_handles_labels()[1] else None
        axes.plot(
            row["flops"] / row["bytes"],
            row["gflop_s"],
            marker="o" if row["direction"] == "forward" else "s",
            color=color,
            fillstyle="full" if fused else "none",
            linestyle="",
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="GFLOP/s")
    axes.set_title(
        f"{rows[0]['dtype']}; circle: forward, square: training step; filled: pyfused, hollow: eager", fontsize=9
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
