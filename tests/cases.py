"""The one table of cases: op x options x shape, each with the reason why it is there.

A case makes the keyword arguments of a public function in pyfused.functional, floating tensors in float64. The tests round
them to each dtype and run every backend, every instruction set, forward and backward, on them; `bench/` has its own shapes.
To add a case, append to an op's list; to add an op, append a list to CASES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    op: str  # name of the function in pyfused.functional
    name: str  # unique within the op
    why: str  # the branch or the bug that this case reaches
    make: Callable[[torch.Generator], dict]  # -> keyword arguments; floating tensors in float64
    grad: tuple[str, ...]  # arguments to differentiate
    dtypes: tuple[torch.dtype, ...] = DTYPES
    slack: float = 0.0  # float32 error allowed beyond eager's, relative to the largest value: an op's documented bound

    def slack_for(self, dtype: torch.dtype) -> float:
        return self.slack if dtype == torch.float32 else 0.0

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """The arguments rounded to `dtype`, strides kept, `grad` ones requiring gradients."""

        def prepare(name, value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            rounded = torch.empty_like(value, dtype=dtype).copy_(value)  # empty_like keeps dense strides
            if value.stride() != rounded.stride():  # a slice or an expanded tensor: same view of a rounded storage
                storage = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=torch.float64)
                storage.untyped_storage().copy_(value.untyped_storage())
                rounded = storage.to(dtype).as_strided(value.shape, value.stride(), value.storage_offset())
            return rounded.requires_grad_(name in self.grad)

        made = self.make(torch.Generator().manual_seed(seed))
        return {name: prepare(name, value) for name, value in made.items()}


def randn(g: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


def randint(g: torch.Generator, high: int, *shape: int, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(high, shape, generator=g).to(dtype)


# --- conv2d_relu -----------------------------------------------------------------------------------------------------------
CONV2D_RELU: list[Case] = []

# --- conv2d_relu_max_pool2d ------------------------------------------------------------------------------------------------
CONV2D_RELU_MAX_POOL2D: list[Case] = []

# --- cross_entropy ---------------------------------------------------------------------------------------------------------
CROSS_ENTROPY: list[Case] = []

# --- linear_cross_entropy --------------------------------------------------------------------------------------------------
LINEAR_CROSS_ENTROPY: list[Case] = []


# --- embedding_dot ---------------------------------------------------------------------------------------------------------
def embedding_case(name, why, users=7, items=9, batch=5, per_user=None, dim=16, **options) -> Case:
    def make(g):
        shape = (batch,) if per_user is None else (batch, per_user)
        return {
            "user": randint(g, users, batch),
            "item": randint(g, items, *shape),
            "user_weight": randn(g, users, dim),
            "item_weight": randn(g, items, dim),
            **options,
        }

    return Case("embedding_dot", name, why, make, ("user_weight", "item_weight"))


EMBEDDING_DOT: list[Case] = [
    embedding_case("pairs", "[B] x [B], whole vectors only"),
]

CASES = [*CONV2D_RELU, *CONV2D_RELU_MAX_POOL2D, *CROSS_ENTROPY, *LINEAR_CROSS_ENTROPY, *EMBEDDING_DOT]
