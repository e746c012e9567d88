"""The Triton backend: adapters from registered ops to Triton kernels, one file per op.

Nothing here imports the package triton before `load`. With TRITON_INTERPRET=1 in the environment, kernels run on CPU
tensors in Triton's interpreter, very slowly and only where this backend is forced: that is how they are tested without
a GPU.
"""

import functools
import importlib.util
import os

import torch

from ...dispatch import ON_DEVICE, ORDER


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if not interpreted() and not torch.cuda.device_count():  # by NVML; is_available() would initialise the driver
        return "PyTorch sees no GPU (torch.cuda.device_count() is 0)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def load() -> None:
    """Enter the kernels into the dispatch table."""
    from . import (  # noqa: F401
        conv2d_relu,
        cross_entropy,
        embedding_dot,
        embedding_dot_update,
        in_batch_cross_entropy,
        linear_cross_entropy,
    )

    if interpreted():
        ORDER["cpu"] += ("triton",)  # after the reference, which takes everything: only when forced
    else:
        ON_DEVICE["triton"] = unusable_on


@functools.cache
def unusable_on(device: int) -> str | None:
    """Why no Triton kernel can run on the GPU of this number, or None."""
    from triton.runtime import driver

    capability = torch.cuda.get_device_capability(device)
    if not torch.version.hip and capability < (8, 0):
        return (
            f"Triton compiles for compute capability 8.0 and later; GPU {device} has {'.'.join(map(str, capability))}"
        )
    try:
        driver.active.get_current_device()  # compiles what launches kernels: needs a C compiler and Python's headers
    except Exception as error:
        return f"Triton cannot launch kernels here: {type(error).__name__}: {error}"
    return None
