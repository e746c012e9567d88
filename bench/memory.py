"""Peak extra memory of one training step, measured from outside: the resident set of a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from . import machine


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _nbytes(tensors: Sequence[Tensor]) -> int:
    parts = [p for t in tensors for p in ((t._indices(), t._values()) if t.is_sparse else (t,))]
    return sum(p.nbytes for p in parts)


def peak_extra_here(case, direction: str, name: str, device: torch.device, threads: int) -> int:
    """`peak_extra` in this process: right only if little ran in it before."""
    torch.set_num_threads(threads)
    # A small problem first: libraries load, thread pools start and code is generated before the baseline is taken.
    case.tiny().contenders(direction, device)[name]().run()
    contender = case.contenders(direction, device)[name]()
    if device.type == "cuda":
        baseline = torch.cuda.memory_allocated(device)
        contender.run()
        torch.cuda.reset_peak_memory_stats(device)
        results = _nbytes(contender.result())
        return torch.cuda.max_memory_allocated(device) - baseline - results
    machine.trim()
    baseline = _status("VmRSS")
    contender.run()
    machine.trim()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    results = _nbytes(contender.result())
    return _status("VmHWM") - baseline - results


def peak_extra(case, direction: str, name: str, device: torch.device) -> int:
    """Bytes that one call needs at its worst moment, besides its inputs and its results (loss and gradients).

    Counts everything that is resident, also what C++ code allocates behind torch's back and what a library keeps for
    the next call, which a tensor profiler would not see. Linux only (on a GPU: torch's own counter).
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_extra_here, case, direction, name, device, torch.get_num_threads()).result()
