"""The fast backends. Importing this fills pyfused.dispatch's table; what cannot be used is recorded with its reason."""

from .. import _binary
from ..dispatch import ON_DEVICE, UNAVAILABLE

if _binary.why_not:
    UNAVAILABLE["cpu"] = _binary.why_not
else:
    from . import cpu  # noqa: F401

from . import cuda, triton

if reason := cuda.unavailable():
    UNAVAILABLE["cuda"] = reason
else:
    ON_DEVICE["cuda"] = cuda.unusable_on

if reason := triton.unavailable():
    UNAVAILABLE["triton"] = reason
else:
    try:
        triton.load()
    except Exception as error:  # whatever a package of another version, or half a package, raises
        UNAVAILABLE["triton"] = f"the package triton cannot be used: {type(error).__name__}: {error}"
