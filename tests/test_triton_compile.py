"""What Triton makes of the kernels for GPUs that are not there: that it compiles them; spills, registers, shared memory
and 16-byte accesses. With --full for the whole case table (an hour)."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

TESTS = Path(__file__).parent
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # of a program
KIND = {"ld": r"ld\.|cp\.|_load_", "st": r"st\.|_store_"}
ODD = ("(64, 50257)", "soft 4097")  # rows that begin within 16 bytes
WIDE = {"ld": ("ld.global.v4.b32", "ld.global.v2.b64", "cp.async.0x10", "_load_dwordx4"),
        "st": ("st.global.v4.b32", "st.global.v2.b64", "_store_dwordx4")}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(request, tmp_path_factory) -> list[dict]:
    """Every kernel on every target, as triton_compile.describe has it; two compile at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    full = ["--full"] * request.config.getoption("--full")
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "triton_compile.py"), *targets, *full],
            env=environment, cwd=environment["TRITON_CACHE_DIR"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for targets in (("sm_80", "sm_100"), ("sm_90", "gfx942"))
    ]  # fmt: skip
    found = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=10_000 if full else 900)
            assert process.returncode == 0, errors[-4000:]
            found += json.loads(out)
    finally:
        for process in processes:
            process.kill()
    return found


def name(kernel: dict) -> str:
    return "{file}:{kernel} in {op} {setting}, tile {tile}, on {target}".format(**kernel)


def test_every_kernel_compiles_for_every_target(kernels):
    compiled = {(k["file"], k["kernel"], k["target"]) for k in kernels}
    backend = Path(importlib.util.find_spec("pyfused.backends.triton").origin).parent
    written = {
        (path.stem, f.name)
        for path in backend.glob("*.py")
        for f in ast.parse(path.read_text()).body
        if isinstance(f, ast.FunctionDef) and f.name.endswith("_kernel")
    }
    assert len(written) >= 7
    assert compiled == {(*kernel, target) for kernel in written for target in SHARED_MEMORY}


def test_nothing_spills_and_everything_can_be_launched(kernels, request):
    """AMD's scalars are spilled to the lanes of a vector register, of which there are 64."""
    # --full adds shapes and tiles beyond those that people call: there ptxas parks a few numbers of some convolutions.
    full = request.config.getoption("--full")
    for k in kernels:
        allowed = 16 if full and k["file"] == "conv2d" else 0
        assert k["spilled"] <= allowed, f"{name(k)} spills: {k['spilled']} bytes, with {k['registers']} registers"
        assert k.get("scalars_spilled", 0) <= 64, name(k)
        assert k["shared"] <= SHARED_MEMORY[k["target"]], f"{name(k)}: {k['shared']} bytes of shared memory"
        assert k["target"] == "gfx942" or 32 * k["warps"] * k["registers"] <= 65536, name(k)


def bytes_of(access: str) -> int:
    if match := re.search(r"(?:\.v(\d))?\.b(\d+)$", access):
        return int(match[1] or 1) * int(match[2]) // 8
    if match := re.search(r"0x(\d+)$", access):
        return int(match[1], 16)
    match = re.search(r"_(?:dword(?:x(\d))?|(u?short|u?byte|[su]byte)\w*)$", access)
    return {"s": 2, "b": 1}[match[2].lstrip("u")[0]] if match[2] else 4 * int(match[1] or 1)


HOT = {  # (file, kernel, how a setting begins): which accesses must be 16 bytes wide
    ("cross_entropy", "_forward_kernel", "(64, 32768)"): "ld",
    ("cross_entropy", "_backward_kernel", "(64, 32768)"): "ld st",
    ("cross_entropy", "_forward_kernel", "(64, 50257)"): "ld",
    ("cross_entropy", "_backward_kernel", "(64, 50257)"): "ld st",
    ("cross_entropy", "_forward_kernel", "with numbers"): "ld",
    ("cross_entropy", "_backward_kernel", "with numbers"): "ld st",
    ("cross_entropy", "_forward_kernel", "(65536, 16)"): "ld",
    ("cross_entropy", "_backward_kernel", "(65536, 16)"): "ld st",
    ("cross_entropy", "_forward_kernel", "(2, 21, 64, 64)"): "ld",
    ("cross_entropy", "_backward_kernel", "(2, 21, 64, 64)"): "ld st",
    ("cross_entropy", "_forward_kernel", "soft 4096"): "ld",
    ("cross_entropy", "_backward_kernel", "soft 4096"): "ld st",
    ("cross_entropy", "_forward_kernel", "soft 4097"): "ld",
    ("cross_entropy", "_backward_kernel", "soft 4097"): "ld st",
    ("embedding_dot", "_forward_kernel", "64"): "ld",
    ("embedding_dot", "_forward_kernel", "128"): "ld",
    ("embedding_dot", "_sum_kernel", "64"): "ld",
    ("embedding_dot", "_sum_kernel", "128"): "ld",
    ("conv2d", "_forward_kernel", "64"): "ld st",
    ("conv2d", "_forward_kernel", "strict"): "ld st",
    ("conv2d", "_forward_kernel", "pooled"): "ld",
    ("conv2d", "_backward_input_kernel", "64"): "ld",
    ("conv2d", "_backward_input_kernel", "strict"): "ld",
    ("conv2d", "_backward_input_kernel", "pooled"): "ld",
    ("conv2d", "_backward_weight_kernel", "64"): "ld",
    ("conv2d", "_backward_weight_kernel", "strict"): "ld",
    ("conv2d", "_backward_weight_kernel", "pooled"): "ld",
    ("conv2d", "_gradient_kernel", "grouped"): "ld st",
    ("conv2d", "_pool_kernel", "overlapping"): "ld",
}


