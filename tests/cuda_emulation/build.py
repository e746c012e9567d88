"""Builds the emulation: csrc/cuda/*.cu and this folder's C++ with g++, one object file per source and content.

    python -m tests.cuda_emulation.build [check|values|asan]

check   every memory access reported to memory_check.cpp; for all tests
values  as fast as it goes, nothing checked
asan    AddressSanitizer and UndefinedBehaviorSanitizer instead of memory_check.cpp; see `sanitizer_environment`
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OWN = ("planted.cu", "fragments.cu", "scheduler.cpp", "memory_check.cpp", "module.cpp")
# device.cu asks the CUDA runtime about devices, of which the emulation has none.
NOT_EMULATED = ("device.cu",)

# -fno-tree-sra keeps a 16-byte access one access; -fno-strict-aliasing: nvcc does not assume strict aliasing either.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w", "-DPYFUSED_CUDA_EMULATION"]
CHECKED = "-fsanitize=thread,bounds,signed-integer-overflow,shift,bool"
KERNEL_FLAGS = {
    "check": ["-O1", "-g1", "-fno-tree-sra", "-fno-threadsafe-statics", CHECKED],
    "values": ["-O2"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr"],
}
OWN_FLAGS = {"check": ["-O2", "-DCUDA_EMULATION_CHECKED"], "values": ["-O2"], "asan": ["-O2"]}
LINK_FLAGS = {"check": [], "values": [], "asan": ["-fsanitize=address,undefined"]}


def cuda_include() -> Path | None:
    """The headers of a CUDA toolkit: its types and host-side conversions are used as they are."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    roots += [Path(nvcc).resolve().parents[1]] if nvcc else []
    return next((Path(r) / "include" for r in roots if r and (Path(r) / "include/cuda_runtime.h").exists()), None)


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulation of CUDA switches threads on x86-64 only, this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "the emulation of CUDA needs g++"
    if cuda_include() is None:
        return "the emulation of CUDA needs the headers of a CUDA toolkit (CUDA_HOME, or nvcc on the path)"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulation of CUDA needs the package pybind11"
    return None


def sources(csrc: Path) -> list[Path]:
    kernels = sorted(p for p in (csrc / "cuda").glob("*.cu") if p.name not in NOT_EMULATED)
    return [*kernels, *(HERE / name for name in OWN)]


def compile_one(source: Path, csrc: Path, kind: str, cache: Path) -> Path:
    """The object file of one source, from the cache if what the preprocessor makes of it has been compiled before."""
    import pybind11

    flags = [*COMMON, *(KERNEL_FLAGS if source.suffix == ".cu" else OWN_FLAGS)[kind]]
    includes = (csrc, HERE, cuda_include(), pybind11.get_include(), sysconfig.get_paths()["include"])
    command = ["g++", *flags, *(f"-I{p}" for p in includes), "-x", "c++"]
    text = subprocess.run([*command, "-E", str(source)], check=True, capture_output=True).stdout
    text = text.replace(str(csrc).encode(), b"csrc")  # so that mutate.py's copies share what they do not change
    name = hashlib.sha256(" ".join(flags).encode() + text).hexdigest()[:20]
    target = cache / f"{source.stem}-{name}.o"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}.o")
        subprocess.run([*command, "-c", str(source), "-o", str(fresh)], check=True)
        fresh.replace(target)
    return target


def build(kind: str = "check", csrc: Path = CSRC) -> Path:
    """The shared library, built unless it is there already."""
    cache = CSRC.parent / "build" / "cuda_emulation"
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_one(s, csrc, kind, cache), sources(csrc)))
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    library = cache / f"{kind}-{name}" / "_cuda_emulation.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}.so")
        link = ["g++", "-shared", *map(str, objects), "-o", str(fresh), "-ldl", "-Wl,-Bsymbolic"]
        subprocess.run([*link, *LINK_FLAGS[kind]], check=True)
        fresh.replace(library)
    return library


def load(library: Path):
    spec = importlib.util.spec_from_file_location("_cuda_emulation", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """Variables under which Python can load the "asan" build. libstdc++: or a C++ exception finds no `throw`."""
    names = ("libasan.so", "libstdc++.so")
    ask = (["g++", f"-print-file-name={name}"] for name in names)
    found = (subprocess.run(a, check=True, capture_output=True, text=True).stdout.strip() for a in ask)
    return {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
