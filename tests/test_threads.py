"""The CPU kernels' threads where the compiler has no OpenMP, as on Macs: a program built without it here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(os.name == "nt" or COMPILER is None, reason="needs a C++ compiler, and fork()")
@pytest.mark.parametrize("what, flags", [("fork", ["-O2"]), ("races", ["-O1", "-g", "-fsanitize=thread"])])
def test_threads_without_openmp(tmp_path, what, flags):
    program, sources = tmp_path / "threads", [TESTS / "threads.cpp", CSRC / "cpu" / "threads.cpp"]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-pthread", *flags, f"-I{CSRC}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and what == "races" and "tsan" in built.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program, what], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
