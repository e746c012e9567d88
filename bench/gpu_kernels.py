"""What kernels take on a GPU, without Python: python -m bench.gpu_kernels [--backends cuda triton]

bench.gpu times calls; of small tensors these are longer in Python than on the device. Here registered ops run from CUDA
graphs, on several inputs in turn that together do not fit the cache. `share` is that of a copy, timed in the same way,
that reads and writes as many bytes as the op must.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch

import pyfused
from pyfused.ops import cross_entropy as op

from .machine import timed_calls

BF16, F32 = torch.bfloat16, torch.float32
CACHE = 256 << 20  # several times what GPUs have


class Kernel(NamedTuple):
    name: str
    bytes: int  # that must be read or written
    make: Callable[[], Callable[[], object]]  # an input, ready to be run on


def _run(op: str, backend: str, *args) -> object:
    reason = pyfused.dispatch.why_not(op, backend, args)
    if reason:
        raise RuntimeError(reason)
    return pyfused.dispatch.TABLE[op][backend].run(*args)


def _cross_entropy(backend, device, shape, dtype, **options) -> Iterator[Kernel]:
    logits = math.prod(shape) * dtype.itemsize
    packed = op.packed_options("mean", -100, options.get("label_smoothing", 0.0), 0.0, options.get("softcap"))

    def given():
        x = torch.randn(shape, dtype=dtype, device=device)
        return x, torch.randint(shape[1], (shape[0], *shape[2:]), device=device), None

    def forward():
        args = given()
        return lambda: _run("cross_entropy", backend, *args, False, *packed)

    def backward():
        args = given()
        _, _, stats, total = _run("cross_entropy", backend, *args, False, *packed)
        one = torch.ones((), device=device)
        return lambda: _run("cross_entropy_backward", backend, one, None, *args, stats, total, *packed)

    name = " ".join(["cross_entropy", "x".join(map(str, shape)), str(dtype)[6:], *options])
    yield Kernel(name, logits, forward)
    yield Kernel(name + " backward", 2 * logits, backward)


def _embedding_dot(backend, device, batch, rows, dim, dtype) -> Iterator[Kernel]:
    row = dim * dtype.itemsize

    @functools.cache  # far larger than the cache
    def tables():
        return [torch.randn(rows, dim, dtype=dtype, device=device) for _ in range(2)]

    def given():
        return *(torch.randint(rows, (batch,), device=device) for _ in range(2)), *tables()

    def forward():
        args = given()
        return lambda: _run("embedding_dot", backend, *args, None, None)

    def backward():
        user, item, _, items = given()
        grad = torch.randn(batch, dtype=dtype, device=device)
        args = (grad, user, item, items, rows, -1, True, False, False)
        return lambda: _run("embedding_dot_backward", backend, *args)

    name = f"embedding_dot {batch} of {rows} D{dim} {str(dtype)[6:]}"
    yield Kernel(name, batch * (2 * row + 16 + dtype.itemsize), forward)
    yield Kernel(name + " backward, sort, dense", batch * (2 * row + 40) + rows * row, backward)


def _around_convolutions(device, pixels, channels, dtype) -> Iterator[Kernel]:
    from pyfused import _C
    from pyfused.backends.cuda import conv2d_relu

    matrix, name = pixels * channels * dtype.itemsize, f"{pixels}x{channels} {str(dtype)[6:]}"

    def image():
        return torch.randn(pixels, channels, 1, 1, dtype=dtype, device=device)

    def bias_relu():
        x, bias = image().view(pixels, channels), torch.randn(channels, dtype=dtype, device=device)
        return lambda: _C.cuda_conv2d_bias_relu(x, bias)

    def relu_grad():
        grad, output = image(), image().relu_()
        g, d_bias = torch.empty_like(grad), torch.empty(channels, dtype=dtype, device=device)
        return lambda: conv2d_relu._relu_grad(g, d_bias, grad, output)

    yield Kernel(f"conv2d_bias_relu {name}", 2 * matrix, bias_relu)
    yield Kernel(f"conv2d_relu_grad {name}", 3 * matrix, relu_grad)


def kernels(backend: str, device: torch.device, part: int = 1) -> Iterator[Kernel]:
    """`part`: tensors have one in so many rows."""
    for shape, dtype, options in (
        ((8192, 128256), BF16, {}),
        ((8192, 128257), BF16, {}),
        ((8192, 128256), BF16, {"label_smoothing": 0.1}),
        ((8192, 32000), F32, {}),
        ((8192, 1000), BF16, {}),
        ((65536, 1000), BF16, {}),
        ((65536, 10), BF16, {}),
        ((8, 21, 512, 512), F32, {}),
    ):
        yield from _cross_entropy(backend, device, (shape[0] // min(part, shape[0]), *shape[1:]), dtype, **options)
    for dim, dtype in ((64, F32), (128, BF16), (32, BF16)):
        yield from _embedding_dot(backend, device, 65536 // part, 1_000_000 // part, dim, dtype)
    if backend == "cuda":
        yield from _around_convolutions(device, 32 * 56 * 56 // part, 64, BF16)
        yield from _around_convolutions(device, 32 * 56 * 56 // part, 256, BF16)


def inputs(kernel: Kernel) -> list[Callable[[], object]]:
    return [kernel.make() for _ in range(min(16, max(2, CACHE // kernel.bytes)))]


def seconds(runs: list[Callable[[], object]], replays: int = 7) -> float:
    """The median, per run, of a CUDA graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run() for run in runs]  # kept: each writes to memory of its own
    graph.replay()
    times = timed_calls(graph.replay, replays, torch.device("cuda"))
    del results
    return median(times) / 1e3 / len(runs)


def copy_of(size: int, device: torch.device) -> Kernel:
    """Reads half of `size` bytes and writes the other."""

    def make():
        source, target = (torch.randn(max(size // 8, 1), device=device) for _ in range(2))
        return lambda: target.copy_(source)

    return Kernel("copy", size, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    options = parser.parse_args()
    device, copies = torch.device("cuda"), {}
    print(f"{'us':>9} {'GB/s':>7} {'copy GB/s':>9} {'share':>6}")
    for backend in options.backends:
        if reason := pyfused.available_backends()[backend]:
            print(f"{backend}: {reason}")
            continue
        for kernel in kernels(backend, device):
            try:
                took = seconds(inputs(kernel))
                if kernel.bytes not in copies:
                    copies[kernel.bytes] = kernel.bytes / seconds(inputs(copy_of(kernel.bytes, device)))
            except Exception as error:
                print(f"{backend} {kernel.name}: {type(error).__name__}: {error}")
                continue
            rate, copied = kernel.bytes / took, copies[kernel.bytes]
            numbers = f"{took * 1e6:9.1f} {rate / 1e9:7.0f} {copied / 1e9:9.0f} {rate / copied:6.2f}"
            print(f"{numbers}  {backend} {kernel.name}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
