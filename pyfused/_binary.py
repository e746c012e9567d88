"""The compiled module, or the reason why there is none: importing pyfused never fails because of it."""

import warnings
from pathlib import Path

try:
    from . import _C

    why_not: str | None = None
except ImportError as error:
    _C = None
    why_not = f"the compiled module pyfused._C could not be imported ({error})"
    if (Path(__file__).parents[1] / "setup.py").exists():
        why_not += (
            "; this is the source folder, which shadows an installed pyfused: start from another folder,"
            " or build in place with pip install -e ."
        )
    warnings.warn(f"pyfused runs everything in eager PyTorch: {why_not}", RuntimeWarning, stacklevel=3)
