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
def embedding_case(name, why, users=7, items=9, batch=5, per_user=None, dim=16, bias=False, ids=torch.int64, **options):
    def make(g):
        shape = (batch,) if per_user is None else (batch, per_user)
        tables = {"user_weight": randn(g, users, dim), "item_weight": randn(g, items, dim)}
        if bias:
            tables |= {"user_bias": randn(g, users), "item_bias": randn(g, items, 1)}
        ids_of = {"user": randint(g, users, batch, dtype=ids), "item": randint(g, items, *shape, dtype=ids)}
        return {**ids_of, **tables, **options}

    weights, biases = ("user_weight", "item_weight"), ("user_bias", "item_bias")
    return Case("embedding_dot", name, why, make, (*weights, *(biases if bias else ())))


def strided_embedding(g):
    return {
        "user": randint(g, 7, 10)[::2],
        "item": randint(g, 9, 3, 5, dtype=torch.int32).T,
        "user_weight": randn(g, 7, 40)[:, :20],
        "item_weight": randn(g, 20, 9).T,
        "user_bias": randn(g, 7, 2)[:, 0],
    }


EMBEDDING_DOT: list[Case] = [
    embedding_case("pairs", "[B] x [B], whole vectors only"),
    embedding_case(
        "per-user", "[B] x [B, K], groups of four scores that share their user and groups that do not", per_user=6
    ),
    embedding_case("per-user-4", "K = 4: every group of four has one user", per_user=4, dim=33),
    embedding_case("k-1", "K = 1 keeps its dimension", per_user=1),
    embedding_case("bias", "biases of both shapes, [n] and [n, 1]", bias=True),
    embedding_case("bias-per-user", "the user's bias goes to all K of its scores", bias=True, per_user=3),
    embedding_case("int32", "32-bit ids", ids=torch.int32, per_user=2),
    embedding_case(
        "padding", "rows without gradient, biases too, counted from the end", bias=True, per_user=9, padding_idx=-2
    ),
    embedding_case("padding-pair", "a padding row in one table only, its last", batch=40, padding_idx=(None, 8)),
    embedding_case("all-padding", "every id is padding: no row gets a gradient", users=1, padding_idx=(0, None)),
    embedding_case("sparse", "coalesced sparse gradients", batch=40, bias=True, sparse=True),
    embedding_case("sparse-padding", "the padding row is left out", batch=12, per_user=3, padding_idx=3, sparse=True),
    embedding_case(
        "one-row", "all gradients of a table go to one row, over many chunks", users=1, batch=1500, dim=24, bias=True
    ),
    embedding_case(
        "chunks", "runs that end at, before and after the borders of chunks", users=5, items=700, batch=1100, dim=8
    ),
    embedding_case(
        "chunks-per-user", "one user's items fill several chunks", batch=3, per_user=600, items=40, bias=True
    ),
    embedding_case("digits", "a sort of several digits", users=5000, items=3000, batch=300, dim=4),
    embedding_case("empty-batch", "B = 0", batch=0, bias=True),
    embedding_case("no-items", "K = 0", per_user=0),
    embedding_case("no-columns", "D = 0 leaves the biases", dim=0, bias=True, per_user=2),
    Case(
        "embedding_dot",
        "strides",
        "strided ids, table rows with gaps, a transposed table",
        strided_embedding,
        ("user_weight", "item_weight", "user_bias"),
    ),
    *(
        embedding_case(f"dim-{dim}", "tails: shorter than a vector, one past it, several widths", dim=dim, batch=30)
        for dim in (1, 3, 4, 5, 8, 9, 15, 17, 31, 64, 65, 100, 129, 200)
    ),
    embedding_case("dim-4096", "long rows", dim=4096),
]

CASES = [*CONV2D_RELU, *CONV2D_RELU_MAX_POOL2D, *CROSS_ENTROPY, *LINEAR_CROSS_ENTROPY, *EMBEDDING_DOT]
