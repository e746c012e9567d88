"""Rows into a table, a CSV file and plots."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, groupby, repeat
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table

from .harness import COLUMNS

Row = dict[str, object]
SETTING = ("hardware", "isa", "device", "threads", "malloc")  # rows that differ in one of these are not comparable
TEXT = {*COLUMNS[: COLUMNS.index("p20_ms")]} - {"threads"}
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
KINDS = ("eager", "pyfused")
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


def read_csv(path: Path) -> list[Row]:
    """The rows of a file as `write_csv` wrote them, numbers as numbers."""
    with path.open(newline="") as file:
        return [{k: v if k in TEXT else _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def latest(path: Path, like: Row) -> list[Row]:
    """The newest row of every case and contender in `path` that was measured as `like` was, ordered by case."""
    newest: dict[tuple, Row] = {}
    for row in read_csv(path):
        if all(row[name] == like[name] for name in SETTING):
            newest[(*_group(row), row["contender"])] = row
    return sorted(newest.values(), key=lambda row: tuple(map(str, _group(row))))


def _number(text: str) -> float | int | None:
    return int(text) if text.isdecimal() else float(text) if text else None


def plot_speedups(rows: Sequence[Row], path: Path) -> None:
    """Grouped bars, a group a case, a panel a direction: how many times faster than eager each contender is."""
    names = list(dict.fromkeys("{op} {case} {dtype}".format(**row) for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    bars = len({(row["op"], row["case"], row["dtype"], row["contender"]) for row in rows})
    figure = Figure(figsize=(5 + 4.5 * len(directions), 1.5 + 0.11 * bars), layout="constrained")
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions):
        for _, group in groupby((row for row in rows if row["direction"] == direction), _group):
            _draw_bars(axes, names, [row for row in group if row["contender"] != "eager"])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.25, linewidth=0.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(direction, fontsize=9)
        axes.set_xlabel("times faster than eager (1 = equal)", fontsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("{hardware}, {threads} threads, {malloc} malloc".format(**rows[0]), fontsize=10)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=len(handles), loc="outside lower center")
    figure.savefig(path, dpi=100)


def _draw_bars(axes, names: Sequence[str], group: Sequence[Row]) -> None:
    height = 0.8 / max(len(group), 1)
    for slot, row in enumerate(group):
        y = names.index("{op} {case} {dtype}".format(**row)) - 0.4 + (slot + 0.5) * height
        color, name = COLORS.get(row["contender"], "black"), row["contender"]
        axes.barh(y, row["vs_eager"] - 1, height, left=1, color=color, label=name)


def plot_roofline(rows: Sequence[Row], path: Path) -> None:
    """Attained GFLOP/s over flops per byte, under the measured ceilings: forward and training step side by side.

    Of the dtype that most rows have. A vertical line leads from eager to pyfused, each in its faster layout; a dash is
    the ceiling of that case: the copy rate at its working set, or the matrix product. Numbers are named at the right.
    """
    dtype = Counter(row["dtype"] for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if row["dtype"] == dtype]
    names = list(dict.fromkeys((row["op"], row["case"]) for row in rows))
    colors = dict(zip(dict.fromkeys(op for op, _ in names), cycle(OP_COLORS)))
    figure = Figure(figsize=(16, max(7.0, 1.0 + 0.22 * len(names))), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(5, 5, 3.6))
    panels[0].sharex(panels[1])
    panels[0].sharey(panels[1])
    for axes, direction in zip(panels, ("forward", "training")):
        _draw_ceilings(axes, rows)
        of_direction = [row for row in rows if row["direction"] == direction]
        labels = []
        for number, name in enumerate(names, 1):
            case = [row for row in of_direction if (row["op"], row["case"]) == name]
            best = {kind: _fastest(row for row in case if row["contender"].startswith(kind)) for kind in KINDS}
            if all(best.values()):
                x, color = _intensity(case[0]), colors[name[0]]
                _draw_case(axes, x, best["eager"], best["pyfused"], color)
                labels.append((x, best["pyfused"]["gflop_s"], str(number), color))
        _draw_labels(axes, labels)
        axes.set_title("forward" if direction == "forward" else "training step", fontsize=10)
        axes.set_xlabel("flops per byte that must move")
    panels[0].set_ylabel("GFLOP/s")
    panels[2].axis("off")
    for slot, (op, case) in enumerate(names):
        text = f"{slot + 1}  {op} {case}"
        y = 1 - (slot + 0.5) / len(names)
        panels[2].text(0, y, text, color=colors[op], fontsize=7.5, va="center", transform=panels[2].transAxes)
    setting = "{hardware}, {threads} threads, {malloc} malloc, {dtype}".format(**rows[0])
    marks = "filled: pyfused, hollow: eager, dash: ceiling of the case (Winograd does fewer flops than are counted)"
    figure.suptitle(f"{setting}; {marks}", fontsize=10)
    figure.savefig(path, dpi=100)


def _intensity(row: Row) -> float:
    return row["flops"] / row["bytes"]


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row["p50_ms"], default=None)


def _draw_ceilings(axes, rows: Sequence[Row]) -> None:
    """The slowest and the fastest copy that a row is held against (they differ by the cache that fits), and matmul."""
    low, high = (
        min(map(_intensity, rows)) / 12,
        max(map(_intensity, rows)) * 2,
    )  # on the left, room for the lines' names
    peak = max(row["matmul_gflop_s"] for row in rows)
    rates = sorted(row["copy_gb_s"] for row in rows)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.25, linewidth=0.5)
    for rate, label in {rates[0]: "slowest copy", rates[-1]: "fastest copy"}.items():
        points = [low, min(max(peak / rate, low), high), high]
        axes.plot(points, [min(peak, x * rate) for x in points], color="black", linewidth=0.8)
        axes.annotate(f"{label} {rate:.0f} GB/s", (low, low * rate), (4, -2), textcoords="offset points", fontsize=7)
    axes.text(peak / rates[-1], peak * 1.04, f"matrix product {peak:.0f} GFLOP/s", va="bottom", fontsize=7)


def _draw_case(axes, x: float, eager: Row, fused: Row, color: str) -> None:
    ceiling = min(fused["matmul_gflop_s"], x * fused["copy_gb_s"])
    axes.plot([x, x], [eager["gflop_s"], fused["gflop_s"]], color=color, linewidth=0.8, alpha=0.5)
    axes.plot(x, eager["gflop_s"], marker="o", markersize=4.5, fillstyle="none", color=color)
    axes.plot(x, fused["gflop_s"], marker="o", markersize=5.5, color=color)
    axes.plot(x, ceiling, marker="_", markersize=9, color=color)


def _draw_labels(axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """A number beside each point, moved up where another label is in the way."""
    height, width, taken = 9, 14, []  # in points of the page
    axes.figure.draw_without_rendering()  # the axes' final scale
    to_page = 72 / axes.figure.dpi
    for x, y, text, color in sorted(labels, key=lambda label: label[1]):
        at = to_page * axes.transData.transform((x, y))
        up = 0.0
        while any(abs(at[0] - a) < width and abs(at[1] + up - b) < height for a, b in taken):
            up += 1.0
        taken.append((at[0], at[1] + up))
        axes.annotate(text, (x, y), (5, up), textcoords="offset points", va="center", fontsize=7, color=color)
