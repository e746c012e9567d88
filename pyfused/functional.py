"""The fused functions, named and ordered as in torch.nn.functional."""

from .ops.embedding_dot import embedding_dot

__all__ = ["embedding_dot"]
