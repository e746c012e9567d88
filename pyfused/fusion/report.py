"""What pyfused.fuse did: one row per candidate."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One call that could be fused.

    place: the module, or the call within one. backend: which one runs the fused op.
    forward, training: how many times faster the fused call is than what it replaces (training: with backward).
    error: largest difference of outputs (in training also of gradients), relative to the largest value.
    reason: why it was left alone; None: it is fused.
    """

    place: str
    pattern: str
    backend: str = ""
    forward: float | None = None
    training: float | None = None
    error: float | None = None
    reason: str | None = None
    note: str = ""

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass
class Report:
    """Rows in the order of the model's modules, and what holds for the model as a whole.

    error: largest relative difference between the whole model before and after; None: not compared.
    channels_last: how many times faster the whole model is since its inputs are converted to that; None: they are not.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: float | None = None
    channels_last: float | None = None

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.fused]

    def __rich__(self):
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table("place", "pattern", "forward", "training", "error", "backend, or why it was left alone")
        for row in self.rows:
            numbers = (_times(row.forward), _times(row.training), "" if row.error is None else f"{row.error:.0e}")
            words = f"[green]{row.backend}[/]" if row.fused else f"[yellow]{escape(row.reason)}[/]"
            words += f" ({escape(row.note)})" if row.note else ""
            table.add_row(escape(row.place), row.pattern, *numbers, words)
        head = f"pyfused: {len(self.fused)} of {len(self.rows)} candidates fused"
        head += "" if self.error is None else f"; the whole model differs by {self.error:.0e}"
        if self.channels_last is not None:
            head += f"; inputs are converted to channels_last, outputs back, which is {self.channels_last:.2f}x as fast"
        return Group(head, *([table] if self.rows else []), *map(escape, self.notes))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as captured:
            console.print(self, highlight=False)
        return captured.get()


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"
