"""Fused conv + ReLU, softmax-cross-entropy and embedding-dot kernels for PyTorch, on CPU and GPU."""

from . import backends as _backends  # noqa: F401  (fills the dispatch table)
from . import functional, nn, optim
from .dispatch import available_backends, explain, ops, use_backend
from .errors import check_errors
from .fusion import fuse, fuse_report, unfuse
from .memory import empty_cache, set_cache_limit
from .ops.conv2d_relu import set_conv_algorithm

__version__ = "0.1.0"
__all__ = [
    "available_backends",
    "check_errors",
    "empty_cache",
    "explain",
    "functional",
    "fuse",
    "fuse_report",
    "nn",
    "ops",
    "optim",
    "set_cache_limit",
    "set_conv_algorithm",
    "unfuse",
    "use_backend",
]
