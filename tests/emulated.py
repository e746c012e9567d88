"""GPU backends on CPU tensors, so that the one case table tests them on machines without a GPU.

The backend's adapters and the op pages run as they are; what differs is where the kernels come from.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import build

from pyfused import _binary, dispatch

# Elements of the floating arguments that a case may have: an emulated thread takes about 1 us for each.
BUDGET = 40_000


@contextlib.contextmanager
def serving_cpu(backend: str) -> Iterator[None]:
    """Let `backend` run on CPU tensors within the block: its kernels are emulated."""
    order, reason = dispatch.ORDER["cpu"], dispatch.UNAVAILABLE.pop(backend, None)
    dispatch.ORDER["cpu"] = (backend, *order)
    try:
        yield
    finally:
        dispatch.ORDER["cpu"] = order
        if reason is not None:
            dispatch.UNAVAILABLE[backend] = reason


@functools.cache
def cuda_module():
    """csrc/cuda compiled for the CPU; skips where that cannot be. PYFUSED_EMULATION: another library (mutate.py)."""
    if reason := _binary.why_not or build.why_not():
        pytest.skip(reason)
    return build.load(os.environ.get("PYFUSED_EMULATION") or build.build())


@contextlib.contextmanager
def cuda_on_cpu(module=None) -> Iterator[None]:
    """The "cuda" backend on CPU tensors, its kernels emulated."""
    module = module or cuda_module()
    from pyfused.backends.cuda import conv2d_relu

    names = [name for name in dir(module) if name.startswith("cuda_")]
    before = {name: getattr(_binary._C, name) for name in names if hasattr(_binary._C, name)}
    for name in names:
        setattr(_binary._C, name, getattr(module, name))
    module.set_seed(1)
    forced, conv2d_relu.forced = conv2d_relu.forced, "own"  # which is the faster on a GPU is not the question
    try:
        with serving_cpu("cuda"):
            yield
    finally:
        conv2d_relu.forced = forced
        for name in names:
            setattr(_binary._C, name, before[name]) if name in before else delattr(_binary._C, name)


@contextlib.contextmanager
def float32_as(products, precision: str) -> Iterator[None]:
    """What PyTorch does with float32, "tf32" or "ieee", in `products`: torch.backends.cuda.matmul, cudnn.conv."""
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before


def too_large(case, budget: int = BUDGET) -> bool:
    arguments = case.arguments(torch.float32)
    if case.op == "in_batch_cross_entropy" and arguments["user"].numel() ** 2 > 10 * budget:  # its scores
        return True
    if case.op.startswith("conv2d") and arguments["weight"].shape[1] <= 4:  # the direct kernels' products
        products = arguments["input"].shape[-2:].numel() * arguments["weight"].numel()
        return products > 50 * budget
    return sum(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor)) > budget
