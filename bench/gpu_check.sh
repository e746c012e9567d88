#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in under nine minutes and without network:
#     bench/gpu_check.sh OUT_DIR
# Builds, runs the tests, compute-sanitizer and the benchmarks. A stage that fails or runs out of time does not stop the
# next. Leaves in OUT_DIR a log per stage, summary.txt, and in OUT_DIR/bench the rows and their table. torch, numpy,
# pytest and the build's requirements (setuptools, cmake, ninja, pybind11) must be installed. Without nvcc the GPU runs
# the Triton kernels only. Rivals are raced where they can be imported: liger-kernel, quack-kernels, cut-cross-entropy,
# flash-attn, apex.
set -u
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT_DIR}" && cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
deadline=520 # seconds for everything
export CUDA_MODULE_LOADING=LAZY PYTHONDONTWRITEBYTECODE=1
cd "$out" # not in the checkout: its folder pyfused would be imported instead of what was installed
: >summary.txt

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 before=$SECONDS status
  shift 2
  if ((SECONDS + limit > deadline)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 10)); then
    echo "$name: no time left" | tee -a summary.txt
    return
  fi
  timeout -k 5 "$limit" "$@" >"$name.log" 2>&1
  status=$?
  printf '%-22s exit %3d  %4d s  %s\n' "$name" "$status" $((SECONDS - before)) "$(tail -n 1 "$name.log" | cut -c1-150)" |
    tee -a summary.txt
}

machine() {
  nvidia-smi
  nvcc --version
  python -m torch.utils.collect_env
  python -m pip list
}
build() {
  # From a copy: the build leaves files beside its sources, and the checkout may be read-only.
  rm -rf source && mkdir source && (cd "$root" && cp -r $sources "$out/source") || return
  local cuda=OFF
  if command -v nvcc; then cuda=ON; fi
  CMAKE_ARGS="-DPYFUSED_CUDA=$cuda -DPYFUSED_CUDA_ARCHITECTURES=native" \
    python -m pip install --no-build-isolation --no-deps --no-index --force-reinstall -v ./source || return
  rm -rf source
  python -m pyfused info
}
# Forward and backward of the small cases on one backend, once.
cases() { # BACKEND
  cat <<PYTHON
import sys
sys.path.insert(0, "$root/tests")
import torch
from accuracy import gradients_of, on, public
from cases import CASES
import pyfused
ran = 0
with pyfused.use_backend("$1"):
    for case in CASES:
        for dtype in case.dtypes[::2]:
            arguments = case.arguments(dtype)
            size = sum(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor))
            if "$1" in pyfused.dispatch.TABLE[case.op] and size < 20_000 and case.grad:
                gradients_of(public(case.op), on("cuda", arguments), case.grad)
                torch.cuda.synchronize()
                ran += 1
print(ran, "cases ran on $1")
PYTHON
}
sanitize() { # TOOL
  cases cuda >cases.py
  # The convolutions by our kernels, also where cuDNN's would be chosen.
  export PYFUSED_CUDA_CONV=own PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # Our kernels only: to instrument PyTorch's takes most of the time.
  compute-sanitizer --tool "$1" --kernel-name kns=pyfused --error-exitcode 9 --print-limit 20 python cases.py
}

export -f machine build cases sanitize
export root out sources="setup.py CMakeLists.txt pyproject.toml README.md LICENSE csrc pyfused bench"
stage machine 30 bash -c machine
stage build 150 bash -c build
# Not what needs no GPU: compiling for other ones, the emulation and the interpreter, which would use up the time.
gpu="cuda or triton or gpu"
test=(python -m pytest -q -p no:cacheprovider "$root/tests")
stage tests-gpu 120 "${test[@]}" -k "($gpu) and not emulat and not resources and not triton"
stage tests-gemm 40 env PYFUSED_CUDA_CONV=own "${test[@]}" -k "cuda and conv2d and not emulat"
stage memcheck 50 bash -c "sanitize memcheck"
stage racecheck 50 bash -c "sanitize racecheck"
stage conv-algorithms 30 python -m pyfused.bench.conv_algorithms conv_algorithms.csv
stage bench 190 python -m pyfused.bench.gpu bench --minutes 3
stage tests-triton 120 "${test[@]}" -k "triton and not emulat and not compile and not interpreter" --few
stage bench-no-compile 60 python -m pyfused.bench.gpu bench-no-compile --minutes 1 --no-compile
stage tests-rest $((deadline - SECONDS)) "${test[@]}" -x -k "not ($gpu)"
cat bench*/table.txt 2>/dev/null
echo "total $SECONDS s; logs, rows and tables in $out"
