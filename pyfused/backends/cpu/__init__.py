"""The CPU backend: adapters from registered ops to the compiled kernels, one file per op."""

from . import embedding_dot  # noqa: F401
