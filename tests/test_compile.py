"""The registered ops under torch.library.opcheck and the public functions under torch.compile."""

import collections

import pytest
import torch
from accuracy import gradients_of, outputs_of, public
from cases import CASES

import pyfused

BY_OP: dict[str, list] = {}
for c in CASES:
    BY_OP.setdefault(c.op, []).append(c)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects every call of a pyfused op, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pyfused":
            detached = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            out = function(*args, **(kwargs or {}))
            # opcheck takes a NaN in the result for a difference between two runs.
            results = out if isinstance(out, tuple) else (out,)
            if not any(isinstance(x, torch.Tensor) and x.isnan().any() for x in results):
                self.calls.append((function, tuple(detached)))
            return out
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", BY_OP)
def test_opcheck(op):
    """Schema, fake kernel (shapes, strides, dtypes), aliasing: for every op that the cases call. AOT autograd with
    symbolic sizes takes ten times as long as the others together: for every third call of an op."""
    seen = collections.Counter()
    for case in BY_OP[op]:
        arguments = case.arguments(torch.float32)
        with Recorder() as recorder:
            gradients_of(public(op), arguments, case.grad) if case.grad else outputs_of(public(op), arguments)
        for function, args in recorder.calls:
            symbolic = ("test_aot_dispatch_dynamic",) * (seen[function.name()] % 3 == 0)
            torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor", *symbolic))
            seen[function.name()] += 1
    assert {f"pyfused::{op}", f"pyfused::{op}_backward"} <= seen.keys()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", BY_OP)
def test_fullgraph(op, dynamic):
    """One graph, forward and backward, equal to the uncompiled result bit for bit."""
    torch._dynamo.reset()
    function = public(op)
    case = BY_OP[op][0]
    arguments = case.arguments(torch.float32)
    compiled = torch.compile(lambda kwargs: function(**kwargs), fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def call(**kwargs):
        return compiled(kwargs)

    for got, expected in zip(outputs_of(call, arguments), outputs_of(function, arguments), strict=True):
        assert torch.equal(got, expected)
    got = gradients_of(call, arguments, case.grad)
    for g, e in zip(got, gradients_of(function, arguments, case.grad), strict=True):
        assert torch.equal(g, e)


def test_every_op_is_registered_with_a_reference():
    assert set(BY_OP) <= set(pyfused.ops())
    assert all("reference" in pyfused.dispatch.TABLE[op] for op in pyfused.ops())
