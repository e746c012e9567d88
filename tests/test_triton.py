"""The Triton backend without a GPU: the case table in Triton's interpreter, in a process of its own, since a process
compiles or interprets, whichever it began with. Every case: TRITON_INTERPRET=1 pytest --full tests."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from processes import python

import pyfused

TESTS = Path(__file__).parent
# Some of what is no case: NaN and infinities, ties, some gradients only, a setting or two of each optimizer.
MORE = [
    "test_cross_entropy.py",
    "test_triton_tiles.py",
    *(
        f"test_{op}.py::test_fp16_under_loss_scaling_keeps_its_gradient[triton]"
        for op in ("linear_cross_entropy", "in_batch_cross_entropy")
    ),
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
    # Not from the checkout, whose package would be imported instead of the installed one.
    how = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "TRITON_INTERPRET": "1"}, "text": True}
    command = [sys.executable, "-m", "pytest", "-n", "2", *files]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1500, **how)
    assert run.returncode == 0, run.stdout[-6000:]
    (items,) = re.findall(r"2 workers \[(\d+) items\]", run.stdout)
    ran = sum(int(n) for n in re.findall(r"(\d+) (?:passed|skipped)", run.stdout.splitlines()[-1]))
    assert ran == int(items) > 500, run.stdout[-4000:]


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
    assert common.choose("a", [3, 1, 2], run) == 1 and len(runs) == 3
    assert common.choose("a", [3, 1, 2], None) == 3 and len(runs) == 3  # the same before and after a measurement
    assert common.choose("b", [3, 2, 1], run) == 1 and len(runs) == 6  # another key
    assert common.choose("b", [3, 2], run) == 2 and len(runs) == 8  # other candidates
    assert common.choose("c", [2], run) == 2 and len(runs) == 8  # nothing to choose


def test_autotuning_is_asked_for_by_environment():
    pytest.importorskip("triton")
    for value, expected in (("1", "True"), ("0", "False")):
        run = python("from pyfused.backends.triton.common import AUTOTUNE; print(AUTOTUNE)", PYFUSED_AUTOTUNE=value)
        assert run.stdout.strip() == expected, run.stderr


def test_convolutions_are_measured_anew_for_what_changes_their_time(monkeypatch):
    pytest.importorskip("triton")
    from pyfused.backends.triton import conv2d_relu

    x, weight = torch.empty(2, 8, 9, 9), torch.empty(4, 8, 3, 3)
    inputs = [x, x.to(memory_format=torch.channels_last), x.double(), x.to("meta")]
    keys = {conv2d_relu._key("name", x, weight, (1, 1)) for x in inputs}
    monkeypatch.setattr(conv2d_relu, "_precision", lambda dtype: "tf32")
    assert len({*keys, conv2d_relu._key("name", x, weight, (1, 1))}) == 5


BACKEND = Path(pyfused.__file__).parent / "backends" / "triton"
WAITS = re.compile(r"\.(?:item|tolist|cpu|numpy|nonzero|data_ptr|synchronize)\(")


def test_what_waits_for_the_gpu():
    """The errors, when asked for; of sparse gradients how many rows they have, which PyTorch wants as a shape."""
    found = {(path.name, line.strip()) for path in BACKEND.glob("*.py") for line in path.read_text().splitlines()
             if WAITS.search(line)}  # fmt: skip
    assert found == {
        ("common.py", "torch.cuda.synchronize(device)"),
        ("common.py", "found, argument, position, value, limit = errors.tolist()"),
        ("embedding_dot.py", "count = (rank[-1] + (key[-1] < rows)).item()"),
    }


def test_heads_of_kernels_say_their_bytes_and_their_floor():
    pages = {path: path.read_text() for path in BACKEND.glob("*.py")}
    of_kernels = {path.stem: text.split('"""')[1] for path, text in pages.items() if "_kernel(" in text}
    assert len(of_kernels) >= 5
    for name, head in of_kernels.items():
        assert re.search(r"^Bytes (.|\n)*floor", head, re.MULTILINE), name


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
def test_programs_take_several_rows_of_few_classes(classes):
    page = pytest.importorskip("pyfused.backends.triton.cross_entropy")
    for forward in (True, False):
        rows, block, _ = page.tiles((1, classes, 65536), (0, 1, classes), 4, forward)[0]
        assert block >= classes and rows * block >= min(128 * block, 2048)


BROKEN = {"not importable": "", "another version": "import torch._dynamo, triton; del triton.jit; "}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_triton_is_a_reason_and_no_crash(how, tmp_path):
    path = os.environ.get("PYTHONPATH", "")
    if how == "not importable":
        (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: no such file')")
        path = f"{tmp_path}{os.pathsep}{path}".rstrip(os.pathsep)
    else:
        pytest.importorskip("triton")
    code = "import pyfused; print(pyfused.available_backends()['triton'])"
    run = python(BROKEN[how] + code, PYTHONPATH=path, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("the package triton cannot be used: "), run.stdout


@pytest.mark.parametrize("problem", ["an old GPU", "no C compiler", None])
def test_a_gpu_that_triton_cannot_serve_is_a_reason(problem, monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    from pyfused.backends import triton as backend

    class Driver:
        def get_current_device(self):
            if problem:
                raise RuntimeError("Failed to find C compiler")

    capability = (7, 5) if problem == "an old GPU" else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runtime, "driver", types.SimpleNamespace(active=Driver()))
    reason = backend.unusable_on.__wrapped__(0)
    expected = {"an old GPU": "compute capability 8.0", "no C compiler": "C compiler"}
    assert expected[problem] in reason if problem else reason is None


# --- The note of a label or an id out of range
GPU = torch.device("cuda", 1)


def test_the_note_is_not_made_within_a_cuda_graph(monkeypatch):
    common = pytest.importorskip("pyfused.backends.triton.common")
    monkeypatch.setattr(common, "_index_errors", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph captures"):
        common.index_errors(GPU)


def test_notes_of_all_streams_are_read_and_none_is_cleared_unread(monkeypatch):
    common = pytest.importorskip("pyfused.backends.triton.common")
    note, events = torch.zeros(5, dtype=torch.int64), []

    def synchronize(device):  # the kernel of another stream is done only now
        events.append((device, note.tolist()))
        note[:] = torch.tensor([1, 0, 3, 9, 9]) if len(events) == 1 else note

    monkeypatch.setattr(common, "_index_errors", {GPU: note})
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(IndexError, match=r"target 9 is out of bounds: target\[3\]"):
        common.check_errors()
    assert events == [(GPU, [0] * 5)] * 2  # and the clearing is over
    common.check_errors()


def test_the_grid_of_the_mask_has_one_dimension(monkeypatch):
    """Others end at 65535."""
    page = pytest.importorskip("pyfused.backends.triton.in_batch_cross_entropy")
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(page, "_mask_kernel", Kernel())
    page._mask(torch.empty(10**7, device="meta"))(torch.empty(20, 10**7, device="meta"), 0)
    assert grids == [(2 * 78125,)]
