"""What the Triton kernels share: launch parameters, the error flag, elementary functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

import torch
import triton
import triton.language as tl

from ... import dispatch

AUTOTUNE = os.environ.get("PYFUSED_AUTOTUNE", "0") == "1"
_chosen: dict[Hashable, object] = {}  # (key, candidates) -> the fastest


def choose(key: Hashable, candidates: Sequence, run: Callable | None):
    """The candidate for which `run(candidate)` is fastest; without PYFUSED_AUTOTUNE=1 the first, a rule of thumb.

    Measured once per process, key and candidates, by running each of a handful for some 20 ms: at the first call, never
    within a CUDA graph. run=None: it must not run twice, since it works in place; the first then, whatever was measured
    elsewhere, so that its bits never change within a process. Those of others may, from calls captured in a CUDA graph
    to later ones. Passes that read and write everything once are never measured: embedding_dot's sums, masks, checks,
    max-pooling and ReLU's gradient wait for the memory with any tile.

    Args:
        key: the device and all that decides how long a candidate takes.
    """
    if not AUTOTUNE or run is None or len(candidates) == 1:
        return candidates[0]
    key = (key, tuple(candidates))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [triton.testing.do_bench(lambda c=c: run(c), warmup=5, rep=20) for c in candidates]
        _chosen[key] = candidates[times.index(min(times))]
    return _chosen[key]


def bucket(n: int) -> int:
    """Sizes that share a measurement: those with the same next power of two."""
    return triton.next_power_of_2(max(n, 1))


def kernel(op: str, cannot: Callable[..., str | None]) -> Callable:
    """dispatch.kernel for this backend, run with the tensors' device current: Triton launches there."""

    def enter(run: Callable) -> Callable:
        def on_device(*args):
            device = args[0].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return run(*args)
            with torch.cuda.device(device):
                return run(*args)

        return dispatch.kernel(op, "triton", cannot)(on_device)

    return enter


ARGUMENTS = ("target", "user", "item")
_index_errors: dict[torch.device, torch.Tensor] = {}


def index_errors(device: torch.device) -> torch.Tensor:
    """The device's note of a label or an id out of range: 1 if there is one, then its argument's place in ARGUMENTS,
    position, value and limit.

    Raises:
        RuntimeError: it does not exist yet while a CUDA graph is captured, whose replays would clear it each time.
    """
    if device not in _index_errors:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "before a CUDA graph captures pyfused's Triton kernels, one must have run on this device"
            )
        _index_errors[device] = torch.zeros(5, dtype=torch.int64, device=device)
        _wait(device)  # other streams may be the first to write
    return _index_errors[device]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_errors() -> None:
    """Raise IndexError for what was found since the last call, in the words of the other backends. Waits for all
    streams of the devices that have a note."""
    for device, errors in _index_errors.items():
        _wait(device)
        found, argument, position, value, limit = errors.tolist()
        if found:
            errors.zero_()
            _wait(device)  # or what another stream notes from now on might be cleared, too
            name = ARGUMENTS[argument]
            raise IndexError(f"{name} {value} is out of bounds: {name}[{position}] must lie in [0, {limit})")


@triton.jit
def report_index_error(errors, ARGUMENT: tl.constexpr, position, value, limit, bad):
    """argument.flatten()[position] = value is not in [0, limit), where `bad`. The first to come writes."""
    zeros = tl.zeros(bad.shape, tl.int64)
    first = bad & (tl.atomic_max(errors + zeros, zeros + 1, mask=bad, sem="relaxed") == 0)
    tl.store(errors + 1 + zeros, zeros + ARGUMENT, mask=first)
    tl.store(errors + 2 + zeros, zeros + position, mask=first)
    tl.store(errors + 3 + zeros, zeros + value, mask=first)
    tl.store(errors + 4 + zeros, zeros + limit, mask=first)


LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.4426950408889634 - 1.44269502162933349609375)  # beyond float32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """exp(x) for x <= 0 (or NaN). The hardware's exp2 of the rounded product x log2(e) errs by |x| 2^-24, too much for
    the small exponentials of a confident row: PRECISE puts back what the product lost, for 4 more instructions."""
    if PRECISE and x.dtype == tl.float32:
        x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)  # or -inf - -inf below; exp(-200) is 0
        product = x * LOG2E
        lost = tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -product) + x * LOG2E_LOW
        return tl.exp2(product) * (1.0 + lost * LN2)
    elif x.dtype == tl.float32:
        return tl.exp2(x * LOG2E)  # which flushes denormals; for tl.exp Triton scales them, three instructions more
    else:
        return tl.exp(x)


@triton.jit
def log1p(x):
    """log(1 + x) with the digits of a small x (Higham 2002, section 1.14.1)."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d))))


@triton.jit
def tanh(x):
    """Rational below 0.35, where (1 - t) / (1 + t) cancels (Lambert's continued fraction, error below 1e-17)."""
    s = x * x
    small = x * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    t = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.35, small, tl.where(x < 0, -large, large))
