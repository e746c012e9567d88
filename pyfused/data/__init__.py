"""Real data: MNIST and MovieLens, read from a folder, a cache, a public mirror or a package registry; never made up."""

from .idx import MNIST, mnist, read_idx
from .interactions import Interactions, leave_one_out, movielens, read_interactions

__all__ = ["MNIST", "Interactions", "leave_one_out", "mnist", "movielens", "read_idx", "read_interactions"]
