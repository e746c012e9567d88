"""What only a GPU can show: no waiting for the device, CUDA graphs, streams, devices, errors found late.

The case table itself runs on a GPU as the variants "cuda" and "triton" of test_forward.py and test_backward.py.
"""

import pytest
import torch
from accuracy import on, outputs_of, public
from cases import CASES

import pyfused
import pyfused.functional as PF
from pyfused import dispatch
from pyfused.ops.linear_chunks import add_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
SOME = [c for c in CASES if c.grad][::5]
# Sparse gradients have as many rows as there are different ids, which only the device knows.
WAITING = {"sparse"}


@pytest.fixture(autouse=True)
def cudnn_is_deterministic():
    """Its gradients have the same bits every time only where it is told so, and bits are compared here."""
    before = torch._C._get_cudnn_deterministic()
    torch._C._set_cudnn_deterministic(True)  # PyTorch's own test helpers freeze what torch.backends.cudnn would set
    yield
    torch._C._set_cudnn_deterministic(before)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if reason := pyfused.available_backends()[request.param]:
        pytest.skip(reason)
    case = request.node.callspec.params.get("case")
    if case and request.param not in dispatch.TABLE[case.op]:
        pytest.skip(f"the {request.param} backend has no kernel for {case.op}")
    with pyfused.use_backend(request.param):
        yield request.param


def step(case, arguments):
    """Outputs and gradients; upstream gradients are ones, made on the device."""
    outputs = outputs_of(public(case.op), arguments)
    wanted = [arguments[name] for name in case.grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True)
    return [o.detach() for o in outputs], [g for g in grads if g is not None]


def dense(tensors):
    return [t.to_dense() if t.is_sparse else t for t in tensors]


def assert_same(got, expected):
    for tensors in zip(got, expected):
        for a, b in zip(*map(dense, tensors), strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def waits(case, arguments) -> bool:
    return any(arguments.get(name) for name in WAITING)


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_never_waits_for_the_device(backend, case):
    arguments = on("cuda", case.arguments(torch.float32))
    if waits(case, arguments):
        pytest.skip("the shape of the result depends on the values")
    step(case, arguments)  # whatever the first call prepares
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_cuda_graph(backend, case):
    """Captured once, replayed on other numbers: the same bits as without a graph."""
    arguments = on("cuda", case.arguments(torch.float32))
    if waits(case, arguments):
        pytest.skip("the shape of the result depends on the values")
    other = on("cuda", case.arguments(torch.float32, seed=1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, arguments)
    with torch.no_grad():
        for name, value in other.items():
            if isinstance(value, torch.Tensor) and 0 not in arguments[name].stride():
                arguments[name].copy_(value)
    graph.replay()
    assert_same(captured, step(case, arguments))


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_the_current_stream_is_used(backend, case):
    """On a side stream that is behind by a long sleep: work on any other stream would read what is not there yet."""
    arguments = on("cuda", case.arguments(torch.float32))
    expected = step(case, arguments)
    floats = [n for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    kept = {n: arguments[n].detach().clone() for n in floats}
    with torch.no_grad():
        for n in floats:
            arguments[n].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        with torch.no_grad():
            for n in floats:
                arguments[n].copy_(kept[n])
        got = step(case, arguments)
    side.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_the_same_bits_every_time(backend, case):
    arguments = on("cuda", case.arguments(torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]))
    expected = step(case, arguments)
    for _ in range(3):
        assert_same(step(case, arguments), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_a_device_that_is_not_current(backend, case):
    first = on("cuda", case.arguments(torch.float32))
    second = {
        n: x.detach().to("cuda:1").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for n, x in first.items()
    }
    assert torch.cuda.current_device() == 0
    assert_same(step(case, second), step(case, first))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_a_label_out_of_range_is_found_late(backend, bad):
    pyfused.check_errors()
    x = torch.randn(6, 50, device="cuda", requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, bad, 5], device="cuda")
    loss = PF.cross_entropy(x, target, reduction="none")
    with pytest.raises(IndexError, match="target"):
        pyfused.check_errors()  # before the backward, which would look, too, and raise it
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss[4].isnan() and loss[[0, 1, 2, 3, 5]].isfinite().all()
    assert not grad[4].any() and grad.isfinite().all()
    pyfused.check_errors()
    assert torch.ones(2, device="cuda").sum() == 2, "the device still works"


def test_more_than_2_31_elements(backend):
    """17 GB of logits and gradient in bfloat16; the last row against eager."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    x = torch.randn(1, 128256, device="cuda", dtype=torch.bfloat16).repeat(17000, 1).requires_grad_()
    target = torch.arange(17000, device="cuda")
    loss = PF.cross_entropy(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    last = x.detach()[-1:].double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(last, target[-1:])
    (truth,) = torch.autograd.grad(expected, last)
    torch.testing.assert_close(grad[-1:].double(), truth, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_16_bit_factors_is_added_in_float32(dtype, overwrite):
    """A chunk's part of linear_cross_entropy's weight gradient is never rounded to 16 bits."""
    a, b = torch.randn(128, 96, device="cuda", dtype=dtype), torch.randn(96, 64, device="cuda", dtype=dtype)
    out = torch.randn(128, 64, device="cuda")
    expected = a.double() @ b.double() + (0 if overwrite else out.double())
    add_product(out, a, b, overwrite)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
