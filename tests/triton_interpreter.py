"""Makes Triton's interpreter (TRITON_INTERPRET=1) strict enough to test with. `install()` before the first launch.

What the interpreter of Triton 3.6 to 3.9 does wrong or does not notice, and what it does after `install`:

  bfloat16        computes on the raw bits, and truncates      computes in float32 and rounds to nearest even
  masked lanes    of a load without `other` are 0              are NaN (integers: 0x7f7f...); a GPU: undefined
  out of bounds   reads and writes wherever that leads         IndexError: an active lane outside of every argument
  races           never happen: one program after another      RuntimeError: two programs touch a byte, one of them
                                                               writing, not both atomically; or one store twice
  program order   row by row                                   random, with a fixed seed
"""

import random
import sys

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle

ORDER_SEED = 0
original = {}  # name of a builder method -> the interpreter's own


def install() -> None:
    if original:
        return
    np.seterr(all="ignore")  # -inf - -inf and the like are the kernels' business
    memory = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic_rmw,
        "set_grid_idx": set_grid_idx,
    }
    conversions = {"cast_impl": cast, "create_fp_to_fp": fp_to_fp, "create_dot": dot}
    for name, replacement in {**memory, **conversions}.items():
        original[name] = getattr(Builder, name)
        setattr(Builder, name, replacement)
    for name in arithmetic():
        original[name] = getattr(Builder, name)
        setattr(Builder, name, in_float32(original[name]))
    interpreter.GridExecutor.__call__ = run_grid
    interpreter.range = shuffled_range


# --- bfloat16
def is_bf16(x) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def to_float32(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def to_bf16(values: np.ndarray) -> TensorHandle:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def cast(self, source, target):
    before, after = source.dtype.scalar, target.scalar
    if before == after == tl.bfloat16:
        return source
    if before == tl.bfloat16:
        return TensorHandle(to_float32(source).data.astype(interpreter._get_np_dtype(after)), after)
    if after == tl.bfloat16:
        return to_bf16(source.data.astype(np.float32))
    return original["cast_impl"](self, source, target)


def fp_to_fp(self, source, target, mode):
    if {source.dtype.scalar, target.scalar} <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
        return cast(self, source, target)
    return original["create_fp_to_fp"](self, source, target, mode)


def dot(self, a, b, *rest):
    return original["create_dot"](self, to_float32(a), to_float32(b), *rest)


def arithmetic() -> list[str]:
    """The builder's methods that compute with floating-point numbers."""
    prefixes = ["f", "min", "max", "exp", "log", "sqrt", "rsqrt", "cos", "sin", "floor", "ceil", "precise", "clamp"]
    conversions = {f"create_fp_{name}" for name in ("to_fp", "ext", "trunc", "to_si", "to_ui")}
    return [
        name
        for name in dir(Builder)
        if name.startswith(tuple(f"create_{p}" for p in prefixes)) and name not in conversions
    ]


def in_float32(method):
    def run(self, *args, **kwargs):
        if not any(map(is_bf16, args)):
            return method(self, *args, **kwargs)
        result = method(self, *map(to_float32, args), **kwargs)
        return to_bf16(result.data) if result.data.dtype == np.float32 else result  # comparisons give bool

    return run


# --- Memory
class Memory:
    """The storages of one launch's arguments; for each element of them the last program to write, read, update."""

    def __init__(self, tensors):
        sizes = {}
        for t in tensors:
            storage = t.untyped_storage()
            if storage.nbytes():
                where = (storage.data_ptr(), storage.nbytes())
                sizes[where] = min(t.element_size(), sizes.get(where, 8))
        ranges = sorted(sizes)
        self.begin = np.array([b for b, _ in ranges], np.uint64)
        self.end = np.array([b + n for b, n in ranges], np.uint64)
        self.size = [np.uint64(sizes[r]) for r in ranges]
        self.touched = [
            {kind: np.full(n // int(size) + 1, -1, np.int32) for kind in CONFLICTS}
            for (_, n), size in zip(ranges, self.size)
        ]

    def access(self, pointers, mask, size: int, kind: str) -> None:
        mask = np.broadcast_to(mask, np.shape(pointers)).astype(bool)
        at = np.asarray(pointers)[mask].astype(np.uint64)
        if not at.size:
            return
        storage = np.searchsorted(self.begin, at, side="right").astype(np.int64) - 1
        outside = (storage < 0) | (at + np.uint64(size) > self.end[np.maximum(storage, 0)])
        if outside.any():
            raise IndexError(f"{kind} out of bounds in program {program}: {outside.sum()} of {at.size} lanes")
        if (at % np.uint64(size)).any():
            raise IndexError(f"misaligned {kind} of {size} bytes in program {program}")
        for s in np.unique(storage):
            offsets = ((at[storage == s] - self.begin[s]) // self.size[s]).astype(np.int64)
            self.check_races(self.touched[s], offsets, kind)

    def check_races(self, touched, offsets, kind: str) -> None:
        me = hash(program) & 0x7FFFFFFF
        if kind == "write" and np.unique(offsets).size != offsets.size:
            raise RuntimeError(f"race: one store of program {program} writes an address twice")
        for other in CONFLICTS[kind]:
            last = touched[other][offsets]
            if ((last != -1) & (last != me)).any():
                raise RuntimeError(f"race: {kind} by program {program} where another program did a {other}")
        touched[kind][offsets] = me


CONFLICTS = {"write": ("write", "read", "update"), "read": ("write", "update"), "update": ("write", "read")}
memory = Memory([])
program = None


def masked_load(self, pointers, mask, other, *rest):
    element = pointers.get_element_ty()
    dtype = np.dtype(interpreter._get_np_dtype(element))
    if other is None and pointers.data.size > 1:  # of one lane Triton itself drops other=0, as `other` is then false
        undefined = np.frombuffer(b"\x7f" * dtype.itemsize, dtype)[0] if dtype.kind in "iu" else dtype.type("nan")
        other = TensorHandle(np.full(pointers.data.shape, undefined, dtype), element)
    memory.access(pointers.data, mask.data, dtype.itemsize, "read")
    return original["create_masked_load"](self, pointers, mask, other, *rest)


def masked_store(self, pointers, value, mask, *rest):
    memory.access(pointers.data, mask.data, value.data.dtype.itemsize, "write")
    return original["create_masked_store"](self, pointers, value, mask, *rest)


def atomic_rmw(self, op, pointers, value, mask, *rest):
    memory.access(pointers.data, mask.data, value.data.dtype.itemsize, "update")
    return original["create_atomic_rmw"](self, op, pointers, value, mask, *rest)


def set_grid_idx(self, *index):
    global program
    program = index
    return original["set_grid_idx"](self, *index)


# --- The grid
execute = interpreter.GridExecutor.__call__


def run_grid(self, *args, **kwargs):
    global memory
    given = [y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, tuple) else (x,))]
    bases = [getattr(x, "base", x) for x in given]
    memory = Memory([x for x in bases if hasattr(x, "untyped_storage")])
    return execute(self, *args, **kwargs)


def shuffled_range(*bounds):
    """`range` for the module that runs grids: there, one bound means the programs of a dimension."""
    numbers = range(*bounds)
    if sys._getframe(1).f_code is not execute.__code__:
        return numbers
    return random.Random(ORDER_SEED).sample(numbers, len(numbers))
