"""Real data: MNIST, MovieLens, photos; from a folder, a cache, a public mirror or a package registry; never made up."""

from .idx import MNIST, mnist, read_idx
from .interactions import Interactions, concatenate, leave_one_out, movielens, read_interactions, split_by_user
from .photos import Photos, decode, food_photos, photo_folder, usable

__all__ = [
    "MNIST",
    "Interactions",
    "Photos",
    "concatenate",
    "decode",
    "food_photos",
    "leave_one_out",
    "mnist",
    "movielens",
    "photo_folder",
    "read_idx",
    "read_interactions",
    "split_by_user",
    "usable",
]
