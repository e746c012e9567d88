"""Fixtures shared by all tests: every usable backend and instruction set; what is missing skips with its reason."""

import pytest
import torch

import pyfused
from pyfused import _binary
from pyfused.fusion import measure

VARIANTS = ["reference", "cpu-baseline", "cpu-avx2", "cpu-avx512", "cuda", "triton"]


def pytest_configure(config):
    torch.set_num_threads(2)  # as many as the smallest supported machine has; more than one, to reach the parallel code


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Run the test on one backend and, for "cpu-*", one instruction set. Gives the device of its tensors."""
    backend, _, isa = request.param.partition("-")
    if reason := pyfused.available_backends()[backend]:
        pytest.skip(reason)
    if isa and isa not in _binary._C.isas():
        pytest.skip(f"this CPU has no {isa}")
    before = _binary._C.isa() if isa else None
    if isa:
        _binary._C.set_isa(isa)
    with pyfused.use_backend(backend):
        yield "cuda" if backend in ("cuda", "triton") else "cpu"
    if isa:
        _binary._C.set_isa(before)


@pytest.fixture
def fused_wins(monkeypatch, tmp_path):
    """pyfused.fuse without a timer: fused calls take half as long. Its cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: [2.0, 1.0])