def widths(kernel: str, setting: str, target: str, kind: str) -> tuple[tuple[str, ...], float]:
    """(accesses that are wide, which share they have of the bytes that all of this kind in the text move, at least).

    Others are for rows, not elements; where rows are odd also for blocks that do not lie within one, as many again.
    There AMD's waves, twice as wide with the number of warps that suits NVIDIA, are left with 8 bytes for a thread.
    """
    by_8 = ("_load_dwordx2", "_store_dwordx2") if setting in ODD and target == "gfx942" else ()
    return WIDE[kind] + by_8, 0.2 if setting in ODD or kernel == "_sum_kernel" else 0.35


@pytest.mark.parametrize(("file", "kernel", "setting"), HOT)
def test_hot_kernels_move_16_bytes_at_a_time(kernels, file, kernel, setting):
    those = [
        k
        for k in kernels
        if (k["file"], k["kernel"]) == (file, kernel) and k["setting"].startswith(setting + " ") and not k["tile"]
    ]
    assert len({k["target"] for k in those}) == len(SHARED_MEMORY)
    for k in those:
        for kind in HOT[file, kernel, setting].split():
            moved = {a: n * bytes_of(a) for a, n in k["accesses"].items() if re.search(KIND[kind], a)}
            wide, share = widths(kernel, setting, k["target"], kind)
            found = sum(n for a, n in moved.items() if a.endswith(wide))
            assert found >= share * sum(moved.values()), f"{name(k)}: {k['accesses']}"


def test_streaming_kernels_leave_room_for_enough_threads(kernels):
    """To hide the memory's latency: a third of the threads that a multiprocessor of 64 K registers can hold."""
    streaming = {("cross_entropy", "(64, 32768)"), ("cross_entropy", "(64, 50257)"), ("embedding_dot", "33")}
    found = set()
    for k in kernels:
        setting = (k["file"], k["setting"].partition(" torch")[0])
        if setting in streaming and k["target"] != "gfx942" and not k["tile"]:
            found.add(setting)
            assert k["registers"] <= 96, f"{name(k)}: {k['registers']} registers"
    assert found == streaming


def test_other_numbers_compile_nothing_again(kernels):
    """Smoothing, z-loss and softcap may change at every step; they come in as float64, which loses nothing."""
    settings = {k["setting"] for k in kernels if k["setting"].startswith("with numbers")}
    assert len(settings) == 1
    assert {x for k in kernels for x in k["floats"]} == {"f64"}


NARROW = {  # products in 32 bits, and why that is enough
    "cross_entropy": {"classes * constant", "constant * remsi"},  # a class: `cannot` limits how many there are
    "in_batch_cross_entropy": {
        *("constant * program x", "constant * divsi", "constant * remsi"),  # a position in the batch
    },
    "conv2d": {
        *("remsi * stride", "constant * remsi"),  # a row or column of a map, or a channel
        *("constant * program y", "constant * step", "constant * divsi"),  # a channel
        *("channels * taps", "channels * divsi", "divsi * taps"),  # within the weights of one output
        *("addi * kernel_columns", "divsi * tap_step", "remsi * tap_step"),  # within a window
    },
}


def test_addresses_are_computed_in_64_bits(kernels):
    """No distance between elements and no count of rows is multiplied in 32 bits, which 2^31 elements overflow."""
    found = {}
    for k in kernels:
        found.setdefault(k["file"], set()).update(k["narrow"])
    assert {file: products for file, products in found.items() if products} == NARROW


def test_atomics_only_note_errors(kernels):
    """The same bits every time: nothing is added up in the order in which programs happen to come."""
    assert {x for k in kernels for x in k["atomics"]} == {"max"}
