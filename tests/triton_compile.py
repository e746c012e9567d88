"""Compiles what the Triton backend launches for GPUs that are not there, and prints what came of it as JSON.

    python tests/triton_compile.py [--full] TARGET...

Ops run forward and backward on CPU tensors while Triton believes in a GPU and launches nothing, so the kernels are
compiled as in real calls: types, alignment, constants and tiles; with --full the whole case table, and all tiles that
PYFUSED_AUTOTUNE=1 would try. What comes out of the ops is what was in the memory.
In a process of its own, since a process compiles or interprets, whichever it began with.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import cases
import emulated
import torch
import triton.backends.nvidia
from accuracy import gradients_of, public
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import pyfused
from pyfused.backends import triton as backend
from pyfused.backends.triton import common

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Gpu:
    """What Triton asks of a driver before it launches."""

    target = None  # a key of TARGETS

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.target]


def settings(full: bool):
    """(name, op, arguments, names of those to differentiate): what people call; every kernel; full: the case table."""
    cross_entropy = [
        ((64, 32768), BF16),
        ((64, 32768), F32),
        ((64, 50257), BF16),
        ((65536, 16), F32),
        ((2, 21, 64, 64), F32),
        ((8, 33), F64),
    ]
    for shape, dtype in cross_entropy:
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        given = {"input": torch.empty(shape, dtype=dtype), "target": target}
        yield f"{shape} {dtype}", "cross_entropy", given, ("input",)
    given |= {"input": torch.empty(1024, 1000, dtype=F16), "target": torch.zeros(1024, dtype=torch.int64)}
    for label_smoothing, softcap, z_loss in ((0.1, 30.0, 1e-4), (0.2, 20.0, 1e-3), (1.0, 1.0, 1.0)):
        options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
        yield f"with numbers {options}", "cross_entropy", given | options, ("input",)
    for classes in (4096, 4097):
        soft = {name: torch.empty(64, classes, dtype=BF16) for name in ("input", "target")}
        yield f"soft {classes} bf16", "cross_entropy", soft, ("input",)
    head = {"input": torch.empty(4096, 8, dtype=BF16), "linear_weight": torch.empty(40_000, 8, dtype=BF16)}
    yield "chunks bf16", "linear_cross_entropy", {**head, "target": torch.zeros(4096, dtype=torch.int64)}, tuple(head)
    for dim, dtype, sparse in ((64, F32, False), (128, BF16, True), (33, F16, True), (16, F64, False)):
        tables = {name: torch.empty(4096, dim, dtype=dtype) for name in ("user_weight", "item_weight")}
        ids = {name: torch.zeros(2048, dtype=torch.int32 if sparse else torch.int64) for name in ("user", "item")}
        yield f"{dim} {dtype}", "embedding_dot", {**ids, **tables, "sparse": sparse}, tuple(tables)
    yield "512 float64", "in_batch_cross_entropy", {**ids, **tables}, tuple(tables)
    for name, dim, dtype in (("SGD", 64, F32), ("Adagrad", 128, F16), ("RowwiseAdagrad", 512, BF16), ("Adam", 64, F32)):
        tables = {name: torch.empty(4096, dim, dtype=dtype) for name in ("user_weight", "item_weight")}
        tables |= {name: torch.empty(4096, dtype=dtype) for name in ("user_bias", "item_bias")}
        optimizer = getattr(pyfused.optim, name)(list(tables.values()))
        yield f"{name} {dim}", "embedding_dot", {**ids, **tables, "optimizer": optimizer}, tuple(tables)
    yield from convolutions()
    if full:
        for case in cases.CASES:
            for dtype in case.dtypes:
                if "triton" in pyfused.dispatch.TABLE[case.op]:
                    yield f"{case.id} {dtype}", case.op, case.arguments(dtype), case.grad


def convolutions():
    def conv(name, shape, outputs, size, dtype, op="conv2d_relu", tf32=True, **options):
        torch.backends.cudnn.allow_tf32 = tf32
        x = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
        weight_shape = (outputs, shape[1] // options.get("groups", 1), size, size)
        given = {
            "input": x,
            "weight": torch.empty(weight_shape, dtype=dtype),
            "bias": torch.empty(outputs, dtype=dtype),
        }
        return f"{name} {dtype}", op, {**given, **options}, tuple(given)

    pooled = {"op": "conv2d_relu_max_pool2d"}
    yield conv("64", (2, 64, 28, 28), 64, 3, BF16, padding=1)
    yield conv("64", (2, 64, 28, 28), 64, 3, F32, padding=1)
    yield conv("strict", (2, 64, 28, 28), 64, 3, F32, tf32=False, padding=1)
    yield conv("double", (2, 32, 9, 9), 32, 3, F64)
    yield conv("double pooled", (2, 8, 9, 9), 32, 3, F64, **pooled)
    yield conv("pooled", (2, 64, 28, 28), 64, 3, BF16, **pooled)
    yield conv("stem", (2, 3, 32, 32), 64, 7, F16, padding=3, stride=2)
    yield conv("gray", (2, 1, 28, 28), 32, 3, F32, **pooled)
    yield conv("overlapping", (2, 64, 28, 28), 64, 3, BF16, pool_size=3, pool_stride=2, **pooled)
    yield conv("grouped", (2, 64, 28, 28), 64, 3, BF16, groups=2)


def tool(name: str, data: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], check=True, capture_output=True, text=True).stdout


def narrow_products(ttir: str) -> list[str]:
    """The products of 32 bits that go into addresses, by their operands: arguments' names, or what they come from."""
    lines = (line.partition(" loc(")[0] for line in ttir.splitlines())
    made = {m[1]: m[2] for m in (re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line) for line in lines) if m}
    inputs = {value: re.findall(r"%\w+", text.partition(" : ")[0]) for value, text in made.items()}

    def origin(value):
        kind = made[value].split()[0] if value in made else ""
        if kind in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape"):
            return origin(inputs[value][0])
        if kind == "tt.get_program_id":
            return "program " + made[value].split()[1]
        return kind.removeprefix("arith.") or re.sub(r"_\d+$", "", value[1:])

    found, seen = set(), set()
    look_at = [inputs[value][1] for value, text in made.items() if text.startswith("tt.addptr")]
    while look_at:
        value = look_at.pop()
        if value in seen or value not in made or made[value].startswith("tt.load"):
            continue
        seen.add(value)
        look_at += inputs[value]
        if re.match(r"arith\.muli .* : (tensor<\d[\dx]*x)?i32\b", made[value]):
            found.add(" * ".join(sorted(map(origin, inputs[value]))))
    return sorted(found)


