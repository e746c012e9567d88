"""gpu_check.sh and the benchmark on a GPU, without one: what runs, in which order, and what a second call does."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import gpu, gpu_kernels, harness


def test_stages_of_the_gpu_check(tmp_path):
    """In order of importance: building, the tests of both GPU backends and memcheck fit into one call's 520 seconds."""
    stub = tmp_path / "timeout"  # instead of running a stage: its time limit
    stub.write_text('#!/bin/sh\necho "$*" >>"$0.log"\necho "$3"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "/nowhere/python3"}

    def seconds(*stages, **more):
        command = ["bash", Path(__file__).with_name("gpu_check.sh"), tmp_path / "-".join(("out", *stages)), *stages]
        run = subprocess.run(command, env=environment | more, check=True, capture_output=True, text=True)
        return {line.split()[0]: int(line.split()[-1]) for line in run.stdout.splitlines()[:-1]}

    everything = seconds()
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
        assert {"./summary.txt", "./kernels.log"} <= set(results.getnames())
    names = list(everything)
    assert names[:4] == ["machine", "build", "tests-gpu", "tests-triton"] and "tests-autotune" in names
    assert sum(everything[n] for n in names[: names.index("memcheck-triton") + 1]) <= 520
    assert list(seconds("bench", "memcheck")) == ["memcheck", "bench"]
    commands = stub.with_suffix(".log").read_text().splitlines()
    assert all(" /nowhere/python3 -m " in command or " bash -c " in command for command in commands), commands
    # Compiling for other GPUs and emulating one take minutes, and need none.
    tests = [command for command in commands if "pytest" in command and "not (cuda" not in command]
    assert len(tests) == 4
    for command in tests:
        assert 0 < command.count("not emulat") == command.count("not resources") + command.count("not interpreter")
    # With more time nothing is left out, and every stage has more.
    assert 1000 <= sum(everything.values()) <= 1060
    assert seconds(GPU_CHECK_SECONDS="5300") == {name: 5 * limit for name, limit in everything.items()}
    assert "bench --minutes 15" in stub.with_suffix(".log").read_text()


def test_the_gpu_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A call that was out of time leaves its rows and their table; the next runs what is missing, also what failed."""
    ran, broken = [], []

    def run_case(case, direction, device, **options):
        ran.append(case.title(direction))
        if ran[-1] in broken:
            raise RuntimeError("out of memory")
        numbers = dict.fromkeys(harness.COLUMNS, 1.0)
        names = {"op": case.case.op, "case": case.case.name, "dtype": str(case.case.dtype)[6:], "direction": direction}
        return [numbers | names | {"contender": name, "shape": case.case.shape_text} for name in ("eager", "pyfused")]

    def call(minutes):
        before = len(ran)
        monkeypatch.setattr("sys.argv", ["gpu", str(tmp_path), "--minutes", str(minutes)])
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 60 * (len(ran) - before)))
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return end.value.code

    monkeypatch.setattr(gpu, "run_case", run_case)
    titles = [case.title(direction) for case, direction in gpu.races([])]
    broken.append(titles[1])
    assert call(3) == "1 failed" and ran == titles[:3]
    table = (tmp_path / "table.txt").read_text()
    assert gpu.LARGE[0].name in table and gpu.LARGE[1].name in table
    broken.clear()
    ran.clear()
    assert call(len(titles)) == 0 and ran == [titles[1], *titles[3:]]
    assert gpu.FULL[-1].name in (tmp_path / "table.txt").read_text() and call(1) == 0 and len(ran) == len(titles) - 2


def test_every_kernel_that_is_timed_alone_can_run():
    """All but those of the CUDA backend alone, in small, in eager PyTorch."""
    names = []
    for kernel in gpu_kernels.kernels("reference", torch.device("cpu"), part=4096):
        names.append(kernel.name)
        kernel.make()()
    assert len(names) == len(set(names)) and {name.split()[0] for name in names} == {"cross_entropy", "embedding_dot"}
    copy = gpu_kernels.copy_of(1 << 20, torch.device("cpu"))
    assert len(gpu_kernels.inputs(copy)) == 16 and copy.make()().nbytes == 1 << 19
