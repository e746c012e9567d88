"""The loaders: standard files are read right, every defect of a file is named, and data is never made up."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from pyfused.data import (
    concatenate,
    fetch,
    idx,
    leave_one_out,
    mnist,
    movielens,
    read_idx,
    read_interactions,
    split_by_user,
)

NAMES = list(idx.FILES)
IMAGES, LABELS = NAMES[:2]


def idx_bytes(tensor: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    return header + tensor.to(torch.uint8).numpy().tobytes()


def digits(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), generator=g), torch.randint(10, (count,), generator=g)


def write_mnist(folder: Path) -> Path:
    """5 training and 3 test digits."""
    for (images, labels), names in zip((digits(5, 0), digits(3, 1)), (NAMES[:2], NAMES[2:])):
        (folder / names[0]).write_bytes(idx_bytes(images))
        (folder / names[1]).write_bytes(idx_bytes(labels))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_mnist(tmp_path)


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "dotted", "dotted.gz"])
def test_mnist_reads_every_spelling(folder, place, spelling):
    (folder / place).mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        raw = (folder / name).read_bytes()
        (folder / name).unlink()
        new = spelling.replace("dotted", name.replace("-idx", ".idx")).format(name)
        (folder / place / new).write_bytes(gzip.compress(raw) if new.endswith(".gz") else raw)
    train_images, train_labels, test_images, test_labels = mnist(folder)
    images, labels = digits(5, 0)
    assert train_images.shape == (5, 1, 28, 28) and train_images.dtype == torch.uint8
    assert train_labels.dtype == torch.int64
    assert torch.equal(train_images[:, 0].long(), images) and torch.equal(train_labels, labels)
    images, labels = digits(3, 1)
    assert torch.equal(test_images[:, 0].long(), images) and torch.equal(test_labels, labels)


@pytest.mark.parametrize("missing", NAMES)
def test_mnist_names_the_missing_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"no MNIST file {missing}: looked for .*{missing.replace('-idx', '.idx')}.gz"
    ):
        mnist(folder)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no MNIST file"):
        mnist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere has no ratings"):
        movielens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "defect, message",
    [
        (lambda raw: raw[:-1], r"truncated: 3935 bytes, but its header promises \[5, 28, 28\], 3936 bytes"),
        (lambda raw: raw + b"x", "too long: 3937 bytes"),
        (lambda raw: raw[:10], "truncated: 10 bytes, the IDX header alone has 16"),
        (lambda raw: b"", "truncated: 0 bytes"),
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "wrong magic number 0x00000801, expected 0x00000803"),
        (lambda raw: b"<html>" + raw[6:], "wrong magic number 0x3c68746d"),
        (lambda raw: gzip.compress(raw)[:-9], "wrong magic number 0x1f8b"),
    ],
)
def test_mnist_rejects_a_damaged_file(folder, defect, message):
    (folder / IMAGES).write_bytes(defect((folder / IMAGES).read_bytes()))
    with pytest.raises(ValueError, match=f"{IMAGES}: {message}"):
        mnist(folder)


@pytest.mark.parametrize(
    "defect", [lambda raw: raw[:-9], lambda raw: b"no gzip", lambda raw: raw[:12] + b"!!!!" + raw[16:]]
)
def test_a_damaged_gzip_file_is_a_value_error(tmp_path, defect):
    path = tmp_path / f"{LABELS}.gz"
    path.write_bytes(defect(gzip.compress(idx_bytes(torch.arange(10)))))
    with pytest.raises(ValueError, match="truncated or damaged gzip file"):
        read_idx(path, 1)


def test_mnist_rejects_inconsistent_files(folder):
    images, labels = digits(5, 0)
    (folder / LABELS).write_bytes(idx_bytes(labels[:4]))
    with pytest.raises(ValueError, match=r"has 5 images, .* has 4 labels"):
        mnist(folder)
    labels[3] = 10
    (folder / LABELS).write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match="label 10 at row 3, expected 0 to 9"):
        mnist(folder)
    (folder / IMAGES).write_bytes(idx_bytes(images[:, :27]))
    with pytest.raises(ValueError, match="images are 27 x 28, expected 28 x 28"):
        mnist(folder)
    (folder / IMAGES).write_bytes(idx_bytes(images[:0]))
    (folder / LABELS).write_bytes(idx_bytes(labels[:0]))
    with pytest.raises(ValueError, match="no images"):
        mnist(folder)


# The same four ratings in every format; original ids 10, 20 and 7, 8, 9.
U_DATA = "20\t9\t3\t100\n10\t7\t5\t300\n10\t8\t4\t300\n20\t7\t1\t50\n"
FORMATS = {
    "u.data": U_DATA,
    "ratings.csv": "userId,movieId,rating,timestamp\n" + U_DATA.replace("\t", ","),
    "films.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA,
    "other.inter": "rating:float\tuser_id:token\textra:float\ttimestamp:float\titem_id:token\n"
    "3\t20\t0\t100\t9\n5\t10\t0\t3e2\t7\n4\t10\t0\t300\t8\n1\t20\t0\t50\t7\n",
    "windows/ratings.csv": "\ufeffuserId,movieId,rating,timestamp\n".replace("\n", "\r\n")
    + U_DATA.replace("\t", ",").replace("\n", "\r\n"),
    "ml-100k/u.data": U_DATA + "\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_movielens_formats_agree(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(FORMATS[name], newline="")
    found = [read_interactions(path), movielens(path)]
    found += [movielens(path.parent)] + ([movielens(tmp_path)] if "ml-100k" in name else [])
    for data in found:
        assert data.user_ids.tolist() == [10, 20] and data.item_ids.tolist() == [7, 8, 9]
        assert data.user.tolist() == [1, 0, 0, 1] and data.item.tolist() == [2, 0, 1, 0]
        assert data.rating.tolist() == [3, 5, 4, 1] and data.timestamp.tolist() == [100, 300, 300, 50]
        assert (data.user.dtype, data.rating.dtype) == (torch.int64, torch.float32)


def test_half_stars_are_read(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5,4\n")
    assert movielens(tmp_path).rating.tolist() == [3.5]


@pytest.mark.parametrize(
    "line, message",
    [
        ("1\t2\t3", "line 2: 3 fields, expected at least 4"),
        ("1\t2\tgood\t4", "line 2: rating 'good' is not a finite number"),
        ("1\t2\tnan\t4", "line 2: rating 'nan' is not a finite number"),
        ("1\t2\tinf\t4", "line 2: rating 'inf' is not a finite number"),
        ("bob\t2\t3\t4", "line 2: user id 'bob' is not an integer"),
        ("1.5\t2\t3\t4", "line 2: user id '1.5' is not an integer"),
        ("1\tinf\t3\t4", "line 2: item id 'inf' is not an integer"),
        ("1\t99999999999999999999\t3\t4", "line 2: item id '99999999999999999999' is not an integer"),
        ("1\t2\t3\t", "line 2: timestamp '' is not an integer"),
        ("1,2,3,4", "line 2: 1 fields, expected at least 4"),
    ],
)
def test_movielens_names_the_malformed_line(tmp_path, line, message):
    path = tmp_path / "u.data"
    path.write_text(f"1\t1\t1\t1\n{line}\n5\t5\t5\t5\n")
    with pytest.raises(ValueError, match=f"u.data: {message}"):
        read_interactions(path)


def test_line_numbers_count_the_header_and_empty_lines(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n1,1,1,1\n\n1,2,x,1\n")
    with pytest.raises(ValueError, match="line 4: rating 'x'"):
        read_interactions(path)


@pytest.mark.parametrize("header", ["", "userId,movieId,rating\n", "1,2,3,4\n"])
def test_a_header_without_the_columns_is_an_error(tmp_path, header):
    path = tmp_path / "ratings.csv"
    path.write_text(header)
    with pytest.raises(ValueError, match="line 1: the header must name userId, movieId, rating, timestamp"):
        read_interactions(path)


@pytest.mark.parametrize(
    "name, text", [("u.data", ""), ("u.data", "\n\n"), ("r.csv", "userId,movieId,rating,timestamp\n")]
)
@pytest.mark.filterwarnings("error")
def test_a_file_without_rows_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no rows"):
        read_interactions(tmp_path / name)


def test_a_binary_file_is_a_value_error(tmp_path):
    (tmp_path / "u.data").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"u\.data: "):
        read_interactions(tmp_path / "u.data")


def test_leave_one_out_takes_the_last_row_of_a_tie_and_spares_single_rows(tmp_path):
    (tmp_path / "u.data").write_text(U_DATA + "30\t9\t5\t1\n")
    data = movielens(tmp_path)
    rest, last = leave_one_out(data)
    assert last.user.tolist() == [1, 0]  # user 20's newest row, then user 10's second row of the tie
    assert last.item_ids[last.item].tolist() == [9, 8]
    assert sorted(zip(rest.user_ids[rest.user].tolist(), rest.item_ids[rest.item].tolist())) == [
        (10, 7),
        (20, 7),
        (30, 9),
    ]
    assert len(rest) + len(last) == len(data)


def test_split_by_user_holds_out_a_tenth_of_each_user_at_random(tmp_path):
    """21 rows: 2 and 2; three rows: 1 and 1; two rows: none. The parts are the whole, the seed matters."""
    counts = {1: 21, 2: 3, 3: 2}
    rows = [f"{user}\t{item}\t{item % 5}\t{item}\n" for user, count in counts.items() for item in range(count)]
    (tmp_path / "u.data").write_text("".join(rows))
    data = movielens(tmp_path)
    parts = split_by_user(data, 0)
    assert [part.user.bincount(minlength=3).tolist() for part in parts] == [[17, 1, 2], [2, 1, 0], [2, 1, 0]]
    whole = concatenate(*parts)
    pairs = set(zip(whole.user.tolist(), whole.item.tolist(), whole.rating.tolist()))
    assert len(whole) == len(pairs) == 26 and pairs == set(
        zip(*(x.tolist() for x in (data.user, data.item, data.rating)))
    )
    held_out = {tuple(split_by_user(data, seed)[2].item[:2].tolist()) for seed in range(9)}
    assert len(held_out) > 5 and held_out == {
        tuple(split_by_user(data, seed)[2].item[:2].tolist()) for seed in range(9)
    }


def cached(*files) -> bool:
    return all((fetch.cache_dir() / file).is_file() for file in files)


@pytest.mark.skipif(
    not cached(*(f"mnist/{name}" for name in NAMES)), reason="MNIST is not in the cache: pyfused demo gets it"
)
def test_the_real_mnist():
    data = mnist()
    assert data.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train_images.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)


@pytest.mark.skipif(
    not (cached("ml-100k/ml-100k.inter") or cached("ml-100k/ml-100k.zip")),
    reason="MovieLens-100K is not in the cache: pyfused demo gets it",
)
def test_the_real_movielens():
    data = movielens()
    assert (len(data), len(data.user_ids), len(data.item_ids)) == (100_000, 943, 1682)
    assert data.rating.long().bincount().tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    rest, last = leave_one_out(data)
    assert (len(rest), len(last)) == (99_057, 943) and last.user.unique().numel() == 943