def describe(kernel) -> dict:
    """Of a compiled kernel: registers, bytes spilled, bytes of shared memory, how many global accesses of each kind,
    the products of 32 bits in its addresses, the types of its floating-point arguments, and what it does by atomics."""
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    found["narrow"] = narrow_products(kernel.asm["ttir"])
    signature = re.search(r"tt\.func public .*", kernel.asm["ttir"])[0]
    found["floats"] = sorted(set(re.findall(r"%\w+: (f\d+)", signature)))
    found["atomics"] = sorted(set(re.findall(r"tt\.atomic_\w+ (\w+)", kernel.asm["ttir"])))
    if "ptx" in kernel.asm:
        usage = tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        text = re.sub(r"cp\.async\.c\w\.shared\.global.*, (0x\d+)", r"cp.async.\1", kernel.asm["ptx"])
        accesses = r"(?:ld|st)\.global(?:\.\w+)*|cp\.async\.0x\d+"
        found |= {"registers": int(registers), "spilled": int(stack) + int(local)}
    else:
        text, accesses = kernel.asm["amdgcn"], r"(?:global|buffer)_(?:load|store)_\w+"
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, vectors, scalars, scratch = (int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in names)
        found |= {"registers": registers, "spilled": vectors + scratch, "scalars_spilled": scalars}
    return {**found, "accesses": collections.Counter(re.findall(accesses, text))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    gpu, run, compiled, found = Gpu(), JITFunction.run, set(), []
    now = {}  # what runs: op, setting, and which of the tiles that PYFUSED_AUTOTUNE=1 would try (0: the rule of thumb)

    def compile_only(self, *args, grid, warmup, **kwargs):
        in_tuples = [x for a in args if isinstance(a, tuple) for x in a]
        assert not any(x is None for x in in_tuples), f"{self.__name__}: Triton 3.6 compiles no None in a tuple"
        for gpu.target in options.targets:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in compiled:
                compiled.add(kernel.hash)
                launched = {"file": Path(self.fn.__code__.co_filename).stem, "kernel": self.__name__}
                found.append({**launched, **now, "target": gpu.target, **describe(kernel)})
        for x in args:
            if isinstance(x, torch.Tensor) and not x.is_floating_point():
                x.zero_()  # ids that PyTorch can take where the kernel would have written them

    def every_candidate(key, candidates, run):
        for now["tile"] in range(1, len(candidates) if run and options.full else 0):
            run(candidates[now["tile"]])
        now["tile"] = 0
        return candidates[0]

    JITFunction.run, common.choose = compile_only, every_candidate
    driver.set_active(gpu)
    backend.load()
    with emulated.serving_cpu("triton"), pyfused.use_backend("triton"):
        for setting, op, arguments, names in settings(options.full):
            now = {"op": op, "setting": setting, "tile": 0}
            for name in names:
                arguments[name].requires_grad_()
            gradients_of(public(op), arguments, names)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
