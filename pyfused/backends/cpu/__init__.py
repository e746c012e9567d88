"""The CPU backend: adapters from registered ops to the compiled kernels, one file per op."""

from . import cross_entropy, embedding_dot  # noqa: F401
