"""First and second derivatives against finite differences in float64, on the smallest cases of every op."""

import pytest
import torch
from accuracy import outputs_of, public
from cases import CASES


def size(case) -> int:
    return sum(x.numel() for x in case.arguments(torch.float64).values() if isinstance(x, torch.Tensor))


def smallest(op: str, count: int = 6) -> list:
    """The smallest cases of an op that have something to differentiate and only finite numbers.

    Not those with padding_idx, whose gradient is by definition not the derivative.
    """
    usable = [
        c
        for c in CASES
        if c.op == op
        and c.grad
        and torch.float64 in c.dtypes
        and c.arguments(torch.float64).get("padding_idx") is None
        and all(x.isfinite().all() for x in c.arguments(torch.float64).values() if isinstance(x, torch.Tensor))
        and all(o.isfinite().all() and o.numel() for o in outputs_of(public(op), c.arguments(torch.float64)))
    ]
    return sorted(usable, key=size)[:count]


CHECKED = [c for op in sorted({c.op for c in CASES}) for c in smallest(op)]


def differentiable(case):
    """The case as a function of what it differentiates, and those arguments."""
    arguments = case.arguments(torch.float64)

    def function(*tensors):
        return outputs_of(public(case.op), {**arguments, **dict(zip(case.grad, tensors))})

    return function, tuple(arguments[name] for name in case.grad)


@pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.id)
def test_gradcheck(case):
    assert torch.autograd.gradcheck(*differentiable(case), fast_mode=True)


@pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.id)
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(*differentiable(case), fast_mode=True)
