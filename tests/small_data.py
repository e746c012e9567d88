"""Small data for the tasks, made here, in the formats that the loaders read."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import idx_bytes

from pyfused.data.idx import FILES

COLOURS = {"blue": (30, 40, 220), "green": (20, 210, 60), "red": (220, 30, 50)}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for two, and two on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Digits that are bright in different rows, users who rate the items of their half, photos by colour, text."""
    folder = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    for count, (images, labels) in zip((120, 40), (list(FILES)[:2], list(FILES)[2:])):
        label = torch.randint(10, (count,), generator=g)
        pixels = torch.randint(60, (count, 28, 28), generator=g)
        for row, digit in enumerate(label.tolist()):
            pixels[row, 2 * digit + 3 : 2 * digit + 6] += 190
        (folder / images).write_bytes(idx_bytes(pixels))
        (folder / labels).write_bytes(idx_bytes(label))
    lines = []
    for user in range(24):
        liked = torch.randperm(20, generator=g)[:9] + 20 * (user % 2)
        lines += [f"{user}\t{item}\t{4 + item % 2}\t{when}\n" for when, item in enumerate(liked.tolist())]
    lines += [f"99\t{item}\t{1 + item % 2}\t0\n" for item in range(40)]  # every item is known
    (folder / "u.data").write_text("".join(lines))
    write_photos(folder / "train_data", 6)
    write_photos(folder / "test_data", 2)
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return folder


def write_photos(folder, count):
    """Noise around a colour, JPEG, of differing sizes."""
    g = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = g.integers(20, 60, 2)
            pixels = np.clip(g.normal(colour, 20, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
