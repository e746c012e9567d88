"""The kernels' instruction counts against the committed ones (bench/instructions.py), on one instruction set."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def instructions(monkeypatch):
    # From the checkout also where the package is installed: the table is not part of the package.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("instructions")


def test_no_kernel_executes_more_instructions_than_recorded(instructions):
    try:
        table = instructions.recorded()
        counts = instructions.count(["avx2"])
    except (ImportError, instructions.Uncounted) as reason:
        pytest.skip(f"instructions are not counted: {reason}")
    wrong, _ = instructions.compare(counts, table)
    assert not wrong, "\n".join([*wrong, "if it is meant: python -m bench.instructions --update"])


def test_a_kernel_that_grew_or_is_new_is_reported(instructions):
    table = {("a", "avx2"): 1000, ("b", "avx2"): 1000, ("c", "avx2"): 1000}
    wrong, shrunk = instructions.compare({("a", "avx2"): 1019, ("b", "avx2"): 1021, ("new", "avx2"): 5}, table)
    assert [line.split()[0] for line in wrong] == ["b", "new"] and not shrunk
    assert instructions.compare({("c", "avx2"): 900}, table) == ([], ["c avx2: 1,000 -> 900 instructions (-10.0%)"])


def test_counts_of_another_compiler_are_not_compared(instructions, monkeypatch, tmp_path):
    monkeypatch.setattr(instructions, "TABLE", tmp_path / "instructions.csv")
    with pytest.raises(instructions.Uncounted, match="there is no"):
        instructions.recorded()
    monkeypatch.setattr(instructions, "compiler", lambda: "GNU 12")
    counts = {("a", "avx2"): 10}
    instructions.write(counts)
    assert instructions.recorded() == counts
    monkeypatch.setattr(instructions, "compiler", lambda: "Clang 19")
    with pytest.raises(instructions.Uncounted, match="the table is for GNU 12, this module was compiled by Clang 19"):
        instructions.recorded()
