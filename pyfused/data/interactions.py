"""MovieLens: who rated what and when (Harper and Konstan, 2015). GroupLens' terms: research use, no redistribution."""

import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import fetch

MIRROR = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ARCHIVE = {"ml-100k.zip": "0e33842e24a9c977be4e0107933c0723"}  # as GroupLens publishes it, next to the archive
PACKAGE = {"ml-100k.inter": "a8a8c3f165aedc53f63b5dc0a0463b14"}  # the same rows, in the same order
PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", "{folder}", "recbole==1.2.1"]
LARGEST = 2**53  # integers up to here survive float64, through which np.loadtxt reads them
BY_HAND = (
    f"Download {MIRROR} into {{target}}, or unpack it anywhere and name its folder (--data FOLDER): the loader reads "
    "u.data, ratings.csv and .inter files."
)


@dataclass(frozen=True)
class Interactions:
    """One row per rating. user, item: int64 [N], renumbered from 0 in the order of the original ids; timestamp: int64
    [N], seconds; rating: float32 [N]. user_ids[user[k]], item_ids[item[k]] (int64) are the file's own ids."""

    user: torch.Tensor
    item: torch.Tensor
    rating: torch.Tensor
    timestamp: torch.Tensor
    user_ids: torch.Tensor
    item_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.user)

    def rows(self, index: torch.Tensor) -> "Interactions":
        """The rows `index` names (int64, or a bool mask), with the same numbering of users and items."""
        columns = (self.user, self.item, self.rating, self.timestamp)
        return Interactions(*(column[index] for column in columns), self.user_ids, self.item_ids)

    def about(self) -> dict[str, torch.Tensor]:
        """What recommending needs of the data: original ids, and who has rated what, [2, N]."""
        seen = torch.stack([self.user, self.item])
        return {"user_ids": self.user_ids, "item_ids": self.item_ids, "seen": seen}


def movielens(folder: str | Path | None = None) -> Interactions:
    """Ratings from `folder` (any MovieLens edition, or data in its formats); without one, ML-100K, fetched and cached.

    `folder`, or ml-100k/ in it, holds u.data, ratings.csv or one .inter file. Raises FileNotFoundError if none is
    there, ValueError, with the line number, for a malformed one.
    """
    return _fetch() if folder is None else read_interactions(_find(Path(folder)))


def leave_one_out(data: Interactions) -> tuple[Interactions, Interactions]:
    """(all other rows, each user's last row). Users with a single row stay whole in the first part.

    "Last" is by (timestamp, row in the file): 415 of ML-100K's 943 users have a tie at their last timestamp.
    """
    order = np.lexsort((np.arange(len(data)), data.timestamp.numpy(), data.user.numpy()))
    user = data.user.numpy()[order]
    last = np.append(user[1:] != user[:-1], True)
    single = np.append(True, user[1:] != user[:-1]) & last
    held_out = torch.zeros(len(data), dtype=torch.bool)
    held_out[torch.from_numpy(order[last & ~single])] = True
    return data.rows(~held_out), data.rows(held_out)


