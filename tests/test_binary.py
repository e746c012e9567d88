"""The compiled module: what it links, what it checks, and that each instruction set stays where it belongs."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import python

from pyfused import _binary

pytestmark = pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))
_C = _binary._C
CSRC = Path(__file__).parents[1] / "csrc"


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


# Standard headers whose functions are inlined or C: none leaves a template instance for the linker to merge.
HARMLESS = {"cmath", "cstddef", "cstdint", "cstring", "immintrin.h", "type_traits", "utility"}


def test_kernels_share_no_template_code_between_instruction_sets():
    """The linker keeps one copy of a template instance (of <algorithm> or <vector>, say) for all files. If that is the
    AVX-512 one, it runs on machines without it. So what is compiled per instruction set includes no such header."""
    csrc = Path(__file__).parents[1] / "csrc"
    not_per_isa = {"isa.cpp", "isa.h", "cache.cpp", "cache.h", "threads.cpp", "threads.h"}
    sources = [f for f in csrc.glob("cpu/**/*") if f.suffix in (".h", ".cpp") and f.name not in not_per_isa]
    assert len(sources) > 10, "the kernels have moved: look for them there"
    for source in [*sources, csrc / "tensor_view.h"]:
        included = set(re.findall(r"#include <([^>]+)>", source.read_text()))
        assert included <= HARMLESS, f"{source.name} includes {included - HARMLESS}"


@pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="no objdump for x86")
def test_the_lookup_of_embeddings_prefetches():
    """GCC drops calls of a function that does nothing but prefetch: it must have been inlined. No result shows it."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = dict(re.findall(r"^\w+ <(.*)>:\n((?:.+\n)+)", code, re.M))
    lookups = [name for name in functions if re.search(r"::score<\w+, \S+>\(", name) and "[clone" not in name]
    assert len(lookups) == 8 * len(_C.build_info()["isas"].split())
    for name in lookups:
        assert "prefetch" in functions[name], name


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++ here")
@pytest.mark.parametrize("source", sorted((CSRC / "cpu").rglob("*.cpp")), ids=lambda path: path.stem)
def test_clang_takes_the_sources(source):
    """Macs have no other compiler."""
    avx2 = ["-DPYFUSED_HAS_AVX2", "-mavx2", "-mfma", "-mf16c"] if platform.machine() in ("x86_64", "AMD64") else []
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command = ["clang++", "-std=c++17", "-fsyntax-only", "-DPYFUSED_ISA=baseline", f"-I{CSRC}", *warnings, *avx2]
    run = subprocess.run([*command, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:4000]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_driver_is_a_reason_and_no_crash():
    if _C.build_info()["cuda"].startswith("off"):
        pytest.skip(f"built without CUDA: {_C.build_info()['cuda']}")
    assert isinstance(_C.why_no_cuda(0), str)


def test_rejects_what_is_no_tensor():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.mask_accidental_hits("scores", torch.zeros(2, dtype=torch.int64), 0, 1)


@pytest.mark.parametrize(
    "scores", [torch.empty(2, 2, device="meta"), torch.zeros(2, 2).to_sparse()], ids=["meta", "coo"]
)
def test_rejects_a_tensor_without_memory_of_its_own(scores):
    ids = torch.zeros(2, dtype=torch.int64)
    _C.mask_accidental_hits(torch.zeros(2, 2), ids, 0, 1)  # right but for the tensor
    with pytest.raises(RuntimeError, match=r"meta|storage"):
        _C.mask_accidental_hits(scores, ids, 0, 1)
