#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, without network:
#     [GPU_CHECK_SECONDS=520] [PYTHON=python3] bench/gpu_check.sh OUT_DIR [STAGE...]
# Builds, runs the tests, compute-sanitizer and the benchmarks. A stage that fails or runs out of time does not stop the
# next; those for which no time was left are for a second call, by their names (on another machine: build first). All
# stages need 1060 seconds, the benchmarks against torch.compile more: with more to spend, every stage gets more, and in
# a second call the benchmarks go on where they stopped, if OUT_DIR is the same. Leaves in OUT_DIR a log per stage,
# summary.txt, in OUT_DIR/bench the rows and their table, and all of it in results.tar.gz.
# torch, numpy, pytest and the build's requirements (setuptools, cmake, ninja, pybind11) must be installed, and what
# pyfused needs besides (typer, rich, matplotlib, pillow). Without nvcc the GPU runs the Triton kernels only. Rivals are
# raced where they can be imported: liger-kernel, quack-kernels, cut-cross-entropy, flash-attn, apex.
set -u
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT_DIR [STAGE...]}" && cd "$1" && pwd)
wanted=" ${*:2} "
root=$(cd "$(dirname "$0")/.." && pwd)
deadline=${GPU_CHECK_SECONDS:-520} # for everything
share=$((deadline > 1060 ? deadline * 100 / 1060 : 100)) # percent of the stages' seconds
python=${PYTHON:-python3}
export CUDA_MODULE_LOADING=LAZY PYTHONDONTWRITEBYTECODE=1
cd "$out" # not in the checkout: its folder pyfused would be imported instead of what was installed
touch summary.txt

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * share / 100)) before=$SECONDS status
  shift 2
  if [[ $wanted != "  " && $wanted != *" $name "* ]]; then return; fi
  if ((SECONDS + limit / 2 > deadline)); then
    echo "$name: no time left" | tee -a summary.txt
    return
  fi
  if ((SECONDS + limit > deadline)); then limit=$((deadline - SECONDS)); fi
  timeout -k 5 "$limit" "$@" >"$name.log" 2>&1
  status=$?
  printf '%-22s exit %3d  %4d s  %s\n' "$name" "$status" $((SECONDS - before)) "$(tail -n 1 "$name.log" | cut -c1-150)" |
    tee -a summary.txt
}

machine() {
  nvidia-smi
  nvcc --version
  $python -m torch.utils.collect_env
  $python -m pip list
}
build() {
  # From a copy: the build leaves files beside its sources, and the checkout may be read-only.
  rm -rf source && mkdir source && (cd "$root" && cp -r $sources "$out/source") || return
  local cuda=OFF
  if command -v nvcc; then cuda=ON; fi
  CMAKE_ARGS="-DPYFUSED_CUDA=$cuda -DPYFUSED_CUDA_ARCHITECTURES=native" \
    $python -m pip install --no-build-isolation --no-deps --no-index --force-reinstall -v ./source || return
  rm -rf source
  $python -m pyfused info
}
# Forward and backward of every STEPth small case on one backend, and a few steps of optimizers in the backward, once.
cases() { # BACKEND STEP
  cat <<PYTHON
import sys
sys.path.insert(0, "$root/tests")
import torch
from accuracy import gradients_of, on, public
from cases import CASES
from test_optim import RULES, SHAPES, Setting
import pyfused
ran = 0
with pyfused.use_backend("$1"):
    for case in CASES[::$2]:
        for dtype in case.dtypes[::2]:
            arguments = case.arguments(dtype)
            size = sum(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor))
            if "$1" in pyfused.dispatch.TABLE[case.op] and size < 20_000 and case.grad:
                gradients_of(public(case.op), on("cuda", arguments), case.grad)
                torch.cuda.synchronize()
                ran += 1
    for optimizer, _, options in RULES.values():
        for shape in ("padding per user", "wide tail"):
            Setting(torch.float32, **SHAPES[shape]).train(optimizer, options, fused=True, device="cuda")
            torch.cuda.synchronize()
            ran += 1
print(ran, "cases ran on $1")
PYTHON
}
sanitize() { # TOOL BACKEND STEP KERNELS...
  local tool=$1 script=cases-$1-$2.py
  cases "$2" "$3" >"$script"
  shift 3
  # The convolutions by our kernels, also where cuDNN's would be chosen.
  export PYFUSED_CUDA_CONV=own PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer --tool "$tool" "$@" --error-exitcode 9 --print-limit 20 "$python" "$script"
}

export -f machine build cases sanitize
export root out python sources="setup.py CMakeLists.txt pyproject.toml README.md LICENSE csrc pyfused bench"
stage machine 20 bash -c machine
stage build 150 bash -c build
# Not what needs no GPU: compiling for other ones, the emulation and the interpreter, which would use up the time.
gpu="cuda or triton or gpu"
cuda="not emulat and not resources and not triton"
triton="triton and not emulat and not compile and not interpreter"
test=("$python" -m pytest -q -p no:cacheprovider "$root/tests")
parallel=() # what compiles, or compares with what it computes on the CPU
if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 8); fi
stage tests-gpu 120 "${test[@]}" -k "($gpu) and $cuda" "${parallel[@]}"
stage tests-triton 100 "${test[@]}" -k "$triton" --few "${parallel[@]}"
stage tests-gemm 40 env PYFUSED_CUDA_CONV=own "${test[@]}" -k "cuda and conv2d and $cuda"
# Our kernels only, by their mangled names: to instrument PyTorch's takes most of the time.
stage memcheck 45 bash -c "sanitize memcheck cuda 1 --kernel-name kns=pyfused"
stage memcheck-triton 45 bash -c "sanitize memcheck triton 6 --kernel-name-exclude kns=_ZN2at"
stage racecheck 50 bash -c "sanitize racecheck cuda 1 --kernel-name kns=pyfused"
stage tests-autotune 60 env PYFUSED_AUTOTUNE=1 "${test[@]}" -k "conv2d and ((cuda and $cuda) or ($triton))" --few
stage kernels 30 "$python" -m pyfused.bench.gpu_kernels
stage conv-algorithms 30 "$python" -m pyfused.bench.conv_algorithms conv_algorithms.csv
stage bench 190 "$python" -m pyfused.bench.gpu bench --minutes $((3 * share / 100))
stage bench-no-compile 60 "$python" -m pyfused.bench.gpu bench-no-compile --minutes $((share / 100)) --no-compile
stage tests-rest 120 "${test[@]}" "${parallel[@]}" -k "not ($gpu)"
grep -hE ' (cuda|triton) ' kernels.log 2>/dev/null
cat bench*/table.txt 2>/dev/null
tar -czf results.tar.gz --exclude=source --exclude=results.tar.gz ./* 2>/dev/null
echo "total $SECONDS s; logs, rows and tables in $out"
