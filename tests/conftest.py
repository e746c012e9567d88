"""Fixtures shared by all tests: every usable backend and instruction set; what is missing skips with its reason."""

import contextlib

import emulated
import pytest
import torch

import pyfused
from pyfused import _binary, dispatch
from pyfused.fusion import measure

VARIANTS = ["reference", "cpu-baseline", "cpu-avx2", "cpu-avx512", "cuda", "cuda-emulated", "triton"]


def pytest_addoption(parser):
    parser.addoption("--emulate-all", action="store_true", help="emulate a GPU for large cases, too (minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "op(*names): what a test with `variant` and neither `case` nor `op` runs")
    torch.set_num_threads(2)  # as many as the smallest supported machine has; more than one, to reach the parallel code


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
        yield "cuda" if backend in ("cuda", "triton") and how != "emulated" else "cpu"


@contextlib.contextmanager
def instruction_set(isa):
    if isa not in _binary._C.isas():
        pytest.skip(f"this CPU has no {isa}")
    before = _binary._C.isa()
    _binary._C.set_isa(isa)
    yield
    _binary._C.set_isa(before)


def skip_without_kernel(request, backend):
    """The op is that of the test's case, its parameter "op", or what @pytest.mark.op(...) names."""
    given, marker = request.node.callspec.params, request.node.get_closest_marker("op")
    ops = marker.args if marker else [given["case"].op if "case" in given else given["op"]]
    for op in ops:
        if backend not in dispatch.TABLE[op]:
            pytest.skip(f"the {backend} backend has no kernel for {op}")


@pytest.fixture
def fused_wins(monkeypatch, tmp_path):
    """pyfused.fuse without a timer: fused calls take half as long. Its cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: [2.0, 1.0])
