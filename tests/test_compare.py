"""The comparison of contenders (`pyfused train --compare`, the demo): processes, memory, tables, plots."""

import io
import mmap
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_data import folder, one_thread  # noqa: F401  (fixtures)
from test_train import run

from pyfused import compare, curves
from pyfused.tasks import make_task
from pyfused.train import Options, describe


def quiet():
    return Console(file=io.StringIO())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_a_large_block_and_forgets_it():
    block = mmap.mmap(-1, 64 << 20)  # not malloc, which may keep what is freed
    block.write(b"x" * (64 << 20))
    compare.reset_peak_memory()
    with_block = compare.peak_memory()
    block.close()
    compare.reset_peak_memory()
    assert 60 << 20 < with_block - compare.peak_memory() < 80 << 20


def test_processes_take_turns_and_report(folder):  # noqa: F811
    """Two real training processes: rows of every epoch, parameters that follow each other, a peak of their own."""
    task = make_task("mnist-cnn", folder)
    how, console = Options.of(task, epochs=6), Console(file=io.StringIO(), width=200)
    eager, fused = compare.compare(task, folder, how, 1, console, ("eager NHWC", "fused"))
    lines = console.file.getvalue().splitlines()  # not a terminal: each comes when its epoch is done
    assert [line for line in lines if "epoch 6" in line or "begins" in line] == [
        "mnist-cnn, eager NHWC: begins",
        "mnist-cnn, fused: begins",
        f"mnist-cnn, fused: {describe(fused.rows[5])}",
        f"mnist-cnn, eager NHWC: {describe(eager.rows[5])}",
    ]
    assert [row["epoch"] for row in eager.rows] == [1, 2, 3, 4, 5, 6]
    reference, _ = run(task, epochs=6, batch_size=task.batch_size)
    assert [row["loss"] for row in eager.rows] == pytest.approx([row["loss"] for row in reference], rel=1e-3)
    assert (eager.job.options.mode, fused.job.options.mode) == ("eager", "fused")
    row = compare.summary(fused, eager)
    assert row["early_difference"] < 5e-3 and compare.summary(eager, eager)["early_difference"] == 0
    assert row["speed_up"] == eager.epoch_seconds / fused.epoch_seconds
    assert 50 < row["peak_mib"] < 2000
    assert row["accuracy"] == fused.rows[-1]["accuracy"] and "hr@10" not in row


def test_memory_formats_are_told_apart_for_convolutions_only(folder, monkeypatch):  # noqa: F811
    raced = []
    monkeypatch.setattr(compare, "compete", lambda jobs, steps, console: raced.append([j.contender for j in jobs]))
    for name in ("small-cnn", "mf"):
        task = make_task(name, folder)
        compare.compare(task, folder, Options.of(task), 1, quiet())
    assert raced == [list(compare.CONTENDERS), ["eager", "compile", "fused"]]


def job(name, contender, data=None):
    options = Options(epochs=2, batch_size=9, lr=0.1)
    return compare.Job(name, contender, data, replace(options, **compare.CONTENDERS[contender]), 1)


def test_a_failing_process_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)mnist-cnn, eager: training failed:.*FileNotFoundError"):
        compare.compete([job("mnist-cnn", "eager", tmp_path)], 1, quiet())  # no data there


def test_a_dead_process_is_an_error():
    near, far = multiprocessing.Pipe()
    far.close()
    with pytest.raises(RuntimeError, match="the training process died"):
        compare.take_turn(compare.Outcome(job("mnist-cnn", "fused")), near, print)


def outcomes_of(task, contenders):
    outcomes = []
    for number, contender in enumerate(contenders, 1):
        outcome = compare.Outcome(job(task.name, contender), peak=number << 20)
        outcome.early = {"w": torch.tensor([0.25 * number])}
        quality = {metric: 0.9 for metric in task.metrics}
        outcome.rows = [{"epoch": e, "loss": 1 / e, "seconds": 6 / number, "lr": 1} | quality for e in (1, 2)]
        outcomes.append(outcome)
    return outcomes


@pytest.mark.parametrize("name", ["mnist-cnn", "bpr", "mf"])
def test_table_and_curves(folder, tmp_path, name):  # noqa: F811
    task = make_task(name, folder)
    outcomes = outcomes_of(task, ("eager", "compile", "fused"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compare.table(task, outcomes))
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("fused")]
    assert all(word in line for word in ("0.9000", "2.00", "3.00x", " 3 ", "5.0e-01"))
    assert all(any(label in line for line in lines) for label in task.baselines())
    curves.plot(
        [(task, {outcome.job.contender: outcome.rows for outcome in outcomes})], tmp_path / "new" / "curves.png"
    )
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
