"""The CUDA C++ backend: adapters from registered ops to the kernels of csrc/cuda, one file per op."""

import functools

import torch

from ... import _binary

if _binary._C is not None:
    from . import (  # noqa: F401
        conv2d_relu,
        conv2d_relu_max_pool2d,
        cross_entropy,
        embedding_dot,
        in_batch_cross_entropy,
        linear_cross_entropy,
    )


def unavailable() -> str | None:
    """Why no CUDA kernel can run here, or None, as far as can be said without initialising CUDA."""
    if _binary.why_not:
        return _binary.why_not
    cuda = _binary._C.build_info()["cuda"]
    if cuda.startswith("off"):
        return f"pyfused was built without CUDA: {cuda}"
    if not torch.cuda.device_count():  # by NVML; is_available() would initialise the driver
        return "PyTorch sees no GPU (torch.cuda.device_count() is 0)"
    return None


@functools.cache
def unusable_on(device: int) -> str | None:
    """Why no CUDA kernel can run on the GPU of this number, or None."""
    problem = _binary._C.why_no_cuda(device)
    return problem and f"the CUDA runtime that pyfused was built with cannot use GPU {device}: {problem}"
