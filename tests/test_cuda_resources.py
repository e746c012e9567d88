"""What nvcc made of csrc/cuda: registers, no spills, no local memory, 16-byte accesses. Read from the module as it was
built, for all of its architectures. Needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyfused import _C

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(s.stem for s in (CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


def disassembler() -> str | None:
    """Triton's package carries one."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in triton.submodule_search_locations] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


CUOBJDUMP = disassembler()

pytestmark = [
    pytest.mark.skipif(not _C.build_info()["cuda"].startswith("nvcc"), reason="pyfused was built without CUDA"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump on the path, nor Triton's package, which carries one"),
]


@dataclass
class Kernel:
    mangled: str
    name: str  # demangled, without namespaces and parameters: "forward_rows<false, float, float, float>"
    architecture: int
    registers: int
    stack: int  # bytes; spills, too, go there
    shared: int  # bytes of static shared memory
    ptx: str


def plain(mangled: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    names = re.sub(r"(\w+|\(anonymous namespace\))::", "", text).splitlines()
    return [re.sub(r"\(.*", "", name.removeprefix("void ")) for name in names]


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the path, which knows the architectures")
def test_the_build_holds_code_for_every_architecture_from_80_on():
    """Machine code of the same major version, or the PTX of an older one."""
    cmake = (CSRC.parent / "CMakeLists.txt").read_text()
    assert cmake.count("set(PYFUSED_CUDA_ARCHITECTURES ") == 1, "one list, to which newer compilers append"
    pattern = r"(?:set\(|APPEND )PYFUSED_CUDA_ARCHITECTURES ([\w -]+)\)"
    listed = [x for found in re.findall(pattern, cmake) for x in found.split()]
    split = [(int(x.partition("-")[0]), x.partition("-")[2]) for x in listed]
    machine, ptx = ([n for n, kind in split if kind != other] for other in ("virtual", "real"))
    known = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    for a in map(int, re.findall(r"sm_(\d+)\b", known)):
        assert a < 80 or any(m // 10 == a // 10 and m <= a for m in machine) or any(p <= a for p in ptx), a


def dump(*options: str) -> str:
    """What cuobjdump finds in the module."""
    return subprocess.run([CUOBJDUMP, *options, _C.__file__], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Kernel]]:
    """By source: every kernel for every architecture."""
    entry = r"\.entry (\w+)\((.*?)(?=\.entry |^Fatbin |\Z)"
    ptx = dict(re.findall(entry, dump("-ptx"), re.S | re.M))
    if not ptx:
        pytest.skip("pyfused was built without PTX, for a single architecture")
    result = {source: [] for source in SOURCES}
    for architecture, listed in re.findall(r"^arch = sm_(\d+)$(.*?)(?=^arch = |\Z)", dump("-res-usage"), re.S | re.M):
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listed)
        for (mangled, *numbers), name in zip(found, plain([f[0] for f in found]), strict=True):
            source = re.search(r"_GLOBAL__N__\w{8}_\d+_(\w+?)_cu_\w{8}", mangled)[1]
            registers, stack, shared = map(int, numbers)
            if shared and int(architecture) >= 90:
                shared -= 1 << 10  # what the system keeps of each block's, counted with it
            result[source].append(Kernel(mangled, name, int(architecture), registers, stack, shared, ptx[mangled]))
    return result


def test_every_kernel_was_found_for_every_architecture(kernels):
    architectures = {
        int(a) for a in re.findall(r"\b\d+(?=$| |-real)", _C.build_info()["cuda"].split("architectures")[1])
    }
    for source, found in kernels.items():
        names = {a: sorted(k.name for k in found if k.architecture == a) for a in architectures}
        assert names[90] and all(names[a] == names[90] for a in architectures), source
        assert len(found) == len(architectures) * len(names[90]), source


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_local_memory(kernels, source):
    bad = [k for k in kernels[source] if k.stack]
    assert not bad, [f"{k.name} on sm_{k.architecture}: {k.stack} bytes of stack" for k in bad]


# The most dynamic shared memory in KB that their launchers ask for: kSharedBytes; kStages x 3 operands x
# Tile<true>::bytes; 3 x kMostPanels x kPanel. The emulation refuses more than 96.
DYNAMIC = {
    **{"conv2d_direct": 47, "conv2d_direct_backward": 47},
    **{"conv2d_implicit_gemm": 72, "conv2d_implicit_gemm_backward_weight": 72},
    **{"in_batch_cross_entropy": 96, "in_batch_cross_entropy_backward": 96},
}


@pytest.mark.parametrize("source", SOURCES)
def test_static_and_dynamic_shared_memory_fit_together(kernels, source):
    """What `launch` does not ask for must fit into 48 KB, all into the 99 KB of sm_86, 89 and 120."""
    common = (CSRC / "cuda" / "common.cuh").read_text()
    assert "if (shared_bytes > (48 << 10) - kMostStaticBytes)" in common
    most_static = int(re.search(r"kMostStaticBytes = (\d+) << 10;", common)[1]) << 10
    dynamic = {k.name for k in kernels[source] if "_rawE" in k.ptx}  # PYFUSED_DYNAMIC_SHARED
    assert bool(dynamic) == (source in DYNAMIC)
    for k in kernels[source]:
        if k.name in dynamic:
            assert k.shared <= most_static and k.shared + (DYNAMIC[source] << 10) <= 99 << 10, (k.name, k.shared)


def of(kernels, source: str, name: str) -> list[Kernel]:
    """The kernels of this name, at the architecture whose PTX there is."""
    found = [k for k in kernels[source] if k.name.startswith(name) and k.architecture == 90]
    assert found, f"no kernel {name} in {source}"
    return found


def accesses(kernel: Kernel, kind: str) -> int:
    """16-byte loads ("ld") or stores ("st") of global memory."""
    return len(re.findall(rf"{kind}\.global(?:\.\w+)*\.v(?:4\.[bfu]32|2\.[bfu]64)", kernel.ptx))


@pytest.mark.parametrize(
    ("source", "name", "stores"),
    [("cross_entropy", "forward_rows", False), ("cross_entropy_backward", "backward_rows", True)],
)
def test_cross_entropy_moves_16_bytes_at_a_time(kernels, source, name, stores):
    for kernel in of(kernels, source, name):
        assert accesses(kernel, "ld"), kernel.name
        assert accesses(kernel, "st") or not stores, kernel.name


def loads_under_way(code: list[str]) -> int:
    """The most loads of global memory after each other of which none has been waited for, by a use of what it loads."""
    most, loaded, count = 0, set(), 0
    for instruction in code:
        load = re.search(r"\bLDG\.\S+ R(\d+),", instruction)
        registers = [int(r) for r in re.findall(r"\bR(\d+)", instruction)][1 if load else 0 :]
        if loaded.intersection(registers):
            loaded, count = set(), 0
        if load:
            width = int(re.search(r"\.(64|128) R|$", instruction)[1] or 32) // 32
            loaded.update(range(int(load[1]), int(load[1]) + width))
            count += 1
            most = max(most, count)
    return most


@pytest.mark.parametrize(
    ("source", "name", "least"),
    [
        ("cross_entropy", "forward_rows<false", 4),
        ("cross_entropy", "forward_columns<false", 8),
        ("cross_entropy_backward", "backward_rows<false", 4),
        ("cross_entropy_backward", "backward_columns<false", 8),
        ("embedding_dot", "gather", 4),
        ("embedding_dot", "forward<float, true, 1>", 2),
        ("conv2d_epilogue", "relu_grad", 2),
    ],
)
def test_loads_are_under_way_together(kernels, source, name, least):
    """In the machine code: the compiler may put a use, such as a copy to another register, between two loads."""
    looked_at = of(kernels, source, name)
    text = dump("-sass", "-arch", "sm_90", "-fun", ",".join(k.mangled for k in looked_at))
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", text, re.S))
    for kernel in looked_at:
        code = re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", bodies[kernel.mangled])
        assert loads_under_way(code) >= least, f"{kernel.name}: {loads_under_way(code)} loads"


@pytest.mark.parametrize("name", ["forward_rows", "backward_rows"])
def test_cross_entropy_leaves_room_for_enough_threads(kernels, name):
    """To hide the memory's latency: half of the threads that a multiprocessor can hold, for labels and no extras."""
    for source in ("cross_entropy", "cross_entropy_backward"):
        for k in kernels[source]:
            if k.name.startswith(f"{name}<false, true") and "double" not in k.name:
                assert k.registers <= 64, f"{k.name} on sm_{k.architecture}: {k.registers} registers"


@pytest.mark.parametrize(
    ("source", "name", "stores"),
    [
        ("embedding_dot", "forward", False),
        ("embedding_dot_backward", "sum_tiles", True),
        ("embedding_dot_update", "sum_tiles", True),
    ],
)
def test_aligned_embedding_rows_move_16_bytes_at_a_time(kernels, source, name, stores):
    aligned = [k for k in of(kernels, source, name) if re.match(rf"{name}<\w+, true", k.name)]
    assert aligned
    for kernel in aligned:
        assert accesses(kernel, "ld") or "cp.async.cg.shared.global" in kernel.ptx, kernel.name
        assert accesses(kernel, "st") or not stores or "Squares" in kernel.name, kernel.name


def test_direct_convolution_reads_shared_memory_16_bytes_at_a_time(kernels):
    for source, name in (("conv2d_direct", "forward"), ("conv2d_direct_backward", "sum_products")):
        for kernel in of(kernels, source, name):
            assert re.search(r"ld\.shared\.v4\.[bfu]32", kernel.ptx), kernel.name
            assert kernel.registers <= 128, kernel.name


def test_pooling_moves_16_bytes_at_a_time(kernels):
    for name in ("pool", "unpool"):
        vectors = [k for k in of(kernels, "conv2d_pool", f"{name}<") if not k.name.endswith(", 1>")]
        assert len(vectors) == 4
        for kernel in vectors:
            assert accesses(kernel, "ld") and accesses(kernel, "st"), kernel.name


GEMM = [
    ("conv2d_implicit_gemm", "convolve", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
    ("conv2d_implicit_gemm_backward_weight", "backward_weight", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"),
]


@pytest.mark.parametrize(("source", "name", "matrices"), GEMM)
def test_convolutions_use_tensor_cores_and_copy_asynchronously(kernels, source, name, matrices):
    for kernel in of(kernels, source, name):
        products = len(re.findall(r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(?:f16|bf16|tf32)", kernel.ptx))
        passes = 3 if kernel.name.startswith(f"{name}<float, true") else 1
        assert products == 2 * passes * (16 if ", true>" in kernel.name else 8), f"{kernel.name}: {products} products"
        assert matrices in kernel.ptx or "float" in kernel.name, kernel.name  # it does not transpose 32-bit numbers
        assert "cp.async.cg.shared.global" in kernel.ptx, kernel.name


@pytest.mark.parametrize(("source", "name", "matrices"), GEMM)
def test_two_blocks_of_a_convolution_fit_a_multiprocessor(kernels, source, name, matrices):
    """In 16 bits, with 256 threads and large tiles: at most 128 registers of 65536 / 512."""
    for k in kernels[source]:
        if re.match(rf"{name}<__\w+, false, true>", k.name):
            assert k.registers <= 128, f"{k.name} on sm_{k.architecture}: {k.registers} registers"


@pytest.mark.parametrize("source", ["in_batch_cross_entropy", "in_batch_cross_entropy_backward"])
def test_in_batch_softmax_uses_tensor_cores_and_copies_asynchronously(kernels, source):
    backward = source.endswith("backward")
    for kernel in of(kernels, source, "gradient" if backward else "forward"):
        products = len(re.findall(r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(?:f16|bf16|tf32)", kernel.ptx))
        panels = int(kernel.name[-2]) if backward else 0
        assert products == 16 + 16 * panels, f"{kernel.name}: {products} products"
        assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in kernel.ptx, kernel.name
        transposed = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in kernel.ptx
        assert transposed == (backward and "<float" not in kernel.name), kernel.name  # 32-bit numbers cannot be
        assert "cp.async.cg.shared.global" in kernel.ptx and "atom" not in kernel.ptx, kernel.name


def test_blocks_of_the_in_batch_softmax_that_fit_a_multiprocessor(kernels):
    """By their registers, 128 threads each: rows of 128 bytes four blocks, of 256 three, of 512 two."""
    for source, name in (("in_batch_cross_entropy", "forward<"), ("in_batch_cross_entropy_backward", "gradient<")):
        for k in (k for k in kernels[source] if k.name.startswith(name)):
            most = {"4>": 168, "8>": 255}.get(k.name[-2:], 128)
            assert k.registers <= most, f"{k.name} on sm_{k.architecture}: {k.registers} registers"
