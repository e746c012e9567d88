"""What the committed rows say: ratios of the last runs beside each other, their spread, and every case that is lost.

    python -m bench.summary                        # results/cpu.csv, the setting of its newest row
    python -m bench.summary --threads 1 --malloc tuned
    python -m bench.summary --since COMMIT         # only runs of that commit and later ones
    python -m bench.summary --markdown             # the table of the README

One run is an anecdote: every case is run twice, on different occasions, and the ratio within a run is what is quoted,
because times follow the machine's mood and ratios of interleaved contenders do not.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .report import SETTING, Row, read_csv

LAYOUTS = {"eager": "NCHW", "eager NHWC": "channels_last"}
COMPILED = ("compile", "compile NHWC")


@dataclass(frozen=True)
class Race:
    """One case in one direction: its last runs, the newest last, each with a row for every contender."""

    runs: list[dict[str, Row]]

    def __getitem__(self, column: str) -> object:
        return next(iter(self.runs[-1].values()))[column]

    @property
    def title(self) -> str:
        return f"{self['op']} {self['case']}" + f" {self['dtype']}" * (self["dtype"] != "float32")

    @property
    def contenders(self) -> list[str]:
        return [name for name in self.runs[-1] if all(name in run for run in self.runs)]

    @property
    def ours(self) -> str:
        """The faster of our contenders: the layout that a user would choose."""
        return min((name for name in self.contenders if name.startswith("pyfused")), key=self.ms)

    def ms(self, contender: str) -> float:
        return median(run[contender]["p50_ms"] for run in self.runs)

    def ratios(self, *rivals: str, ours: str = "") -> list[float]:
        """Per run: how many times faster `ours` (our best) is than the best of those `rivals` that took part."""
        rivals = [name for name in rivals if name in self.contenders]
        best = [min(run[name]["p50_ms"] for name in rivals) for run in self.runs] if rivals else []
        return [ms / run[ours or self.ours]["p50_ms"] for ms, run in zip(best, self.runs)]

    def lost(self) -> Iterator[tuple[float, str]]:
        """Ratio and description of each comparison that we lose: our best with everybody, each with eager as it is."""
        for ours in (name for name in self.contenders if name.startswith("pyfused")):
            for rival in (name for name in self.contenders if not name.startswith("pyfused")):
                alike = rival.removeprefix("eager") == ours.removeprefix("pyfused")
                ratios = self.ratios(rival, ours=ours)
                if (alike or ours == self.ours) and median(ratios) < 1:
                    doubt = "  (not in every run)" if max(ratios) >= 1 else ""
                    text = f"{self.title}, {self['direction']}: {ours} {_times(ratios)} as fast as {rival}{doubt}"
                    yield median(ratios), text


def races(rows: Sequence[Row], runs: int) -> list[Race]:
    """Rows of one setting, in the order of the file, as races with their last `runs` runs."""
    history: dict[tuple, list[dict[str, Row]]] = {}
    for row in rows:
        of_race = history.setdefault(tuple(row[k] for k in ("op", "case", "dtype", "direction")), [{}])
        if row["contender"] in of_race[-1]:  # a run has each contender once
            of_race.append({})
        of_race[-1][row["contender"]] = row
    found = [Race(of_race[-runs:]) for of_race in history.values()]
    return sorted((race for race in found if "eager" in race.contenders), key=lambda race: race["op"])


def since_commit(rows: Sequence[Row], commit: str) -> list[Row]:
    command = ["git", "-C", str(Path(__file__).parent), "rev-list", "--abbrev-commit", "--abbrev=10"]
    command += [f"{commit}~..HEAD"]
    later = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    return [row for row in rows if row["commit"].removesuffix("-dirty") in later]


def _times(ratios: Sequence[float], bold: str = "{}") -> str:
    """``2.41x, 2.38x``; `bold` marks what is lost."""
    texts = [f"{x:.2f}x" if x < 10 else f"{x:.1f}x" for x in ratios]
    return ", ".join(text if x >= 1 else bold.format(text) for x, text in zip(ratios, texts))


def table(found: Sequence[Race]) -> Table:
    """One line a race; a cell has the ratio of each run."""
    result = Table("case", "direction", "contender", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("ms", "x eager", "x eager NHWC", "x compile", "x others", "share"):
        result.add_column(name, justify="right")
    for race in found:
        others = [name for name in race.contenders if name not in (*LAYOUTS, *COMPILED) and "pyfused" not in name]
        cells = [_times(race.ratios(*rivals), "[red]{}[/]") for rivals in (("eager",), ("eager NHWC",), COMPILED)]
        cells.append("; ".join(f"{name} {_times(race.ratios(name), '[red]{}[/]')}" for name in others))
        share = median(run[race.ours]["share"] for run in race.runs)
        result.add_row(race.title, race["direction"], race.ours, f"{race.ms(race.ours):.3g}", *cells, f"{share:.0%}")
    return result


def spread(found: Sequence[Race]) -> str:
    """How far apart the runs are in what is quoted, the ratio to eager: largest over smallest, less 1."""
    apart = sorted(max(r) / min(r) - 1 for race in found if len(r := race.ratios("eager")) > 1)
    if not apart:
        return "One run: nothing is known of the spread."
    return f"Ratios to eager differ between runs by {median(apart):.0%} (median case) to {apart[-1]:.0%} (worst)."


def _quoted(of_case: Sequence[Race], *rivals: str) -> str:
    """The medians of a case's directions: ``2.4x / 2.2x``."""
    values = [median(ratios) for race in of_case if (ratios := race.ratios(*rivals))]
    return " / ".join(f"{x:.0f}x" if x >= 9.95 else f"{x:.1f}x" if x >= 1 else f"**{x:.2f}x**" for x in values)