def split_by_user(data: Interactions, seed: int) -> tuple[Interactions, Interactions, Interactions]:
    """(training, validation, test): of each user's n rows, in random order, n // 10 for each of the last two, but at
    least one if the user has three rows or more."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    order = order[data.user[order].argsort(stable=True)]
    user = data.user[order]
    count = user.bincount(minlength=len(data.user_ids))
    place = torch.arange(len(data)) - (count.cumsum(0) - count)[user]  # within the user's rows
    each = torch.maximum(count // 10, (count >= 3).long())[user]
    parts = (place >= 2 * each, place < each, (place >= each) & (place < 2 * each))
    return tuple(data.rows(order[part]) for part in parts)


def concatenate(*parts: Interactions) -> Interactions:
    """Rows of one data set, put together again."""
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("user", "item", "rating", "timestamp"))
    return Interactions(*columns, parts[0].user_ids, parts[0].item_ids)


def read_interactions(path: str | Path) -> Interactions:
    """Reads a u.data (tabs, no header), .csv (userId,movieId,rating,timestamp) or .inter (typed header, tabs) file.

    Columns after a header may stand in any order. Raises ValueError with the line number for a row with a wrong number
    of fields, an id or a timestamp that is no integer, or a rating that is no finite number.
    """
    path = Path(path)
    delimiter, header, columns = _layout(path)
    try:
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # "input contained no data": an error below
            table = np.loadtxt(
                path,
                delimiter=delimiter,
                skiprows=int(header),
                comments=None,
                ndmin=2,
                encoding="utf-8",
                usecols=columns,
            )
        if not table.size:
            raise ValueError("no rows")
        whole = table[:, [0, 1, 3]]
        if not np.isfinite(table).all() or (whole != np.floor(whole)).any() or np.abs(whole).max() > LARGEST:
            raise ValueError("not all numbers are usable")
    except ValueError as error:
        _raise_at_bad_line(path, delimiter, header, columns, error)
    user_ids, user = np.unique(table[:, 0].astype(np.int64), return_inverse=True)
    item_ids, item = np.unique(table[:, 1].astype(np.int64), return_inverse=True)
    parts = (user, item, table[:, 2].astype(np.float32), table[:, 3].astype(np.int64), user_ids, item_ids)
    return Interactions(*map(torch.from_numpy, parts))


def _layout(path: Path) -> tuple[str, bool, list[int]]:
    """(delimiter, whether line 1 is a header, positions of user, item, rating and timestamp)."""
    if path.suffix not in (".csv", ".inter"):
        return "\t", False, [0, 1, 2, 3]
    csv = path.suffix == ".csv"
    names = ["userId" if csv else "user_id", "movieId" if csv else "item_id", "rating", "timestamp"]
    delimiter = "," if csv else "\t"
    with path.open(encoding="utf-8-sig") as file:
        found = [field.strip().split(":")[0] for field in file.readline().split(delimiter)]
    if not set(names) <= set(found):
        raise ValueError(f"{path}: line 1: the header must name {', '.join(names)}; it has {', '.join(found)}")
    return delimiter, True, [found.index(name) for name in names]


def _raise_at_bad_line(path: Path, delimiter: str, header: bool, columns: list[int], error: ValueError) -> None:
    """np.loadtxt is fast but counts rows, not lines, and takes 1.5 for an id; read again, slowly, to name the line."""
    kinds = (("user id", int), ("item id", int), ("rating", float), ("timestamp", int))
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if (number == 1 and header) or not line.strip():
                continue
            fields = line.rstrip("\r\n").split(delimiter)
            if len(fields) <= max(columns):
                expected = f"{len(fields)} fields, expected at least {max(columns) + 1}"
                raise ValueError(f"{path}: line {number}: {expected}") from None
            for (name, kind), column in zip(kinds, columns, strict=True):
                try:
                    value = float(fields[column])
                    usable = np.isfinite(value) and (kind is float or (value == int(value) and abs(value) <= LARGEST))
                except ValueError:
                    usable = False
                if not usable:
                    what = "an integer" if kind is int else "a finite number"
                    raise ValueError(f"{path}: line {number}: {name} {fields[column]!r} is not {what}") from None
    raise ValueError(f"{path}: {error}") from error


def _find(folder: Path) -> Path:
    if folder.is_file():
        return folder
    for place in (folder, folder / "ml-100k"):
        candidates = [place / "u.data", place / "ratings.csv", *sorted(place.glob("*.inter"))]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(f"{folder} has no ratings: looked for u.data, ratings.csv, *.inter there and in ml-100k/")


def _fetch() -> Interactions:
    get_package = partial(fetch.install, PIP, "recbole/dataset_example/ml-100k", list(PACKAGE))
    ways = [
        (MIRROR, ARCHIVE, lambda folder: fetch.download(MIRROR, folder / "ml-100k.zip")),
        ("pip package recbole", PACKAGE, get_package),
    ]
    folder = fetch.obtain("ml-100k", ways, BY_HAND)
    if (folder / "ml-100k.inter").is_file():
        return read_interactions(folder / "ml-100k.inter")
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(folder / "ml-100k.zip") as archive:
        return read_interactions(archive.extract("ml-100k/u.data", unpacked))
