"""Memory of the large outputs of CPU kernels, kept for the next tensor of its size instead of going back to the system:
fresh memory costs a page fault per 4 KiB, ten times what writing to it costs. See csrc/cpu/cache.h."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._binary import _C


def cached(fresh: torch.Tensor) -> torch.Tensor:
    """An uninitialised CPU tensor like `fresh`, which nobody has written to yet, in recycled memory if it is large."""
    return fresh if fresh.nbytes < _C.cache_smallest else _C.cached_like(fresh)


# --- What is computed from a weight and stays true while the weight does
DERIVED_LIMIT = 512 << 20  # bytes
LONGEST_REST = 64  # sights


@dataclass
class _Derived:
    source: weakref.ref
    mark: tuple[int, int]
    fingerprint: int = 0
    value: torch.Tensor | None = None
    rest: int = 0  # sights to come at which it is not asked for
    next_rest: int = 1


_derived: OrderedDict[tuple, _Derived] = OrderedDict()  # the least recently used first
_lock = threading.RLock()  # re-entrant: garbage collection may call _forget while it is held


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which pyfused made and nobody else can reach: what is derived of it stays true, unasked."""
    tensor._pyfused_constant = True
    return tensor


def derived(source: torch.Tensor, kind: str, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """make(), a tensor computed from `source` (dense) alone, remembered as long as `source` lives unchanged.

    None at the first sight of a source or of a new version of it: in training every step has a new one, and to keep
    what is computed from it would not pay. What the version does not show (`.data`, NumPy, PyTorch's optimizers with
    fused=True) shows in the fingerprint, which reads the source once, a small part of what any `make` costs that is
    worth it. Then None for a while, twice as long each time: that, too, is how training looks. A `constant` needs none
    of this.
    """
    key, mark = (id(source), kind), (0 if source.is_inference() else source._version, source.data_ptr())
    is_constant = hasattr(source, "_pyfused_constant")
    with _lock:
        entry = _derived.get(key)
        if entry is None or entry.source() is not source:
            entry = _derived[key] = _Derived(weakref.ref(source, lambda _: _forget(key)), mark)
            if not is_constant:
                return None
        if entry.mark != mark:
            entry.mark, entry.value = mark, None
            return None
        if entry.rest:
            entry.rest -= 1
            return None
    fingerprint = 0 if is_constant else _fingerprint(source)
    with _lock:
        if entry.value is not None and entry.fingerprint != fingerprint:
            entry.value, entry.rest, entry.next_rest = None, entry.next_rest, min(2 * entry.next_rest, LONGEST_REST)
            return None
        value = entry.value
    made = value is None
    if made:
        value = make()
    else:
        entry.next_rest = 1
    with _lock:
        entry.fingerprint, entry.value = fingerprint, value
        if key in _derived:
            _derived.move_to_end(key)
        while made and derived_held() > DERIVED_LIMIT:
            _derived.popitem(last=False)
    return value


def _fingerprint(source: torch.Tensor) -> int:
    out = torch.empty(1, dtype=torch.int64)
    _C.fingerprint(out, source, torch.get_num_threads())
    return out.item()


def _forget(key: tuple) -> None:
    with _lock:
        _derived.pop(key, None)


def derived_held() -> int:
    """Bytes of the remembered tensors."""
    with _lock:
        return sum(entry.value.nbytes for entry in _derived.values() if entry.value is not None)


def empty_cache() -> None:
    """Give the memory that pyfused keeps for reuse on the CPU back to the system."""
    with _lock:
        _derived.clear()
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
