"""The benchmark on a GPU: python -m bench.gpu OUT_DIR [--minutes 5] [--no-compile]

The cases of cases.py and some that only a GPU can hold; besides their contenders our GPU backends one by one. Rows are
written after each case, so that a run that is cut short leaves what it has; the next goes on with the cases of which
there is none. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import pyfused

from . import harness, report
from .cases import BF16, FULL
from .convolutions import Conv
from .harness import Contender, run_case
from .workloads import Builders, Case, CrossEntropy, InBatchCrossEntropy, LinearCrossEntropy

LARGE: list[Case] = [
    CrossEntropy(shape=(8192, 128256), dtype=BF16, why="a large language model's step: 2.1 GB of logits"),
    CrossEntropy(shape=(8192, 1000), dtype=BF16, why="bound by the launch"),
    CrossEntropy(shape=(8, 128256), dtype=BF16, why="few rows: one multiprocessor each"),
    LinearCrossEntropy(rows=8192, features=2048, classes=128256, dtype=BF16, why="a large language model's last layer"),
    InBatchCrossEntropy(batch=8192, dtype=BF16, why="scores on tensor cores, 16 bits"),
    InBatchCrossEntropy(batch=32768, dim=128, dtype=BF16, why="2.1 GB of scores in eager"),
]


@dataclass(frozen=True)
class OnGpu:
    """A case with more contenders."""

    case: Case

    def __getattr__(self, name):
        return getattr(self.case, name)

    def contenders(self, direction: str, device: torch.device) -> Builders:
        builders = self.case.contenders(direction, device)
        if self.op not in pyfused.dispatch.TABLE:  # models
            return builders
        ours = builders.get("pyfused NHWC", builders["pyfused"])
        for backend in ("cuda", "triton"):
            if pyfused.available_backends()[backend] is None:
                # Not called pyfused: a backend without a kernel for this op may be left out.
                builders[f"ours on {backend}"] = lambda b=backend: _within(lambda: pyfused.use_backend(b), ours())
        if isinstance(self.case, Conv) and "ours on triton" in builders and self.case.groups == 1:
            for own, name in ((True, "own product"), (False, "cuDNN")):  # what its rule of thumb chooses from
                builders[f"ours on triton, {name}"] = lambda own=own: _within(lambda: _triton_way(own), ours())
        if isinstance(self.case, InBatchCrossEntropy) and "ours on cuda" in builders:  # tiles, where they can run
            builders["ours on cuda, chunks"] = lambda: _within(_by_chunks, ours())
        return builders


@contextlib.contextmanager
def _by_chunks():
    from pyfused.backends.cuda import in_batch_cross_entropy as adapter

    before, adapter.cannot_tile = adapter.cannot_tile, lambda *args: "not asked for"
    try:
        with pyfused.use_backend("cuda"):
            yield
    finally:
        adapter.cannot_tile = before


@contextlib.contextmanager
def _triton_way(own: bool):
    from pyfused.backends.triton import conv2d_relu

    before, conv2d_relu._ways = conv2d_relu._ways, lambda *args: [own]
    try:
        with pyfused.use_backend("triton"):
            yield
    finally:
        conv2d_relu._ways = before


def _within(context, contender: Contender) -> Contender:
    def within(function):
        with context():
            return function()

    return Contender(lambda: within(contender.run), lambda: within(contender.result))


def races(rows: list[report.Row]) -> list[tuple[Case, str]]:
    """The cases and directions of which there is no row yet."""
    known = {(row["op"], row["case"], row["dtype"], row["direction"]) for row in rows}
    everything = [(case, direction) for case in (*LARGE, *FULL) for direction in case.directions]
    return [(c, d) for c, d in everything if (c.op, c.name, str(c.dtype).removeprefix("torch."), d) not in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    console, device = Console(width=200), torch.device("cuda")
    file, stop = options.out / "cuda.csv", time.monotonic() + 60 * options.minutes
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # PyTorch's default: convolutions round to 11 bits
        harness.TOLERANCE[torch.float32] = 2e-3
    left, failed = races(report.read_csv(file) if file.exists() else []), 0
    while left and time.monotonic() < stop:
        case, direction = left.pop(0)
        try:
            rows = run_case(OnGpu(case), direction, device, with_compile=options.compile, seconds=0.2,
                            announce=console.print)  # fmt: skip
        except Exception as error:
            failed += 1
            console.print(f"{case.title(direction)}: {type(error).__name__}: {error}", markup=False)
            continue
        finally:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        report.write_csv(rows, file)
        console.print(report.tables(rows))
        with (options.out / "table.txt").open("w") as table:
            Console(file=table, width=160).print(report.tables(report.read_csv(file)))
    for case, direction in left:
        console.print(f"no time left for {case.title(direction)}")
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
