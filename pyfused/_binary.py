"""The compiled module, or the reason why there is none: importing pyfused never fails because of it."""

try:
    from . import _C

    why_not: str | None = None
except ImportError as error:
    _C = None
    why_not = f"the compiled module pyfused._C could not be imported ({error})"