def markdown(found: Sequence[Race]) -> str:
    """The table of the README: a line a case, the medians of the runs."""
    lines = ["| what | pyfused | faster than eager | than torch.compile |", "|---|---|---|---|"]
    for title, of_case in groupby(found, lambda race: race.title):
        of_case = list(of_case)
        what = f"{title}, {' / '.join(race['direction'] for race in of_case)}"
        ms = " / ".join(f"{race.ms(race.ours):.3g}" for race in of_case) + " ms"
        measured = [run for run in of_case[-1].runs if run["eager"]["extra_mib"] is not None]  # not every run does
        if measured:
            ours, eager = (measured[-1][name]["extra_mib"] for name in (of_case[-1].ours, "eager"))
            ms += f", {ours:.0f} MiB extra (eager {eager:.0f})"
        eager = [(LAYOUTS[rival], _quoted(of_case, rival)) for rival in LAYOUTS]
        both = all(text for _, text in eager)
        eager = ", ".join(f"{text} {layout}" if both else text for layout, text in eager if text)
        lines.append(f"| {what} | {ms} | {eager} | {_quoted(of_case, *COMPILED)} |")
    return "\n".join([*lines, "", spread(found)])


def main(
    path: Annotated[Path, typer.Argument(help="Rows of the benchmark.")] = Path(__file__).parent / "results/cpu.csv",
    runs: Annotated[int, typer.Option(min=1, help="Last runs of every case to set beside each other.")] = 2,
    since: Annotated[str, typer.Option(help="Leave out runs of commits before this one.")] = "",
    threads: Annotated[int, typer.Option(help="Rows with so many threads. Default: as the newest row.")] = 0,
    malloc: Annotated[str, typer.Option(help="Rows of this malloc mode. Default: as the newest row.")] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README instead.")] = False,
) -> None:
    """Ratios of the last runs, their spread, and every case that pyfused loses."""
    rows = since_commit(read_csv(path), since) if since else read_csv(path)
    if not rows:
        raise typer.BadParameter("there are no such rows")
    setting = {name: rows[-1][name] for name in SETTING}
    setting |= {"threads": threads or setting["threads"], "malloc": malloc or setting["malloc"]}
    rows = [row for row in rows if all(row[name] == value for name, value in setting.items())]
    found = races(rows, runs)
    if as_markdown:
        print(markdown(found))
        return
    console = Console(width=max(180, Console().width), soft_wrap=False)
    commits = sorted({row["commit"] for race in found for run in race.runs for row in run.values()})
    console.print("{hardware}, {threads} threads ({isa}), {malloc} malloc".format(**setting), highlight=False)
    console.print(f"commits {', '.join(commits)}; a cell has the ratio of each run, the newest last", highlight=False)
    console.print(table(found))
    console.print(spread(found), highlight=False)
    if once := sum(len(race.runs) < runs for race in found):
        console.print(f"{once} of {len(found)} races were run fewer than {runs} times", highlight=False)
    losses = sorted(loss for race in found for loss in race.lost())
    console.print(f"\n{len(losses)} comparisons lost:", highlight=False)
    for _, text in losses:
        console.print(f"  {text}", highlight=False, markup=False)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
