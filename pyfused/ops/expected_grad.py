"""What gradient a loss will be given, guessed before its backward, so that its forward can compute the gradient too.

Nearly every training loop calls `loss.backward()`, which gives 1, or gives the same factor every time (accumulation
over batches, loss scaling, a weighted sum of losses). A forward that computes the gradient for that factor reads its
input once instead of twice. Where the guess was wrong, the backward computes what it would have computed anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._library import SIGNATURES

LONGEST_REST = 64  # forwards
MOST_OPEN = 8  # guesses whose backward has not come: so many gradients may be held, or computed in vain


@dataclass
class _Kind:
    grad: float
    rest: int = 0  # forwards to come without a guess
    next_rest: int = 1
    open: int = 0  # guesses since the last backward


class ExpectedGrad:
    """Guesses for calls by their kind, which is whatever tells apart losses that are weighted differently."""

    def __init__(self):
        self._kinds: dict[tuple, _Kind] = {}

    def guess(self, kind: tuple) -> float | None:
        """For a forward of this kind. None: nothing is known, the last guess was wrong, or no backward comes."""
        known = self._kinds.get(kind)
        if known is None or torch._C._autograd._top_saved_tensors_default_hooks(False):  # checkpoints: to hold nothing
            return None
        if known.rest:
            known.rest -= 1
            return None
        if known.open >= MOST_OPEN:
            return None
        known.open += 1
        return known.grad

    def is_right(self, kind: tuple, guess: float | None, grad: torch.Tensor) -> bool:
        """For a backward that gets `grad`: whether this was guessed. After a wrong guess it rests, longer each time."""
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # torch.autograd.grad(is_grads_batched=True): several
            return False
        value = grad.item()
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= SIGNATURES:
                self._kinds.clear()
            self._kinds[kind] = known = _Kind(value)
        known.grad, known.open = value, 0
        if guess is None:
            return False
        if guess == value:
            known.next_rest = 1
            return True
        known.rest, known.next_rest = known.next_rest, min(2 * known.next_rest, LONGEST_REST)
        return False
