"""Every case on every backend, instruction set and dtype: outputs against float64."""

import pytest
import torch
from accuracy import check, eager, on, outputs_of, public, to_float64
from cases import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward(case, variant, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.op} takes {', '.join(str(d) for d in case.dtypes)} in this case")
    arguments = case.arguments(dtype)
    before = {n: x.detach().clone() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad():
        got = outputs_of(public(case.op), on(variant, arguments))
        truth = outputs_of(eager(case.op), to_float64(arguments))
        ours_at_dtype = outputs_of(eager(case.op), arguments)
    for i, (g, t, e) in enumerate(zip(got, truth, ours_at_dtype, strict=True)):
        check(g, t, e, case.slack_for(dtype), f"{case.id} output {i}")
    for name, x in before.items():
        assert torch.equal(arguments[name].nan_to_num(), x.nan_to_num()), f"{case.id} changed its input {name}"
