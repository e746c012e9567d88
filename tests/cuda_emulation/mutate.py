"""Would the tests notice? Seeds one bug at a time into csrc/cuda and runs the emulated tests against it.

    python tests/cuda_emulation/mutate.py [--list] [part of a file or of a description]

Every mutant must be caught, by wrong values or by the emulation's checks; one that survives shows what no test looks
at. The bugs stand in mutations/<op>.txt, see `read`; a new op brings a file of its own. Where there is a
test_cuda_<op>.py, that alone must notice. Some 15 s each, two at a time. --list only says which there are; a bug whose
text is no longer in the sources, or there more than once, ends both.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build

TESTS = build.HERE.parent
SECONDS = 300  # of computing, after which a mutant runs forever


@dataclass(frozen=True)
class Mutation:
    file: str  # in csrc/cuda
    what: str
    old: str
    new: str
    tests: list[str]  # pytest's arguments

    def applied(self, csrc: Path = build.CSRC) -> str:
        """The file's text with the bug."""
        text = (csrc / "cuda" / self.file).read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.file}: {self.what}: {self.old!r} is there {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


def read(path: Path) -> list[Mutation]:
    """First "tests: KEYWORDS"; for each mutation "@ FILE: WHAT", "- " lines to replace and "+ " lines instead."""
    head, *blocks = path.read_text().split("\n@ ")
    tests = _tests(path.stem, head.strip().removeprefix("tests: "))
    mutations = []
    for block in blocks:
        (file, what), *lines = block.split("\n")[0].split(": ", 1), *block.split("\n")[1:]
        old, new = ("\n".join(x[2:] for x in lines if x[:1] == sign) for sign in "-+")
        mutations.append(Mutation(file, what, old, new, tests))
    return mutations


def _tests(op: str, keywords: str) -> list[str]:
    """pytest's arguments; keywords: its -k for the case table."""
    own = TESTS / f"test_cuda_{op}.py"
    if own.exists():
        return [str(own)]
    which = f"((cuda-emulated and {keywords}) or (test_cuda_emulation and not sanitizers and not planted))"
    files = ("forward", "backward", "optim", "conv2d_relu", "index_errors", "cuda_emulation")
    return ["-k", f"{which} and not float64", *(str(TESTS / f"test_{name}.py") for name in files)]


def run(mutation: Mutation) -> tuple[bool, str]:
    """Whether the tests failed, and what they said first."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(build.CSRC, csrc)
        (csrc / "cuda" / mutation.file).write_text(mutation.applied())
        try:
            library = build.build("check", csrc)
        except subprocess.CalledProcessError:
            return False, "does not compile"
        for few in (["--few"], []):  # every case at one dtype notices most
            caught, said = test(library, [*few, *mutation.tests])
            if caught:
                break
        return caught, said


def test(library: Path, arguments: list[str]) -> tuple[bool, str]:
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", *arguments]
    command = ["sh", "-c", f'ulimit -t {SECONDS} && exec "$@"', "sh", *pytest]
    environment = {**os.environ, "PYFUSED_EMULATION": str(library)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode < 0:
        return True, f"killed by {signal.Signals(-ran.returncode).name}"
    said = re.search(r"emulation of CUDA found\n\s*(.*)|(\w+Error: .*)|(assert .*)", ran.stdout)
    return ran.returncode != 0, next((x for x in said.groups() if x), "") if said else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("part", nargs="?", default="", help="of a file or of a description")
    given = parser.parse_args()
    known = [m for path in sorted((build.HERE / "mutations").glob("*.txt")) for m in read(path)]
    for m in known:
        m.applied()
    wanted = [m for m in known if given.part in f"{m.file}: {m.what}"]
    if given.list:
        print(*(f"{m.file}: {m.what}" for m in wanted), sep="\n")
        return 0
    library = build.build("check", build.CSRC)
    for tests in {tuple(m.tests) for m in wanted}:
        failed, said = test(library, ["--few", *tests])
        if failed:  # as where pyfused is not built: every mutant would seem to be caught
            sys.exit(f"The tests fail without a bug: {said}")
    survivors = 0
    with ThreadPoolExecutor(2) as pool:
        for m, (caught, said) in zip(wanted, pool.map(run, wanted)):
            survivors += not caught
            print(f"{'caught' if caught else 'SURVIVES':9} {m.file:28} {m.what:40} {said[:110]}", flush=True)
    print(len(wanted) - survivors, "of", len(wanted), "caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
