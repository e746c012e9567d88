"""The Triton backend without a GPU: the case table in Triton's interpreter, in a process of its own, since a process
compiles or interprets, whichever it began with. Every case: TRITON_INTERPRET=1 pytest --full tests."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Some of what is no case: NaN and infinities, ties, some gradients only, a setting or two of each optimizer.
MORE = [
    "test_cross_entropy.py",
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
