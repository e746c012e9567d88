"""Errors that a GPU finds while the program has gone on: labels and ids out of range."""

from __future__ import annotations

import sys

import torch

from ._binary import _C


def check_errors(device: torch.device | int | str | None = None) -> None:
    """Wait for a CUDA device (default: the current one) and raise for the first label or id out of range since the last
    call.

    On a GPU an op cannot raise without waiting. It makes the loss or score of such a row NaN and its gradient 0, and
    leaves a note. The note is read here; that of a CUDA kernel also, without waiting, by the next call of one.

    Raises:
        IndexError: naming the argument, the position and the value, as on the CPU.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    if hasattr(_C, "cuda_check_errors"):
        _C.cuda_check_errors()
    if triton := sys.modules.get(f"{__package__}.backends.triton.common"):
        triton.check_errors()
