"""Time contenders against each other so that the comparison can be believed.

All contenders of a case run in one process, on the same inputs, in turns: whatever disturbs the machine disturbs all
of them. Before anything is timed their results are held against each other, so a fast wrong kernel has no time at all.
Each case knows the bytes it must move and the flops it must do; a time so becomes a share of what the machine can do.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

import pyfused

from . import machine

COLUMNS = [
    *("date", "commit", "pyfused", "torch", "hardware", "isa", "device", "threads", "malloc"),
    *("op", "case", "shape", "dtype", "direction", "contender", "p20_ms", "p50_ms", "p80_ms", "calls"),
    *("bytes", "flops", "gb_s", "gflop_s", "copy_gb_s", "matmul_gflop_s", "share"),
    *("vs_eager", "vs_compile", "extra_mib"),
]

# Largest relative error (Euclidean norm) between an output of a contender and eager's. bfloat16 and float16 outputs are
# rounded at different places, so only their last bits may differ.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class Disagreement(RuntimeError):
    """A contender computes something else than eager."""


class Incomplete(RuntimeError):
    """pyfused failed or disagreed in some cases; `rows` holds what was measured in the others."""

    def __init__(self, failures: list[str], rows: list[dict]) -> None:
        super().__init__("\n".join(failures))
        self.rows = rows


@dataclass(frozen=True)
class Contender:
    """``run`` is what is timed; ``result`` gives the tensors that must agree with eager's."""

    run: Callable[[], object]
    result: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Timing:
    """Quantiles of the time of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float
    calls: int


def step(function: Callable, batches: Sequence[tuple], leaves: Sequence[Tensor], direction: str) -> Contender:
    """A contender that calls ``function(*batch)`` on each batch in turn, forward only or with the gradient of `leaves`.

    Several batches matter where the inputs choose which memory is read: the same ids twice would be read from cache. A
    sparse gradient's rows are summed by id, which Adagrad and SparseAdam do with it first; ours are so already.
    """
    turn = cycle(batches)
    if direction == "forward":

        @torch.no_grad()
        def forward(batch):
            return [function(*batch)]

        return Contender(lambda: forward(next(turn)), lambda: forward(batches[0]))

    upstream = None

    def training(batch):
        nonlocal upstream
        output = function(*batch)
        if upstream is None and output.dim():
            upstream = _upstream_like(output)
        gradients = torch.autograd.grad(output, leaves, upstream)
        return [output.detach(), *(g.coalesce() if g.is_sparse else g for g in gradients)]

    return Contender(lambda: training(next(turn)), lambda: training(batches[0]))


def _upstream_like(output: Tensor) -> Tensor:
    """The same values for every contender, in the memory format of the output, as the next layer would give them."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output).copy_(values)


def _relative_error(actual: Tensor, expected: Tensor, usual: float = 0.0) -> float:
    """Relative to the norm of `expected`, or of elements of size `usual` where that is more."""
    if actual.is_sparse and expected.is_sparse:
        actual, expected = actual.coalesce(), expected.coalesce()
        if not torch.equal(actual.indices(), expected.indices()):
            return float("inf")
        actual, expected = actual.values(), expected.values()
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = (t.to_dense().double() if t.is_sparse else t.double() for t in (actual, expected))
    scale = max(torch.linalg.vector_norm(expected).item(), usual * expected.numel() ** 0.5)
    return torch.linalg.vector_norm(actual - expected).item() / max(scale, torch.finfo(torch.float64).tiny)


