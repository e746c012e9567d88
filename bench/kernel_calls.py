"""Calls the compiled kernels, on one thread and small fixed inputs, from a Python that has its standard library only.

``python -I -S bench/kernel_calls.py EXTENSION ISA...`` is what `instructions.py` runs under valgrind, where importing
torch would take minutes. The kernels know tensors by DLPack alone, so a small class can stand in for torch.Tensor.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import mmap
import os
import sys
import threading
from array import array

PAGE = 4096
RELU, SILU, GELU = 1, 5, 6  # places in pyfused.ops.conv_act.ACTIVATIONS
PERIOD = 4093  # values repeat after this prime number of elements
DTYPES = {"float32": (2, 32), "bfloat16": (4, 16), "int32": (0, 32), "int64": (0, 64), "uint8": (1, 8)}  # kind, bits


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
def view_from_object(tensor, out):
    out[0] = tensor.view
    return 0


class ExchangeAPI(ctypes.Structure):
    """`DLPackExchangeAPI` of csrc/tensor_view.h; the kernels' bindings call `view_from_object` only."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        *((name, ctypes.c_void_p) for name in ("previous", "allocate", "managed_from_object", "object_from_managed")),
        ("view_from_object", type(view_from_object)),
        ("current_stream", ctypes.c_void_p),
    )


def _capsule(pointer, name: bytes):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(pointer), name, None)


API, API_NAME = ExchangeAPI(version=(1, 3), view_from_object=view_from_object), b"dlpack_exchange_api"


