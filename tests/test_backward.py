"""Every case on every backend, instruction set and dtype: gradients against float64, and backends crossed."""

import pytest
import torch
from accuracy import check, eager, gradients_of, on, public, to_float64
from cases import CASES, DTYPES

import pyfused


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_backward(case, variant, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.op} takes {', '.join(str(d) for d in case.dtypes)} in this case")
    if not case.grad:
        pytest.skip("nothing to differentiate in this case")
    arguments = case.arguments(dtype)
    got = gradients_of(public(case.op), on(variant, arguments), case.grad)
    truth = gradients_of(eager(case.op), to_float64(arguments), case.grad)
    at_dtype = gradients_of(eager(case.op), arguments, case.grad)
    for name, g, t, e in zip(case.grad, got, truth, at_dtype, strict=True):
        check(densify(g), densify(t), densify(e), case.slack_for(dtype), f"{case.id} gradient of {name}")


def densify(x: torch.Tensor) -> torch.Tensor:
    return x.to_dense() if x.is_sparse else x


USABLE = [name for name, reason in pyfused.backends().items() if reason is None]


@pytest.mark.parametrize("backward", USABLE)
@pytest.mark.parametrize("forward", USABLE)
@pytest.mark.parametrize("case", [c for c in CASES if c.grad][::4], ids=lambda c: c.id)
def test_any_forward_pairs_with_any_backward(case, forward, backward):
    if forward == backward:
        pytest.skip("the same backend twice: test_backward does that")
    device = "cuda" if {forward, backward} & {"cuda", "triton"} else "cpu"
    if device == "cuda" and "cpu" in (forward, backward):
        pytest.skip("the cpu backend and a GPU backend serve different devices")
    arguments = case.arguments(torch.float32)
    moved = on(device, arguments)
    with pyfused.use_backend(forward):
        outputs = public(case.op)(**moved)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype).to(device) for o in outputs]
    with pyfused.use_backend(backward):
        got = torch.autograd.grad(outputs, [moved[n] for n in case.grad], upstream, allow_unused=True)
    truth = gradients_of(eager(case.op), to_float64(arguments), case.grad)
    at_dtype = gradients_of(eager(case.op), arguments, case.grad)
    for name, x, t, e in zip(case.grad, got, truth, at_dtype, strict=True):
        x = torch.zeros_like(t) if x is None else x
        check(densify(x), densify(t), densify(e), case.slack_for(torch.float32), f"{case.id} gradient of {name}")
