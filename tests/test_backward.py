"""Every case on every backend, instruction set and dtype: gradients against float64, and backends crossed."""

import pytest
import torch
from accuracy import (
    check,
    check_gradients,
    densify,
    eager_gradients,
    on,
    outputs_of,
    public,
)
from cases import CASES
from conftest import device_of

import pyfused
from pyfused import dispatch

PAIRS = [pytest.param(c, d, id=f"{c.id}-{str(d)[6:]}") for c in CASES if c.grad for d in c.dtypes]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_backward(case, variant, dtype):
    check_gradients(case, variant, dtype)


USABLE = [name for name, reason in pyfused.available_backends().items() if reason is None]


@pytest.mark.parametrize("backward", USABLE)
@pytest.mark.parametrize("forward", USABLE)
@pytest.mark.parametrize("case", [c for c in CASES if c.grad][::4], ids=lambda c: c.id)
def test_any_forward_pairs_with_any_backward(case, forward, backward):
    if forward == backward:
        pytest.skip("the same backend twice: test_backward does that")
    devices = {device_of(b) for b in (forward, backward) if b != "reference"}
    if len(devices) > 1:
        pytest.skip("the cpu backend and a GPU backend serve different devices")
    device = devices.pop()
    arguments = case.arguments(torch.float32)
    moved = on(device, arguments)
    with pyfused.use_backend(forward):
        outputs = public(case.op)(**moved)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype).to(device) for o in outputs]
    with pyfused.use_backend(backward):
        got = torch.autograd.grad(outputs, [moved[n] for n in case.grad], upstream, allow_unused=True)
    for name, x, t, e, r in zip(case.grad, got, *eager_gradients(case, torch.float32), strict=True):
        x = torch.zeros_like(t, dtype=torch.float32) if x is None else x
        check(x, t, e, r, case.slack_for(torch.float32), f"{case.id} gradient of {name}")


@pytest.mark.parametrize("case", [c for c in CASES if c.grad][2::3], ids=lambda c: c.id)
def test_a_second_backward_and_an_expanded_upstream_gradient(case, variant):
    """The same bits, from upstream gradients of stride 0 and then from contiguous ones."""
    if dispatch._forced == "reference":
        pytest.skip("PyTorch's convolutions may choose another algorithm")
    given = on(variant, case.arguments(torch.float32))
    outputs = outputs_of(public(case.op), given)
    expanded = [torch.tensor(3.0, dtype=o.dtype, device=o.device).expand(o.shape) for o in outputs]
    wanted = [given[name] for name in case.grad]
    first = torch.autograd.grad(outputs, wanted, expanded, retain_graph=True, allow_unused=True)
    kept = [None if x is None else densify(x).clone() for x in first]
    second = torch.autograd.grad(outputs, wanted, [x.contiguous() for x in expanded], allow_unused=True)
    for a, b in zip(kept, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.nan_to_num(7), densify(b).nan_to_num(7)), case.id