class Arena:
    """Memory for the tensors of a family of cases, one after the other, always in the same order: where the compiler
    makes a loop that asks whether two buffers overlap, how much it executes depends on which of them comes first."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.end, self.next = self.start + size, self.start

    def reset(self) -> None:
        self.next = self.start

    def take(self, size: int) -> int:
        data = self.next
        self.next += (size + PAGE) // PAGE * PAGE
        if self.next > self.end:
            raise MemoryError("the cases of this family need a larger arena")
        return data


arena = Arena(64 << 20)


class Tensor:
    """A tensor of `shape`, filled from `pattern`; a 4-d one is channels_last if `last`."""

    __dlpack_c_exchange_api__ = _capsule(API, API_NAME)

    def __init__(self, *shape: int, dtype: str = "float32", last: bool = False, below: int = PERIOD) -> None:
        kind, bits = DTYPES[dtype]
        size = math.prod(shape) * bits // 8
        data = arena.take(size)
        block = pattern(dtype, below)
        ctypes.memmove(data, block * (size // len(block) + 1), size)
        order = (0, 2, 3, 1) if last else range(len(shape))  # dimensions from the outermost in memory
        strides, step = [0] * len(shape), 1
        for d in reversed(order):
            strides[d], step = step, step * shape[d]
        self.view = DLTensor(
            data,
            (1, 0),
            len(shape),
            kind,
            bits,
            1,
            (ctypes.c_int64 * len(shape))(*shape),
            (ctypes.c_int64 * len(shape))(*strides),
            0,
        )


def pattern(dtype: str, below: int) -> bytes:
    """PERIOD scrambled values: floating point in [-1, 1], ids in [0, below), pooling codes 0 to 3 or 255 (dead)."""
    scrambled = [i * 1597 % PERIOD for i in range(PERIOD)]
    if dtype in ("int32", "int64"):
        return array("i" if dtype == "int32" else "q", [x % below for x in scrambled]).tobytes()
    if dtype == "uint8":
        return bytes((0, 1, 2, 3, 255)[x % 5] for x in scrambled)
    single = array("f", [2 * x / PERIOD - 1 for x in scrambled])
    if dtype == "bfloat16":  # the upper half of a float32
        return single.tobytes() if sys.byteorder == "big" else array("H", array("H", single.tobytes())[1::2]).tobytes()
    return single.tobytes()


def cross_entropy_cases():
    mean, options, grad_loss, thread = 1, (-100, 0.0, 0.0, 0.0), 1.0, 1
    for shape, dtype in (
        ((8, 32003), "float32"),
        ((8, 32003), "bfloat16"),
        ((128, 1000), "float32"),
        ((2048, 10), "float32"),
        ((2, 21, 1027), "float32"),
    ):
        rows, text = math.prod(shape) // shape[1], f"{'x'.join(map(str, shape))} {dtype}"
        scalar, stats, total, lse = Tensor(), Tensor(3, rows), Tensor(), None
        logits, labels = Tensor(*shape, dtype=dtype), Tensor(rows, dtype="int64", below=shape[1])
        grad = Tensor(*shape, dtype=dtype)
        for how, written in (("", None), (" with gradient", grad)):
            forward = (scalar, lse, stats, total, written, logits, labels, None, mean, *options, grad_loss, thread)
            yield "cross_entropy", text + how, forward
        backward = (grad, scalar, None, logits, labels, None, stats, total, mean, *options, thread)
        yield "cross_entropy_backward", text, backward


def linear_cross_entropy_cases():
    for rows, dims, classes in ((50, 40, 200), (40, 600, 101)):
        losses = (Tensor(rows), Tensor(3, rows))
        grads = (Tensor(rows, dims), Tensor(classes, dims), Tensor(classes), Tensor(classes, 48))
        layer = (Tensor(rows, dims), Tensor(classes, dims), Tensor(classes))
        labels, upstream = Tensor(rows, dtype="int64", below=classes), Tensor(rows)
        given = (*losses, *grads, *layer, labels, None, None, upstream, 0.0, 0.0, 32, 1)
        yield "linear_cross_entropy", f"{rows}x{dims}x{classes}", given
    ids = (Tensor(rows, dtype="int32", below=20), Tensor(classes, dtype="int32", below=20))
    given = (*losses, *(None,) * 4, *layer, labels, *ids, upstream, 0.0, 0.0, 32, 1)
    yield "linear_cross_entropy", f"{rows}x{dims}x{classes} loss alone, ids", given


def direct_cases():
    for (n, c, h, w), out, k, stride, pad, pool, last in (
        ((4, 1, 28, 28), 32, 3, 1, 0, True, False),
        ((1, 3, 57, 61), 32, 3, 1, 1, True, True),
        ((1, 3, 64, 64), 64, 7, 2, 3, False, False),
    ):
        oh, ow = ((size + 2 * pad - k) // stride + 1 for size in (h, w))
        pooled = (n, out, oh // 2, ow // 2) if pool else (n, out, oh, ow)
        text = f"{n}x{c}x{h}x{w}->{out} k{k}" + f" s{stride}" * (stride > 1) + " pool" * pool
        text += " NHWC" if last else " NCHW"
        x, weight, bias = Tensor(n, c, h, w, last=last), Tensor(out, c, k, k), Tensor(out)
        y, grad = Tensor(*pooled, last=last), Tensor(*pooled, last=last)
        code = Tensor(*pooled, dtype="uint8", last=last) if pool else None
        geometry = (stride, stride, pad, pad, 1)
        # Backward first: forward replaces the pattern in y and code, which is as good a saved output as any.
        yield "conv2d_direct_backward_weight", text, (weight, bias, grad, code or y, x, *geometry)
        yield "conv2d_direct", text, (y, code, x, weight, bias, *geometry)


def winograd_cases():
    for (n, c, h, w), out, pad, tile in (
        ((4, 32, 13, 13), 64, 0, 4),
        ((1, 64, 28, 28), 96, 1, 4),
        ((8, 64, 5, 5), 64, 0, 3),
    ):
        text = f"{n}x{c}x{h}x{w}->{out} p{pad}"
        oh, ow = h + 2 * pad - 2, w + 2 * pad - 2
        x, y, saved, grad = Tensor(n, c, h, w, last=True), *(Tensor(n, out, oh, ow, last=True) for _ in range(3))
        weight, bias, weight_grad = Tensor(out, c, 3, 3), Tensor(out), Tensor(out, c, 3, 3)
        transformed = Tensor((tile + 2) ** 2 * (c * (-(-out // 16) * 16) + 16))
        yield "conv2d_winograd_transform_weight", text, (transformed, weight, tile, 1)
        yield "conv2d_winograd", text + " transformed", (y, x, transformed, bias, pad, pad, True, tile, 1)
        yield "conv2d_winograd", text, (y, x, weight, bias, pad, pad, True, tile, 1)
        yield "conv2d_winograd_act", text + " SiLU", (y, x, weight, bias, saved, pad, pad, SILU, 0.0, tile, 1)
        pooled = [Tensor(n, out, oh // 2, ow // 2, dtype=dtype, last=True) for dtype in ("float32", "uint8")]
        yield "conv2d_winograd_pool", text, (*pooled, x, weight, bias, pad, pad, 1)
        yield "conv2d_winograd_backward_input", text, (x, grad, saved, weight, pad, pad, tile, 1)
        yield "conv2d_winograd_backward_weight", text, (weight_grad, bias, grad, saved, x, pad, pad, tile, 1)


def implicit_gemm_cases():
    ones, twos = (0, 0, 1, 1), (1, 1, 1, 1)  # padding and dilation
    for last in (False, True):
        layout = "NHWC" if last else "NCHW"
        x, y = Tensor(2, 45, 27, 29, last=last), Tensor(2, 70, 27, 29, last=last)
        weight, bias = Tensor(70, 45, 1, 1), Tensor(70)
        yield "conv2d_implicit_gemm", f"2x45x27x29->70 {layout}", (y, x, weight, bias, None, 1, 1, *ones, RELU, 0.0, 1)
        y, weight = Tensor(2, 70, 14, 15, last=last), Tensor(70, 45, 3, 3)
        text = f"2x45x27x29->70 k3 s2 {layout}"
        yield "conv2d_implicit_gemm", text, (y, x, weight, bias, None, 2, 2, *twos, RELU, 0.0, 1)
    y = residual = Tensor(2, 70, 27, 29, last=True)
    given = (y, x, Tensor(70, 45, 1, 1), bias, residual, 1, 1, *ones, SILU, 0.0, 1)
    yield "conv2d_implicit_gemm", "2x45x27x29->70 NHWC residual SiLU", given


def depthwise_cases():
    for k, stride in ((3, 1), (5, 2)):
        text, size = f"2x45x27x29 k{k} s{stride}", [(n + 2 * (k // 2) - k) // stride + 1 for n in (27, 29)]
        x, grad_x = (Tensor(2, 45, 27, 29, last=True) for _ in range(2))
        y, grad = (Tensor(2, 45, *size, last=True) for _ in range(2))
        weight, bias, grads = Tensor(45, 1, k, k), Tensor(45), (grad_x, Tensor(45, 1, k, k), Tensor(45))
        yield "conv2d_depthwise", text, (y, x, weight, bias, stride, k // 2, k // 2, 1)
        yield "conv2d_depthwise_backward", text, (*grads, grad, y, x, weight, stride, k // 2, k // 2, 1)


def epilogue_cases():
    n, c, h, w = 2, 45, 27, 29
    for last in (False, True):
        text = f"{n}x{c}x{h}x{w} " + ("NHWC" if last else "NCHW")
        full, g = (Tensor(n, c, h, w, last=last) for _ in range(2))
        out, code = (Tensor(n, c, h // 2, w // 2, dtype=dtype, last=last) for dtype in ("float32", "uint8"))
        yield "conv2d_relu_grad", text, (g, Tensor(c), full, full, 1)
        for name, activation in (("SiLU", SILU), ("GELU", GELU)):
            yield "conv_act", f"{text} {name}", (g, full, full, activation, 0.0, 1)
            yield "conv_act_grad", f"{text} {name}", (g, Tensor(c), full, full, activation, 0.0, 1)
        yield "relu_max_unpool2d", text, (g, out, code, 2, 2, 2, 2, 1)
        yield "relu_max_pool2d", text, (out, code, full, 2, 2, 2, 2, 1)


def embedding_cases():
    rows, padding = 3000, -1
    for batch, candidates, dim in ((2048, 0, 64), (64, 32, 50)):
        ids = (batch, candidates) if candidates else (batch,)
        text = f"{'x'.join(map(str, ids))} of {rows} D{dim}"
        user, item = Tensor(batch, dtype="int64", below=rows), Tensor(*ids, dtype="int64", below=rows)
        out, tables = Tensor(*ids), [Tensor(rows, dim) for _ in range(2)]
        yield "embedding_dot", text, (out, user, item, *tables, None, None, 1)
        dense = (Tensor(rows, dim), None, None, None)
        yield "embedding_dot_backward", text + " dense", (*dense, out, item, user, tables[0], rows, padding, 1)
        occurring = min(math.prod(ids), rows)
        sparse = (Tensor(occurring, dim), None, Tensor(occurring, dtype="int64"), Tensor(dtype="int64"))
        yield "embedding_dot_backward", text + " sparse", (*sparse, out, item, user, tables[0], rows, padding, 1)
    yield "mask_accidental_hits", "64x500", (Tensor(64, 500), Tensor(500, dtype="int64", below=300), 0, 1)


def cases():
    """Every case: kernel, a text that tells it from the kernel's others, arguments."""
    for family in (
        cross_entropy_cases,
        linear_cross_entropy_cases,
        direct_cases,
        winograd_cases,
        implicit_gemm_cases,
        depthwise_cases,
        epilogue_cases,
        embedding_cases,
    ):
        arena.reset()
        yield from family()


def main(extension: str, isas: list[str]) -> None:
    """Call each kernel twice, the first time to warm up its scratch memory, and print a line for the second."""
    spec = importlib.util.spec_from_file_location("pyfused._C", extension)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for isa in isas:
        kernels.set_isa(isa)
        for name, text, arguments in cases():
            getattr(kernels, name)(*arguments)
            os.getpgrp()  # valgrind, told so by instructions.py, writes the counts since the last such call
            getattr(kernels, name)(*arguments)
            os.getpgrp()
            print(isa, f"{name} {text}", sep="\t")


if __name__ == "__main__":
    # In a thread, whose stack starts at a page: the main thread's starts below the environment and the arguments, and
    # how a buffer on it is aligned changes what memcpy executes.
    failed = []
    report = threading.excepthook
    threading.excepthook = lambda error: (report(error), failed.append(error.exc_type))
    thread = threading.Thread(target=main, args=(sys.argv[1], sys.argv[2:]))
    thread.start()
    thread.join()
    sys.exit(bool(failed))
