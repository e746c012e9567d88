"""Conformance on this machine: every op, forward and backward, on every usable backend, instruction set and dtype.

The truth is eager PyTorch in float64 on the same numbers. An error may be twice what eager PyTorch makes at that dtype,
plus 4 units in the last place (and for float32 convolutions 2e-5: Winograd's transform) of the largest value; in
float64, where the truth is no more exact than what it judges, 16 units.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _binary, dispatch, functional
from .fusion.verify import exact_float32

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WINOGRAD = 2e-5
DECLINED = "was asked for but cannot run this"  # dispatch.pick's words: a choice of the backend, no defect


@dataclass(frozen=True)
class Check:
    op: str
    eager: Callable[..., Tensor]
    make: Callable[[torch.Generator], tuple[Tensor, ...]]  # floating ones in float64: they are differentiated
    options: dict
    slack: float = 0.0  # of the largest value, in float32


@dataclass(frozen=True)
class Finding:
    """`error` is the largest over results and gradients, relative to the largest value of each, -1 if the backend
    declined to run; `problem` is empty unless the error is too large."""

    op: str
    backend: str
    dtype: torch.dtype
    error: float
    problem: str = ""


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def integers(g: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=g)


def conv_inputs(n: int, c_in: int, size: int, c_out: int, kernel: int = 3) -> Callable:
    return lambda g: (
        normal(g, n, c_in, size, size),
        normal(g, c_out, c_in, kernel, kernel) / (c_in * kernel * kernel) ** 0.5,
        normal(g, c_out),
    )


def conv2d_relu(input, weight, bias, **options):
    return F.relu(F.conv2d(input, weight, bias, **options))


def conv2d_relu_max_pool2d(input, weight, bias, **options):
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, **options)), 2)


def linear_cross_entropy(input, weight, target, **options):
    return F.cross_entropy(F.linear(input, weight), target, **options)


def embedding_dot(user, item, user_weight, item_weight):
    rows = F.embedding(user, user_weight)
    return ((rows if item.dim() == 1 else rows.unsqueeze(1)) * F.embedding(item, item_weight)).sum(-1)


def in_batch_cross_entropy(user, item, user_weight, item_weight):
    scores = F.embedding(user, user_weight) @ F.embedding(item, item_weight).T
    own = torch.eye(len(item), dtype=torch.bool)
    return F.cross_entropy(scores.masked_fill((item[:, None] == item) & ~own, -torch.inf), torch.arange(len(item)))


def tables(*item_shape: int) -> Callable:
    return lambda g: (integers(g, 30, 17), integers(g, 50, *item_shape), normal(g, 30, 37), normal(g, 50, 37))


def logits(rows: int, classes: int) -> Callable:
    return lambda g: (4 * normal(g, rows, classes), integers(g, classes, rows))


CHECKS = [
    Check("conv2d_relu", conv2d_relu, conv_inputs(2, 1, 12, 8), {}),
    Check("conv2d_relu", conv2d_relu, conv_inputs(2, 16, 14, 32), {"padding": 1}, WINOGRAD),
    Check("conv2d_relu", conv2d_relu, conv_inputs(2, 16, 9, 24, kernel=1), {}),
    Check("conv2d_relu", conv2d_relu, conv_inputs(2, 3, 15, 8, kernel=5), {"stride": 2, "padding": 2}),
    Check("conv2d_relu_max_pool2d", conv2d_relu_max_pool2d, conv_inputs(2, 1, 12, 8), {}),
    Check("conv2d_relu_max_pool2d", conv2d_relu_max_pool2d, conv_inputs(2, 16, 13, 32), {}, WINOGRAD),
    Check("conv_act", lambda *a, activation: F.gelu(F.conv2d(*a)), conv_inputs(2, 16, 14, 32), {"activation": "gelu"},
          WINOGRAD),
    Check("conv_act", lambda *a, activation: F.silu(F.conv2d(*a)), conv_inputs(2, 5, 14, 9), {"activation": "silu"}),
    Check("cross_entropy", F.cross_entropy, logits(33, 10), {}),
    Check("cross_entropy", F.cross_entropy, logits(9, 1003), {"label_smoothing": 0.1, "reduction": "sum"}),
    Check("linear_cross_entropy", linear_cross_entropy,
          lambda g: (normal(g, 21, 40), normal(g, 300, 40) / 4, integers(g, 300, 21)), {}),
    Check("embedding_dot", embedding_dot, tables(17), {}),
    Check("embedding_dot", embedding_dot, tables(17, 9), {}),
    Check("in_batch_cross_entropy", in_batch_cross_entropy, tables(17), {}),
]  # fmt: skip


def targets() -> Iterator[tuple[str, str, str | None]]:
    """(label, backend, instruction set or None) of all that is usable here."""
    for backend, reason in dispatch.available_backends().items():
        if reason is None:
            sets = _binary._C.isas() if backend == "cpu" else [None]
            yield from ((f"{backend} {isa}" if isa else backend, backend, isa) for isa in sets)


def run_checks() -> Iterator[list[Finding]]:
    """For each op and target, one finding per dtype, the worst over the op's checks."""
    before = _binary._C.isa() if _binary._C else None
    try:
        for op in dict.fromkeys(check.op for check in CHECKS):
            for label, backend, isa in targets():
                if isa:
                    _binary._C.set_isa(isa)
                checks = [check for check in CHECKS if check.op == op]
                yield [worst([examine(c, label, backend, dtype) for c in checks]) for dtype in DTYPES]
    finally:
        if before:
            _binary._C.set_isa(before)


