"""The compiled module: what it links, what it checks, and that each instruction set stays where it belongs."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from processes import python

from pyfused import _binary

pytestmark = pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))
_C = _binary._C


def test_build_info():
    info = _C.build_info()
    assert info["isas"].split()[0] == "baseline"
    assert info["cuda"].startswith(("nvcc", "off"))
    assert set(_C.isas()) <= set(info["isas"].split())


def test_links_no_torch():
    """So that one binary serves every torch, and building needs none."""
    data = Path(_C.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10"):
        assert name not in data, f"the binary mentions {name.decode()}"


def test_imports_without_torch():
    directory = os.path.dirname(_C.__file__)
    run = python(f"import sys; sys.path.insert(0, {directory!r}); import _C; print(_C.isa(), 'torch' in sys.modules)")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[1] == "False"


def test_isa_is_chosen_by_environment():
    for isa in _C.isas():
        run = python("from pyfused import _C; print(_C.isa())", PYFUSED_ISA=isa)
        assert run.stdout.strip() == isa, run.stderr
    run = python("from pyfused import _C; print(_C.isa())")
    assert run.stdout.strip() == _C.isas()[-1], "the fastest usable instruction set is the default"


def test_an_unusable_isa_is_refused_with_the_usable_ones():
    with pytest.raises(ValueError, match=r"'mmx' cannot be used here; usable: baseline"):
        _C.set_isa("mmx")
    run = python("import pyfused; print(pyfused.available_backends()['cpu'])", PYFUSED_ISA="mmx")
    assert run.returncode == 0, "a bad PYFUSED_ISA must not break the import"
    assert "'mmx' cannot be used here" in run.stdout


def test_no_wide_code_outside_its_namespace():
    """A function the linker may merge (weak) must not exist outside its instruction set's namespace, or an AVX-512 copy
    could be the one kept and run on a machine without it."""
    listing = subprocess.run(["nm", "-C", "--defined-only", _C.__file__], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("nm is not installed, or the binary is stripped")
    shared = [
        line
        for line in listing.stdout.splitlines()
        if line.split()[1:2] == ["W"] and "pyfused::View" in line and "pyfused::View::" in line
    ]
    assert not shared, shared


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_driver_is_a_reason_and_no_crash():
    if _C.build_info()["cuda"].startswith("off"):
        pytest.skip(f"built without CUDA: {_C.build_info()['cuda']}")
    assert isinstance(_C.why_no_cuda(0), str)


def test_rejects_what_is_no_tensor():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.embedding_dot(1, 2, 3, 4, 5, 6, 7, 1)


def test_rejects_a_tensor_of_another_device():
    meta = torch.empty(2, 3, device="meta")
    with pytest.raises((ValueError, TypeError, RuntimeError, BufferError)):
        _C.embedding_dot(meta, meta, meta, meta, meta, None, None, 1)
