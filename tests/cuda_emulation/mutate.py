"""Would the tests notice? Seeds one bug at a time into csrc/cuda and runs the emulated tests against it.

    python tests/cuda_emulation/mutate.py [part of a file or of a description]

Every mutant must be caught, by wrong values or by the emulation's checks; one that survives shows what no test looks at.
For a new op append its mutations to MUTATIONS. About 20 s each on one core, two at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build

TESTS = build.HERE.parent


@dataclass(frozen=True)
class Mutation:
    file: str  # in csrc/cuda
    what: str
    old: str  # occurs exactly once, or `times` times
    new: str
    tests: str = "cross_entropy"  # of the case table's ids
    times: int = 1


FORWARD, BACKWARD, SHARED, COMMON = "cross_entropy.cu", "cross_entropy_backward.cu", "cross_entropy.cuh", "common.cuh"
MUTATIONS = [
    # --- common.cuh
    Mutation(COMMON, "head one short", "min(n, (width - beyond) % width)", "min(n, (width - beyond) % width - 1)"),
    Mutation(COMMON, "vectors one too many", "vectors = (n - head) / width", "vectors = (n - head) / width + 1"),
    Mutation(COMMON, "tail dropped", "c = head + vectors * width + lane; c < n", "c = head + vectors * width + lane; c < 0"),
    Mutation(COMMON, "tail one past", "c < n; c += lanes) visit_one", "c <= n; c += lanes) visit_one"),
    Mutation(COMMON, "look-ahead unguarded", "if (i + depth * lanes < vectors) ahead", "ahead"),
    Mutation(COMMON, "look-ahead of the wrong vector", "ahead[depth - 1] = words[i + depth * lanes]",
             "ahead[depth - 1] = words[i + lanes]"),
    Mutation(COMMON, "16 bytes where not aligned", "if (N % width == 0 && aligned) {", "if (N % width == 0) {", times=2),
    Mutation(COMMON, "bfloat16 truncated", "__float2bfloat16_rn(x)", "__float2bfloat16_rz(x)"),
    Mutation(COMMON, "group sum misses a step", "int step = lanes / 2; step > 0", "int step = lanes / 2; step > 1"),
    Mutation(COMMON, "group sum leaves the group", "int step = lanes / 2;", "int step = 16;"),
    Mutation(COMMON, "block sum without its barrier", "shared[warp] = x;\n  __syncthreads();", "shared[warp] = x;"),
    Mutation(COMMON, "block sum of one warp too many", "lane < warps ?", "lane <= warps ?"),
    Mutation(COMMON, "last block without its fence", "__shared__ bool last;\n  __threadfence();", "__shared__ bool last;"),
    Mutation(COMMON, "last block one early", "== gridDim.x - 1;", "== gridDim.x - 2;"),
    Mutation(COMMON, "last block: no barrier before reading", "}\n  __syncthreads();\n  return last;", "}\n  return last;"),
    # --- cross_entropy
    Mutation(SHARED, "label one past the classes", "static_cast<uint64_t>(t) < static_cast<uint64_t>(classes)",
             "static_cast<uint64_t>(t) <= static_cast<uint64_t>(classes)"),
    Mutation(SHARED, "row past the last", "if (!labels || r >= rows) return kIgnored;", "if (!labels) return kIgnored;"),
    Mutation(SHARED, "ignored label counted", "label < 0 ? C(0) : weight", "label < -1 ? C(0) : weight"),
    Mutation(SHARED, "position stride", "r % inner * inner_stride", "r % inner"),
    Mutation(SHARED, "softcap forgotten", "if (softcap > 0) {", "if (softcap < 0) {"),
    Mutation(SHARED, "class weight of the wrong class", "u[i] = weight[c + i * step]", "u[i] = weight[c + i]"),
    Mutation(SHARED, "smoothing of probabilities", "given[i] * keep + spread", "given[i] * keep"),
    Mutation(FORWARD, "no rescaling", "others *= exp(top - to);", ""),
    Mutation(FORWARD, "no rescaling of the smoothed part", "spread += mass * (to - top);", ""),
    Mutation(FORWARD, "exp(-inf - -inf)", "top > -C(INFINITY) ? top : C(0);", "top;"),
    Mutation(FORWARD, "label counted among the others", "x[i] = -C(INFINITY);", ""),
    Mutation(FORWARD, "label next to the vector", "static_cast<unsigned>(N * step)", "static_cast<unsigned>((N - 1) * step)"),
    Mutation(FORWARD, "partial sums read too early", "= s;\n      __syncthreads();\n      s = threadIdx.x", "= s;\n      s = threadIdx.x"),
    Mutation(FORWARD, "partial sums overwritten", ": RowSums<C>::none();\n      __syncthreads();", ": RowSums<C>::none();"),
    Mutation(FORWARD, "a warp's partial sums left out", "threadIdx.x < p.lanes / 32 ?", "threadIdx.x < p.lanes / 32 - 1 ?"),
    Mutation(FORWARD, "slices read too early", "of_slice[warp][lane] = s;\n      __syncthreads();", "of_slice[warp][lane] = s;"),
    Mutation(FORWARD, "slices overwritten", "s.combine(of_slice[warp + i][lane]);\n      __syncthreads();",
             "s.combine(of_slice[warp + i][lane]);"),
    Mutation(FORWARD, "a slice left out", "for (int i = 1; i < p.slices; ++i)", "for (int i = 2; i < p.slices; ++i)"),
    Mutation(FORWARD, "classes left over in columns", "for (; c < p.classes; c += p.slices) {",
             "for (; c < p.classes - 1; c += p.slices) {"),
    Mutation(FORWARD, "columns read past the classes", "c < p.classes - 3 * p.slices", "c < p.classes - 2 * p.slices"),
    Mutation(FORWARD, "every lane finishes the row", "if (lane == 0 && r < p.rows)", "if (r < p.rows)"),
    Mutation(FORWARD, "rows past the last finish", "if (slice == 0 && r < p.rows)", "if (slice == 0)"),
    Mutation(FORWARD, "ignored rows keep -inf", "s.top = 0, s.others = 1;", ";"),
    Mutation(FORWARD, "counter not cleared", "if (grid.blocks > 1)", "if (grid.blocks > 100000)"),
    Mutation(FORWARD, "bad label not reported", "if (!SOFT && label == kBadLabel) report", "if (false) report"),
    Mutation(BACKWARD, "ignored rows get a gradient", "if (!SOFT && label < 0) g = 0;", ""),
    Mutation(BACKWARD, "label's gradient by cancellation", "d[i] = label == c + i * step ? s.at_label : d[i];", ""),
    Mutation(BACKWARD, "smoothing forgotten at the label", "at_label += g * p.spread", "at_label += 0 * p.spread"),
    Mutation(BACKWARD, "upstream of the first row for all", "? up.loss[r] :", "? up.loss[0] :"),
    Mutation(BACKWARD, "no division by the total", "*up.loss / *up.total", "*up.loss"),
    Mutation(BACKWARD, "16-byte stores where not aligned", "store(out + c, x, is_aligned(out + c));", "store(out + c, x, true);"),
    Mutation(BACKWARD, "a slice's classes skipped", "for (int c = slice; c < p.classes;", "for (int c = slice + 1; c < p.classes;"),
    Mutation(BACKWARD, "rows past the last", "if (r >= p.rows) continue;", ""),
    Mutation(BACKWARD, "dead rows not cleared", "out[c] = from_compute<T>(C(0));", ";"),
]  # fmt: skip


def run(mutation: Mutation) -> tuple[bool, str]:
    """Whether the tests failed, and what they said first."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(build.CSRC, csrc)
        path = csrc / "cuda" / mutation.file
        text = path.read_text()
        count = text.count(mutation.old)
        assert count == mutation.times, f"{mutation.what}: {count} occurrences of {mutation.old!r}"
        path.write_text(text.replace(mutation.old, mutation.new))
        try:
            library = build.build("check", csrc, Path(folder) / "cache")
        except subprocess.CalledProcessError:
            return False, "does not compile"
        which = f"((cuda-emulated and {mutation.tests}) or (test_cuda_emulation and not sanitizers and not planted))"
        tests = [str(TESTS / name) for name in ("test_cuda_emulation.py", "test_forward.py", "test_backward.py")]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-k", f"{which} and not float64", *tests]
        environment = {**os.environ, "PYFUSED_EMULATION": str(library)}
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        except subprocess.TimeoutExpired:
            return True, "ran forever"
        said = re.search(r"emulation of CUDA found\s+(.*)|^E\s+(.*)|(\S*Error: .*)", ran.stdout, re.M)
        return ran.returncode != 0, next((x for x in said.groups() if x), "") if said else ran.stdout[-200:]


def main() -> int:
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or sys.argv[1] in m.file + " " + m.what]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, wanted))
    for m, (caught, said) in zip(wanted, results):
        print(f"{'caught' if caught else 'SURVIVES':9} {m.file:28} {m.what:40} {said[:110]}")
    print(sum(caught for caught, _ in results), "of", len(results), "caught")
    return 0 if all(caught for caught, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
