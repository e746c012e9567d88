"""Memory of the large outputs of CPU kernels, kept for the next tensor of its size instead of going back to the system:
fresh memory costs a page fault per 4 KiB, ten times what writing to it costs. See csrc/cpu/cache.h."""

from __future__ import annotations

import os

import torch

from ._binary import _C


def cached(fresh: torch.Tensor) -> torch.Tensor:
    """An uninitialised CPU tensor like `fresh`, which nobody has written to yet, in recycled memory if it is large."""
    return fresh if fresh.nbytes < _C.cache_smallest else _C.cached_like(fresh)


def empty_cache() -> None:
    """Give the memory that pyfused keeps for reuse on the CPU back to the system."""
    if _C is not None:
        _C.cache_empty()


def set_cache_limit(bytes: int) -> None:
    """Keep at most this many bytes for reuse (default 1 GiB, or the environment variable PYFUSED_CACHE_BYTES; 0: none).

    Raises:
        ValueError: a negative number.
    """
    if bytes < 0:
        raise ValueError(f"the cache limit must be at least 0 bytes, got {bytes}")
    if _C is not None:
        _C.cache_limit(bytes)


def cache_held() -> int:
    """Bytes kept for reuse at the moment."""
    return 0 if _C is None else _C.cache_held()


if "PYFUSED_CACHE_BYTES" in os.environ:
    set_cache_limit(int(os.environ["PYFUSED_CACHE_BYTES"]))
