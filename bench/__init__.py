"""Benchmarks of every op: eager, torch.compile and pyfused, interleaved in one process.

``python -m bench`` in a checkout, ``pyfused bench`` after install. ``compare(quick=True)`` gives the rows to a program.
"""

from .harness import compare

__all__ = ["compare"]
