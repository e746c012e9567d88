"""Fixtures shared by all tests: every usable backend and instruction set; what is missing skips with its reason.

With TRITON_INTERPRET=1 in the environment this is another session: only the tests of the Triton backend, whose kernels
then run on CPU tensors (test_triton.py starts it). Of the case table the small cases run at one dtype, in turn; with
--full all at all. --few does so elsewhere, where each case costs a compilation.
"""

import contextlib
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait would spin, on the core that another worker computes on
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulated
import pytest
import torch

import pyfused
from pyfused import _binary, dispatch
from pyfused.fusion import measure

VARIANTS = ["reference", "cpu-baseline", "cpu-avx2", "cpu-avx512", "cuda", "cuda-emulated", "triton"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER_BUDGET = 5_000  # elements of a case
# They run kernels of test_backward.py once more: there a third of the cases, and smaller ones.
AGAIN = ("test_a_second_backward_and_an_expanded_upstream_gradient", "test_any_forward_pairs_with_any_backward")


def pytest_addoption(parser):
    parser.addoption("--emulate-all", action="store_true", help="emulate a GPU for large cases, too (minutes)")
    parser.addoption("--few", action="store_true", help="every case at one dtype, in turn")
    parser.addoption("--full", action="store_true", help="Triton: every case at every dtype, not a few")


def pytest_configure(config):
    config.addinivalue_line("markers", "op(*names): what a test with `variant` and neither `case` nor `op` runs")
    torch.set_num_threads(2)  # as many as the smallest supported machine has; more than one, to reach the parallel code
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions on a GPU are judged as float32
    if INTERPRETED:
        import triton_interpreter

        triton_interpreter.install()


def pytest_collection_modifyitems(config, items):
    few = config.getoption("--few") or (INTERPRETED and not config.getoption("--full"))
    if not few and not INTERPRETED:
        return
    chosen = [i for i in items if (runs_triton(i) or not INTERPRETED) and (not few or is_in_trimmed_set(i))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def runs_triton(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "case" in parameters and "triton" not in dispatch.TABLE[parameters["case"].op]:
        return False
    if {"forward", "backward"} <= parameters.keys():
        return {parameters["forward"], parameters["backward"]} == {"cpu", "triton"}
    return parameters.get("variant") == "triton"


def is_in_trimmed_set(item) -> bool:
    """Cases at one dtype each, in turn; for the interpreter only small ones."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "case" not in parameters:
        return True
    case = parameters["case"]
    again = item.originalname in AGAIN
    if INTERPRETED and emulated.too_large(case, INTERPRETER_BUDGET // (4 if again else 1)):
        return False
    if INTERPRETED and again and sum(case.id.encode()) % 3 != 1:  # which has some of every op
        return False
    return "dtype" not in parameters or parameters["dtype"] == case.dtypes[sum(case.id.encode()) % len(case.dtypes)]


@pytest.fixture(autouse=True)
def tiny_calls_reach_kernels(monkeypatch):
    """Tests are about kernels, and small: nothing is handed to eager PyTorch, but in test_tiny.py."""
    monkeypatch.setattr(dispatch, "may_hand_over", lambda x: False)


@pytest.fixture(params=["emulated", "gpu"])
def device(request):
    """The CUDA backend, emulated and on a GPU where there is one. Gives the tensors' device."""
    if request.param == "gpu" and (reason := pyfused.available_backends()["cuda"]):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        if request.param == "emulated":
            stack.enter_context(emulated.cuda_on_cpu())
        stack.enter_context(pyfused.use_backend("cuda"))
        yield "cpu" if request.param == "emulated" else "cuda"


@pytest.fixture(params=_binary._C.isas() if _binary._C else [])
def isa(request):
    """Run the test on one instruction set of this machine after the other. Gives its name."""
    before = _binary._C.isa()
    _binary._C.set_isa(request.param)
    yield request.param
    _binary._C.set_isa(before)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Run the test on one backend and, for "cpu-*", one instruction set. Gives the device of its tensors."""
    backend, _, how = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if how == "emulated":
            case = request.node.callspec.params.get("case")
            if case and emulated.too_large(case) and not request.config.getoption("--emulate-all"):
                pytest.skip("too large to emulate by default: --emulate-all")
            stack.enter_context(emulated.cuda_on_cpu())
        elif reason := pyfused.available_backends()[backend]:
            pytest.skip(reason)
        elif how:
            stack.enter_context(instruction_set(how))
        skip_without_kernel(request, backend)
        stack.enter_context(pyfused.use_backend(backend))
        yield device_of(backend)


@contextlib.contextmanager
def instruction_set(isa):
    if isa not in _binary._C.isas():
        pytest.skip(f"this CPU has no {isa}")
    before = _binary._C.isa()
    _binary._C.set_isa(isa)
    yield
    _binary._C.set_isa(before)


def skip_without_kernel(request, backend):
    """The op is that of the test's case, its parameter "op", what @pytest.mark.op(...) names, or that of its file."""
    given, marker = request.node.callspec.params, request.node.get_closest_marker("op")
    of_file = request.module.__name__.removeprefix("test_")
    ops = marker.args if marker else [given["case"].op if "case" in given else given.get("op", of_file)]
    for op in ops:
        if op in dispatch.TABLE and backend not in dispatch.TABLE[op]:
            pytest.skip(f"the {backend} backend has no kernel for {op}")


@pytest.fixture
def fused_wins(monkeypatch, tmp_path):
    """pyfused.fuse without a timer: fused calls take half as long. Its cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: [2.0, 1.0])


def device_of(backend: str) -> str:
    """Where a backend's tensors live: a GPU backend that is usable without a GPU runs on CPU tensors."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
