"""Embedding dot product: out[b, k] = ⟨U[user[b]], V[item[b, k]]⟩ + bu[user[b]] + bv[item[b, k]]."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._library import define


def reference(user, item, user_weight, item_weight, user_bias=None, item_bias=None):
    """The op in eager PyTorch."""
    return (F.embedding(user, user_weight) * F.embedding(item, item_weight)).sum(-1)


def alloc(user, item, user_weight, item_weight, user_bias, item_bias):
    return user_weight.new_empty(item.shape)


_forward = define(
    "embedding_dot(Tensor user, Tensor item, Tensor user_weight, Tensor item_weight, Tensor? user_bias,"
    " Tensor? item_bias) -> Tensor",
    alloc,
    reference,
)


def embedding_dot(user, item, user_weight, item_weight, user_bias=None, item_bias=None, *, padding_idx=None, sparse=False):
    return _forward(user, item, user_weight, item_weight, user_bias, item_bias)
