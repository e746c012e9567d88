"""The CUDA C++ backend: adapters from registered ops to the kernels of csrc/cuda, one file per op."""

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
    """Why no CUDA kernel can run here, or None."""
    if _binary.why_not:
        return _binary.why_not
    cuda = _binary._C.build_info()["cuda"]
    if cuda.startswith("off"):
        return f"pyfused was built without CUDA: {cuda}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is False)"
    if problem := _binary._C.why_no_cuda(torch.cuda.current_device()):
        return f"the CUDA runtime that pyfused was built with cannot use the GPU: {problem}"
    return None