def check_agreement(results: dict[str, Sequence[Tensor]], gradient_tolerance: float = 0.0) -> None:
    """Raise `Disagreement` unless every contender's tensors equal those of the first, within `TOLERANCE`.

    ``gradient_tolerance`` is the least tolerance for all but the first tensor: where a function has kinks (ReLU,
    maximum), rounding decides the branch of an element now and then: of 20,000 outputs one moves 4% of the norm. There
    a gradient that is zero but for rounding (the bias of attention's keys) is held against a hundredth of all others.
    """
    (first, expected), *others = results.items()
    squares = [(t.square().sum().item(), t.numel()) for t in expected[1:] if gradient_tolerance and not t.is_sparse]
    usual = 1e-2 * (sum(s for s, _ in squares) / max(1, sum(n for _, n in squares))) ** 0.5
    for name, actual in others:
        if len(actual) != len(expected):
            raise Disagreement(f"{name} returns {len(actual)} tensors, {first} {len(expected)}")
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            allowed = max(TOLERANCE[a.dtype], TOLERANCE[e.dtype], gradient_tolerance if index else 0.0)
            error = _relative_error(a, e, usual if index else 0.0)
            if not error <= allowed:  # also a NaN
                what = f"gradient {index}" if index else "output"
                raise Disagreement(f"{name} differs from {first}: {what}, relative error {error:.2e} > {allowed:.0e}")


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(
    runs: dict[str, Callable], device: torch.device, *, seconds: float = 0.5, rounds: int = 7
) -> dict[str, Timing]:
    """Time each of `runs`, which are warm, for about `seconds`, in `rounds` rounds that give every contender its turn.

    The number of calls in a turn comes from a first estimate, at least one; when a turn has several, its first is not
    counted: it finds the caches as the contender before left them. Each round has an order of its own: one who always
    follows the same neighbour lost up to 5% to it. A contender whose single call takes longer than `seconds` has a
    turn in the first, the middle and the last round only: its median needs no more, and such a one would take most of
    the benchmark's time.
    """
    calls, slow = {}, set()
    for name, run in runs.items():
        (estimate,) = machine.timed_calls(run, 1, device)
        if estimate > seconds * 1e3:
            slow.add(name)
        else:
            estimate = min(estimate, *machine.timed_calls(run, 1, device))
        calls[name] = max(1, int(seconds * 1e3 / rounds / max(estimate, 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for turn in range(rounds):
            for name in random.Random(turn).sample(list(runs), len(runs)):
                if name in slow and turn not in (0, rounds // 2, rounds - 1):
                    continue
                measured = machine.timed_calls(runs[name], calls[name], device)
                times[name] += measured[1:] or measured
    return {name: _quantiles(values) for name, values in times.items()}


def _quantiles(values: list[float]) -> Timing:
    times, levels = (torch.tensor(x, dtype=torch.float64) for x in (values, [0.2, 0.5, 0.8]))
    return Timing(*torch.quantile(times, levels).tolist(), calls=len(values))


def _prepare(
    case, direction: str, device: torch.device, with_compile: bool, announce: Callable
) -> dict[str, Contender]:
    """Build and warm up the contenders of a case and check that they agree with eager.

    A rival that cannot run here (no C++ compiler for torch.compile, say) is announced and left out; ours must run.
    """
    contenders, expected = {}, None
    for name, build in case.contenders(direction, device).items():
        if "compile" in name and not with_compile:
            continue
        try:
            contender = build()
            result = contender.result()
            expected = result if name == "eager" else expected
            check_agreement({"eager": expected, name: result}, case.gradient_tolerance)
            contender.run()
        except Exception as error:
            if name == "eager" or "pyfused" in name:
                raise
            announce(f"{case.title(direction)}: {name} left out: {type(error).__name__}: {str(error).strip()[:200]}")
        else:
            contenders[name] = contender
    return contenders


def _row(case, direction: str, name: str, timing: Timing, medians: dict[str, float], device: torch.device) -> dict:
    cost = case.cost(direction)
    bandwidth, arithmetic = machine.copy_rate(cost.bytes, device), machine.matmul_rate(case.dtype, device)
    floor_ms = max(cost.bytes / bandwidth, cost.flops / arithmetic) / 1e6
    compiled = [ms for other, ms in medians.items() if other.startswith("compile")]
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape_text,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "contender": name,
        "p20_ms": timing.p20,
        "p50_ms": timing.p50,
        "p80_ms": timing.p80,
        "calls": timing.calls,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_s": cost.bytes / timing.p50 / 1e6,
        "gflop_s": cost.flops / timing.p50 / 1e6,
        "copy_gb_s": bandwidth,
        "matmul_gflop_s": arithmetic,
        "share": floor_ms / timing.p50,
        "vs_eager": medians["eager"] / timing.p50,
        "vs_compile": min(compiled) / timing.p50 if compiled else None,
        "extra_mib": None,
    }


def run_case(
    case, direction: str, device: torch.device, *, with_compile: bool, seconds: float, announce: Callable = print
) -> list[dict]:
    """Rows (see `COLUMNS`) of one case in one direction, one row a contender. Raises `Disagreement`."""
    torch.manual_seed(0)
    pyfused.empty_cache()  # a case must not find it full of blocks of the sizes of the cases before it
    freezing = contextlib.nullcontext()
    if with_compile:
        torch.compiler.reset()  # a case must not meet the recompile limit because of the cases before it
        freezing = torch._inductor.config.patch(freezing=direction == "forward")
    with freezing:  # also while timing: the setting is read when a graph is traced, whenever that happens
        contenders = _prepare(case, direction, device, with_compile, announce)
        timings = interleave({name: c.run for name, c in contenders.items()}, device, seconds=seconds)
    medians = {name: timing.p50 for name, timing in timings.items()}
    common = machine.describe(device)
    return [common | _row(case, direction, name, timing, medians, device) for name, timing in timings.items()]


def compare(
    quick: bool = True,
    ops: Iterable[str] = (),
    *,
    text: str = "",
    directions: Sequence[str] = ("forward", "training"),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    with_compile: bool | None = None,
    memory: bool | None = None,
    seconds: float | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> list[dict]:
    """Run the benchmark cases and return their rows, one dict (keys: `COLUMNS`) per case, direction and contender.

    Args:
        quick: small shapes, no torch.compile, no memory measurement: under a minute. Else full shapes: long.
        ops: names of ops to run, all if empty.
        text: is part of the names of the cases to run.
        dtype: run the cases of float32 at this dtype instead, and leave out those of other dtypes.
        seconds: time for each contender of a case; 0.1 if quick, else 0.5.
        announce: is called with one line of text before each case, and for each contender left out.

    Raises:
        Incomplete: pyfused failed in some case, or its result is not eager's; the other cases were run.
        ValueError: there is no such op or case.
    """
    from . import memory as memory_of
    from .cases import select  # the cases need the ops; the harness does not

    device, with_compile = torch.device(device), not quick if with_compile is None else with_compile
    memory = not quick if memory is None else memory
    seconds = seconds or (0.1 if quick else 0.5)
    races = [(case, d) for case in select(quick, ops, dtype, text) for d in case.directions if d in directions]
    rows, failures = [], []
    for number, (case, direction) in enumerate(races, 1):
        announce(f"{number}/{len(races)} {case.title(direction)}")
        settings = {"with_compile": with_compile, "seconds": seconds, "announce": announce}
        try:
            new = run_case(case, direction, device, **settings)
        except Exception as error:
            failures.append(f"{case.title(direction)}: {type(error).__name__}: {error}")
            continue
        if memory and case.memory and direction == "training":
            for row in new:
                row["extra_mib"] = memory_of.peak_extra(case, direction, row["contender"], device) / 2**20
        rows += new
    if failures:
        raise Incomplete(failures, rows)
    return rows