def dtypes_taken(op: str, backend: str) -> list[torch.dtype]:
    """The dtypes in which `backend` runs the op, forward and backward: found by trying, with one set of arguments."""
    check = next(check for check in CHECKS if check.op == op)
    return [dtype for dtype in DTYPES if 0 <= examine(check, backend, backend, dtype).error < float("inf")]


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda finding: (bool(finding.problem), finding.error))


def examine(check: Check, label: str, backend: str, dtype: torch.dtype) -> Finding:
    """Runs one check; an exception is a finding too."""
    given = check.make(torch.Generator().manual_seed(0))
    given = [x.to(dtype) if x.is_floating_point() else x for x in given]
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    try:
        with dispatch.use_backend(backend), exact_float32():
            found = results(getattr(functional, check.op), [x.to(device) for x in given], check.options)
    except Exception as error:
        if isinstance(error, RuntimeError) and DECLINED in str(error):
            return Finding(check.op, label, dtype, -1.0)
        return Finding(check.op, label, dtype, float("inf"), f"{type(error).__name__}: {error}")
    truth = results(check.eager, [x.double() if x.is_floating_point() else x for x in given], check.options)
    try:
        eager = results(check.eager, given, check.options)
    except RuntimeError:  # PyTorch has no kernel for this dtype
        eager = found
    findings = [compare(check, label, dtype, *both) for both in zip(found, truth, eager, strict=True)]
    return worst(findings)


def compare(check: Check, label: str, dtype: torch.dtype, found: Tensor, truth: Tensor, eager: Tensor) -> Finding:
    scale = truth.abs().max().item()
    error, eager_error = ((x.double().cpu() - truth).abs().max().item() / scale for x in (found, eager))
    allowed = 2 * eager_error * (eager is not found) + (16 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    allowed += check.slack * (dtype == torch.float32)
    problem = "" if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e} ({check.options or 'no options'})"
    return Finding(check.op, label, dtype, error, problem)


def results(function: Callable, given: list[Tensor], options: dict) -> list[Tensor]:
    """What the function returns, and the gradient of every floating argument for one fixed upstream gradient."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    output = function(*given, **options)
    upstream = normal(torch.Generator().manual_seed(1), *output.shape).to(output)
    return [output.detach(), *torch.autograd.grad(output, [x for x in given if x.requires_grad], upstream)]
