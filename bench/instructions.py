"""Instructions that the CPU kernels execute, counted by valgrind: a regression check untouched by load.

    python -m bench.instructions             # compare with results/instructions.csv
    python -m bench.instructions --update    # replace it

The package's compiled module is counted as it is; nothing is built. Counts depend on the compiler, so only those of the
recorded one are compared. valgrind's processor has no AVX-512: baseline and avx2 are counted. An instruction count is
no time: it does not see caches, latencies or ports, only that a kernel does more than it did.

Exit status: 0 no kernel grew; 1 one grew by more than 2%, or has no row; 3 nothing to compare, for the reason printed
(no valgrind, another compiler).
"""

from __future__ import annotations

import argparse
import csv
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TABLE = Path(__file__).parent / "results" / "instructions.csv"
CALLS = Path(__file__).parent / "kernel_calls.py"
COLUMNS = ("case", "isa", "instructions", "compiler")
ISAS = ("baseline", "avx2")
ALLOWED_GROWTH = 0.02

Counts = dict[tuple[str, str], int]  # (case, isa) -> instructions


class Uncounted(RuntimeError):
    """Nothing can be counted or compared here; the message says why."""


def count(isas: Sequence[str] = ISAS) -> Counts:
    """Run every case of `kernel_calls` under callgrind: about 10 s an instruction set."""
    from pyfused import _C

    if (valgrind := shutil.which("valgrind")) is None:
        raise Uncounted("valgrind is not on the path")
    if missing := set(isas) - set(_C.isas()):
        raise Uncounted(f"this machine or module has no {' or '.join(missing)}")
    kernels = [name for name in dir(_C) if "threads: " in (getattr(_C, name).__doc__ or "")]
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/counts", "--dump-after=getpgrp"]
        # Up to the kernel's last parameter, so that a lambda inside it, whose name goes on, does not match as well.
        command += [f"--toggle-collect=pyfused::{isa}::{name}(*int)" for isa in isas for name in kernels]
        command += [sys.executable, "-I", "-S", str(CALLS), _C.__file__, *isas]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{child.stderr}")
        counts: Counts = {}
        for number, line in enumerate(child.stdout.splitlines(), 1):
            isa, case = line.split("\t")
            counts[case, isa] = _total(Path(folder, f"counts.{2 * number}"))  # odd ones: the call that warms up
    if missing := [case for (case, _), total in counts.items() if not total]:
        raise Uncounted(f"the module has no symbols, or these cases no kernel: {', '.join(missing)}")
    return counts


def _total(dump: Path) -> int:
    return next(int(line.split()[1]) for line in dump.read_text().splitlines() if line.startswith("totals:"))


def compiler() -> str:
    """What the counts depend on besides the source."""
    from pyfused import _C

    return f"{_C.build_info()['compiler']} {platform.machine()}"


def recorded() -> Counts:
    """The rows of the table. Raises `Uncounted` if they are of another compiler than the module here."""
    if not TABLE.exists():
        raise Uncounted(f"there is no {TABLE}")
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if others := sorted({row["compiler"] for row in rows} - {compiler()}):
        raise Uncounted(f"the table is for {', '.join(others)}, this module was compiled by {compiler()}")
    return {(row["case"], row["isa"]): int(row["instructions"]) for row in rows}


def write(counts: Counts) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((case, isa, total, compiler()) for (case, isa), total in counts.items())


def compare(counts: Counts, table: Counts) -> tuple[list[str], list[str]]:
    """(what is wrong, what else changed): a line for each case that grew or is new, and for each that shrank."""
    wrong, shrunk = [], []
    for key, total in counts.items():
        name = "{} {}".format(*key)
        if key not in table:
            wrong.append(f"{name}: {total:,} instructions, and no row in the table")
            continue
        change = total / table[key] - 1
        text = f"{name}: {table[key]:,} -> {total:,} instructions ({change:+.1%})"
        if change > ALLOWED_GROWTH:
            wrong.append(text)
        elif change < -ALLOWED_GROWTH:
            shrunk.append(text)
    return wrong, shrunk


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="replace the table by the counts of this module")
    update = parser.parse_args().update
    try:
        table = {} if update else recorded()
        counts = count()
    except Uncounted as reason:
        print(reason)
        return 3
    if update:
        write(counts)
        print(f"{len(counts)} rows in {TABLE}")
        return 0
    wrong, shrunk = compare(counts, table)
    for line in shrunk:
        print("less:", line)
    for line in wrong:
        print("MORE:", line)
    print(f"{len(counts)} counts, {len(wrong)} wrong, {len(shrunk)} less; --update records them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
