"""How fast a candidate is beside what it replaces, on the tensors it was called with; remembered on disk.

The file is $XDG_CACHE_HOME/pyfused/timings.json (default ~/.cache). A key names everything a time depends on: the
calls, shapes, dtypes, strides, which gradients, the processor or GPU, threads, and the versions of torch and pyfused.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MARGIN = 1.03  # how much faster a fused call must be to be kept: less is within what runs differ by
_SECONDS, _LEAST, _MOST = 0.15, 5, 100  # per candidate and direction: time spent, fewest and most rounds


@dataclass(frozen=True)
class Times:
    """Median seconds. Training is forward and backward, 0 where nothing needs a gradient."""

    forward: tuple[float, float]  # eager, fused
    training: tuple[float, float]

    def speedup(self, training: bool) -> float | None:
        eager, fused = self.training if training else self.forward
        return eager / fused if fused else None


def seconds(*functions: Callable) -> list[float]:
    """Median seconds of a call of each, run in turns so that whatever disturbs one disturbs all."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for function in functions:
        function()
        function()
    times, end = [[] for _ in functions], time.perf_counter() + _SECONDS
    while len(times[0]) < _LEAST or (time.perf_counter() < end and len(times[0]) < _MOST):
        for function, kept in zip(functions, times):
            synchronize()
            begin = time.perf_counter()
            function()
            synchronize()
            kept.append(time.perf_counter() - begin)
    return [statistics.median(kept) for kept in times]


def times_of(
    key: str,
    eager: Callable,
    fused: Callable,
    needed: Sequence[torch.Tensor],
    training: bool,
    needed_by_eager: Sequence[torch.Tensor] | None = None,
) -> Times:
    """Times of two functions without arguments; `needed` are the tensors that training wants gradients of."""
    key = f"{key} {_machine()}"
    known = _read().get(key)
    if known is not None and (known["training"][0] or not training):
        return Times(tuple(known["forward"]), tuple(known["training"]))

    def step(function: Callable, needed: Sequence[torch.Tensor]) -> Callable:
        upstream = torch.ones_like(function())

        def run():
            return torch.autograd.grad(function(), needed, upstream, allow_unused=True)

        return run

    with torch.no_grad():
        forward = seconds(eager, fused)
    both = (0.0, 0.0)
    if training and needed:
        both = seconds(step(eager, needed if needed_by_eager is None else needed_by_eager), step(fused, needed))
    found = Times(tuple(forward), tuple(both))
    _write(key, found)
    return found


def describe(*values) -> str:
    """What a time depends on, of the arguments of a call."""
    return " ".join(
        f"{str(x.dtype)[6:]}{list(x.shape)}/{list(x.stride())}{'+grad' * x.requires_grad}"
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in values
    )


def _machine() -> str:
    # Not at import, when the package is half imported.
    from .. import __version__, _binary, dispatch
    from ..backends.cpu.widen import SLOW
    from ..ops.conv2d_relu import allowed_algorithms

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    native = _binary._C and f"{_binary._C.isa()} {allowed_algorithms()} widens {len(SLOW)}"
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    cuda = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    precision = f"{[x.fp32_precision for x in cuda]} benchmark {torch.backends.cudnn.benchmark}"
    flags = f"{dispatch._forced} {native} autocast {autocast} cuda {precision}"
    versions = f"torch {torch.__version__} | pyfused {__version__}"
    return f"| {_processor()} | {device} | {torch.get_num_threads()} threads | {versions} | {flags}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pyfused" / "timings.json"


def _read() -> dict:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _write(key: str, times: Times) -> None:
    """Replaces the file as a whole: another process never reads half of one. Without a place to write, no cache."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(_read() | {key: asdict(times)}, new, indent=0)
        os.replace(new.name, file)
    except OSError:
        pass
