"""The Triton backend without a GPU: the case table in Triton's interpreter, in a process of its own, since a process
compiles or interprets, whichever it began with. Every case: TRITON_INTERPRET=1 pytest --full tests."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Some of what is no case: NaN and infinities, ties, some gradients only, a setting or two of each optimizer.
MORE = [
    "test_cross_entropy.py",
    "test_triton_tiles.py",
    "test_conv2d_relu.py::test_ties_after_rounding",
    "test_conv2d_relu.py::test_special_values",
    "test_conv2d_relu.py::test_every_subset_of_gradients[triton-direct-conv2d_relu_max_pool2d]",
    "test_conv2d_relu.py::test_every_subset_of_gradients[triton-aten-conv2d_relu]",
    *(
        f"test_optim.py::test_as_torchs_optimizer[triton-{setting}]"
        for setting in ("SGD-padding per user-bfloat16", "Adagrad-padding-float64", "RowwiseAdagrad-chunks-float32",
                        "Adam-dim 1-float16", "Adam-padding-float32")
    ),
]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_case_table_in_the_interpreter():
    files = [str(TESTS / name) for name in ("test_forward.py", "test_backward.py", "test_index_errors.py", *MORE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        env=environment,
        cwd=tempfile.gettempdir(),  # not the checkout, whose package would be imported instead of the installed one
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = int(run.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 250  # the trimmed set did run


def test_autotuning_measures_once_and_only_when_asked(monkeypatch):
    pytest.importorskip("triton")
    from pyfused.backends.triton import common

    runs, capturing = [], False
    monkeypatch.setattr(common.triton.testing, "do_bench", lambda run, **options: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(common, "_chosen", {})

    def run(seconds):
        runs.append(seconds)
        return seconds

    monkeypatch.setattr(common, "AUTOTUNE", False)
    assert common.choose("a", [3, 1, 2], run) == 3 and not runs
    monkeypatch.setattr(common, "AUTOTUNE", True)
    capturing = True
    assert common.choose("a", [3, 1, 2], run) == 3 and not runs  # a rule of thumb within a CUDA graph
    capturing = False
    assert common.choose("a", [3, 1, 2], None) == 3 and not runs  # what must not run twice is not measured
    assert common.choose("a", [3, 1, 2], run) == 1 and runs == [3, 1, 2]
    assert common.choose("a", [3, 1, 2], run) == 1 == common.choose("a", [3, 1, 2], None) and len(runs) == 3
    assert common.choose("b", [2, 3], run) == 2 and len(runs) == 5  # another key
    assert common.choose("c", [2], run) == 2 and len(runs) == 5  # nothing to choose
