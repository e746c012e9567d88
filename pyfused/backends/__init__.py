"""The fast backends. Importing this fills pyfused.dispatch's table; what cannot be used is recorded with its reason."""

import importlib
import importlib.util

import torch

from .. import _binary
from ..dispatch import UNAVAILABLE

if _binary.why_not:
    UNAVAILABLE["cpu"] = _binary.why_not
else:
    from . import cpu  # noqa: F401

from . import cuda

if reason := cuda.unavailable():
    UNAVAILABLE["cuda"] = reason

if not torch.cuda.is_available():
    UNAVAILABLE["triton"] = "PyTorch sees no GPU (torch.cuda.is_available() is False)"
elif importlib.util.find_spec("triton") is None:
    UNAVAILABLE["triton"] = "the package triton is not installed"
