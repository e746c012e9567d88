"""PyTorch's own samples and bad inputs for the functions that pyfused replaces: same results, same errors."""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
from torch.testing._internal.common_methods_invocations import op_db

import pyfused.functional as PF


def conv2d_relu_eager(*args, **kwargs):
    return F.relu(F.conv2d(*args, **kwargs))


def conv1d_relu_eager(*args, **kwargs):
    return F.relu(F.conv1d(*args, **kwargs))


def linear_cross_entropy_eager(*args, **kwargs):
    return F.linear_cross_entropy(*args, **kwargs)


FUNCTIONS = {
    "nn.functional.cross_entropy": (PF.cross_entropy, F.cross_entropy),
    "nn.functional.linear_cross_entropy": (PF.linear_cross_entropy, linear_cross_entropy_eager),
    "nn.functional.conv2d": (PF.conv2d_relu, conv2d_relu_eager),
    "nn.functional.conv1d": (PF.conv_act, conv1d_relu_eager),
}
OPS = [op for op in op_db if op.name in FUNCTIONS]
OP_IDS = [f"{op.name[14:]}-{op.variant_test_name or 'plain'}" for op in OPS]


def without_options(kwargs: dict) -> dict:
    """`options` chooses how torch computes linear_cross_entropy, not what: pyfused has no such choice to offer."""
    return {k: v for k, v in kwargs.items() if k != "options"}


def is_deprecated(kwargs: dict) -> bool:
    """size_average and reduce: superseded by `reduction` in 2018, not part of pyfused's signature."""
    return "size_average" in kwargs or "reduce" in kwargs


def leaves(sample) -> list[torch.Tensor]:
    values = [sample.input, *sample.args, *sample.kwargs.values()]
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


def run(function, sample) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    out = function(sample.input, *sample.args, **without_options(sample.kwargs))
    wanted = leaves(sample)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = torch.autograd.grad(out, wanted, upstream, allow_unused=True) if out.requires_grad else [None] * len(wanted)
    return out, list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", OPS, ids=OP_IDS)
def test_samples(op, dtype):
    ours, eager = FUNCTIONS[op.name]
    compared = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if is_deprecated(sample.kwargs):
            continue
        expected, expected_grads = run(eager, sample)
        got, grads = run(ours, sample)
        torch.testing.assert_close(got, expected, equal_nan=True, msg=lambda m, s=sample: f"{s}\n{m}")
        for g, e in zip(grads, expected_grads, strict=True):
            if e is None:
                assert g is None or not g.any(), f"{sample}: a gradient where eager has none"
            else:
                torch.testing.assert_close(g, e, equal_nan=True, msg=lambda m, s=sample: f"{s}\n{m}")
        compared += 1
    assert compared >= (10 if op.name.endswith("conv1d") else 15), (
        "PyTorch's samples for this op have changed: look at them"
    )


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name[14:])
def test_error_inputs(op):
    ours, _ = FUNCTIONS[op.name]
    for bad in op.error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises(bad.error_type) as caught:
            ours(sample.input, *sample.args, **without_options(sample.kwargs))
        assert re.search(bad.error_regex, str(caught.value)), f"{bad.error_regex!r} is not in {caught.value}"
