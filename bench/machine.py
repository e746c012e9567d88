"""What this machine is and what it can do: its name, its versions, its measured ceilings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

# Read when a process starts. With these a freed block of any size is kept and used again, instead of going back to the
# kernel, which would hand out zeroed pages, one page fault each, at the next allocation; and torch asks for huge pages,
# so that a fault brings 2 MiB.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def malloc_mode() -> str:
    """``"tuned"`` if this process was started with `TUNED_MALLOC`, else ``"default"``."""
    return "tuned" if all(os.environ.get(name) == value for name, value in TUNED_MALLOC.items()) else "default"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_calls(run: Callable, calls: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `calls` calls. On a GPU between events, so that the queue stays full."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in pairwise(marks)]
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _fastest(run, device: torch.device, seconds: float) -> float:
    """Least time of one call in seconds: a ceiling is what the machine reaches when nothing disturbs it.

    On a GPU of ten calls after each other: it would wait for the host to see the end of each.
    """
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, *timed_calls(run, 10 if device.type == "cuda" else 1, device))
    return best / 1e3


@functools.cache
def _copy_rate(log2_bytes: int, threads: int, device: torch.device) -> float:
    source = torch.ones(2**log2_bytes // 8, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    return 2**log2_bytes / _fastest(lambda: target.copy_(source), device, 0.15) / 1e9


def copy_rate(working_set: int, device: torch.device) -> float:
    """GB/s (read + written) of a copy whose source and target together have about `working_set` bytes.

    A case that fits a cache is held against a copy that fits it too: against main memory every such kernel would look
    better than it is. 64 KiB to 512 MiB (8 GiB on a GPU), the next power of two below the working set.
    """
    largest = 33 if device.type == "cuda" else 29
    exponent = min(max(int(working_set).bit_length() - 1, 16), largest)
    return _copy_rate(exponent, torch.get_num_threads(), device)


@functools.cache
def _matmul_rate(dtype: torch.dtype, threads: int, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 1024
    # Not ones: a GPU whose registers hold the same bits all the time takes less power and runs faster.
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b), device, 0.5) / 1e9


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of torch.mm on large square matrices of `dtype`: the arithmetic that the vendor's library reaches.

    A CPU can widen to float32, so half precision is held against the better of the two (float16 against float32 alone:
    without hardware for it a product takes minutes).
    """
    threads = torch.get_num_threads()
    if device.type == "cuda" or dtype.itemsize > 2:
        return _matmul_rate(dtype, threads, device)
    wide = _matmul_rate(torch.float32, threads, device)
    return max(wide, _matmul_rate(dtype, threads, device)) if dtype == torch.bfloat16 else wide


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _isa() -> str:
    """Instruction sets that torch and pyfused picked, e.g. ``torch AVX512 without 16-bit products, pyfused avx512``."""
    from pyfused._binary import _C
    from pyfused.backends.cpu.widen import SLOW

    fused = _C.isa() if _C else "none"
    narrow = " without 16-bit products" if SLOW else ""
    return f"torch {torch.backends.cpu.get_cpu_capability()}{narrow}, pyfused {fused}"


def checkout() -> Path | None:
    """Root of the git checkout that this file is in, or None when installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / ".git").exists() else None


def _commit() -> str:
    if (root := checkout()) is None:
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe(device: torch.device) -> dict[str, object]:
    """The columns of a row that do not depend on the case."""
    import pyfused

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} x{os.cpu_count()}"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _commit(),
        "pyfused": getattr(pyfused, "__version__", ""),
        "torch": torch.__version__,
        "hardware": hardware,
        "isa": _isa(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "malloc": malloc_mode(),
    }


def trim() -> None:
    """Give free heap memory back to the kernel, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
