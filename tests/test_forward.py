"""Every case on every backend, instruction set and dtype: outputs against float64."""

import pytest
import torch
from accuracy import check, eager, eager_results, on, outputs_of, public
from cases import CASES

PAIRS = [pytest.param(c, d, id=f"{c.id}-{str(d)[6:]}") for c in CASES for d in c.dtypes]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_forward(case, variant, dtype):
    arguments = case.arguments(dtype)
    before = {n: x.detach().clone() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad():
        got = outputs_of(public(case.op), on(variant, arguments))
        results = eager_results(lambda a: outputs_of(eager(case.op), a), case, dtype, "outputs")
    for i, (g, t, e, r) in enumerate(zip(got, *results, strict=True)):
        check(g, t, e, r, case.slack_for(dtype), f"{case.id} output {i}")
    for name, x in before.items():
        assert torch.equal(arguments[name].nan_to_num(), x.nan_to_num()), f"{case.id} changed its input {name}"
