"""How an error is judged: against float64, and against what eager PyTorch itself loses at that dtype."""

from __future__ import annotations

import importlib

import torch

import pyfused.functional


def public(op: str):
    return getattr(pyfused.functional, op)


def eager(op: str):
    return importlib.import_module(f"pyfused.ops.{op}").reference


def outputs_of(function, arguments: dict) -> tuple[torch.Tensor, ...]:
    out = function(**arguments)
    return out if isinstance(out, tuple) else (out,)


def gradients_of(function, arguments: dict, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Gradients for upstream gradients that differ from element to element and are the same for every dtype."""
    outputs = outputs_of(function, arguments)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype).to(o.device) for o in outputs]
    wanted = [arguments[name] for name in names]
    grads = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    return [torch.zeros_like(w) if x is None else x for w, x in zip(wanted, grads)]


def to_float64(arguments: dict) -> dict:
    """The same numbers in float64, so that rounding the inputs is nobody's error."""

    def convert(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return {name: convert(x) for name, x in arguments.items()}


def on(device: str, arguments: dict) -> dict:
    def move(x):
        if not isinstance(x, torch.Tensor) or x.device.type == device:
            return x
        return x.detach().to(device).requires_grad_(x.requires_grad)

    return {name: move(x) for name, x in arguments.items()}


def max_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    finite = truth.isfinite() & got.isfinite()
    return (got.double() - truth)[finite].abs().max().item() if finite.any() else 0.0


def eager_rounding(run, case, dtype: torch.dtype) -> list[float]:
    """What eager PyTorch loses at `dtype` in each of the tensors that `run(arguments)` returns.

    In float64 the truth is eager's own result, so there its loss is taken from float32 and scaled by the precisions.
    """
    measured = torch.float32 if dtype == torch.float64 else dtype
    arguments = case.arguments(measured)
    pairs = zip(run(arguments), run(to_float64(arguments)), strict=True)
    # 1.5: in float64 the truth, too, is off by this much.
    factor = 1.5 * torch.finfo(dtype).eps / torch.finfo(measured).eps if dtype == torch.float64 else 1
    return [factor * max_error(densify(at_dtype), densify(truth)) for at_dtype, truth in pairs]


_remembered = {}


def eager_results(run, case, dtype: torch.dtype, what: str) -> tuple[list, list, list]:
    """What `run` makes of a case in float64 and at `dtype`, and its rounding. Kept, unless large: the tests of every
    backend ask for the same."""
    key = case.id, dtype, what
    if key in _remembered:
        return _remembered[key]
    arguments = case.arguments(dtype)
    results = list(run(to_float64(arguments))), list(run(arguments)), eager_rounding(run, case, dtype)
    if sum(x.numel() for x in results[0]) < 1 << 18:
        _remembered[key] = results
    return results


def eager_gradients(case, dtype: torch.dtype) -> tuple[list, list, list]:
    return eager_results(lambda a: gradients_of(eager(case.op), a, case.grad), case, dtype, "gradients")


def densify(x: torch.Tensor) -> torch.Tensor:
    return x.to_dense() if x.is_sparse else x


def check(
    got: torch.Tensor, truth: torch.Tensor, expected: torch.Tensor, rounding: float, slack: float, what: str
) -> None:
    """Fail unless `got` is as good as eager: error <= 2 x eager's + 4 units in the last place of the largest value.

    Args:
        truth: the float64 result on the same inputs.
        expected: eager PyTorch's result at the dtype under test: its dtype, and where it is NaN or infinite.
        rounding: eager's error, see `eager_rounding`.
        slack: further error allowed, relative to the largest true value; not 0 only where an op documents such a bound.
    """
    got, truth, expected = densify(got.detach()).cpu(), densify(truth), densify(expected)
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, eager gives {expected.dtype}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(expected)), f"{what}: {kind.__name__} in other places than in eager PyTorch"
    scale = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    allowed = (4 * torch.finfo(got.dtype).eps + slack) * scale + 2 * rounding
    error = max_error(got, truth)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} at scale {scale:.3g}"


def check_gradients(case, device: str, dtype: torch.dtype) -> None:
    """`check` for every gradient of a case."""
    got = gradients_of(public(case.op), on(device, case.arguments(dtype)), case.grad)
    for name, g, t, e, r in zip(case.grad, got, *eager_gradients(case, dtype), strict=True):
        check(g, t, e, r, case.slack_for(dtype), f"{case.id} gradient of {name}")
