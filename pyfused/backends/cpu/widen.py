"""16-bit convolutions and matrix products on CPUs without instructions for them: in float32, rounded once at the end.

That is also what such instructions compute. Without them PyTorch's own kernels are far slower than in float32, most
where they fall back to plain loops. AVX-512 Xeon without AVX512-BF16, 2 threads, ms in float32 / bfloat16 / float16:

    convolution 8x64x56x56 -> 64, 3x3      5.5 / 31 / 99        its gradients      14 / 66 / 200
    512x512 times 512x8000                 20 / 151 / 219       its gradients      40 / 270 / 11,700
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...memory import cached, derived
from ...ops.conv2d_relu import memory_format

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx_ne_convert"),
}

_LARGE_WEIGHT = 128 << 10  # bytes of a weight whose float32 is worth remembering


def _slow_dtypes() -> frozenset[torch.dtype]:
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # not in PyTorch before 2.12
    if cpu.get("architecture") != "x86_64":
        return frozenset()
    return frozenset(dtype for dtype, names in _INSTRUCTIONS.items() if not any(map(cpu.get, names)))


SLOW = _slow_dtypes()  # the 16-bit types that PyTorch multiplies more slowly here than float32


def is_slow(x: torch.Tensor) -> bool:
    return x.dtype in SLOW


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which products of x are computed."""
    return torch.float32 if is_slow(x) else x.dtype


def widened(alloc: Callable, weight: int | None = None) -> Callable:
    """Decorator of a convolution's kernel: it gets tensors of a slow dtype in float32, and its float32 results go to
    tensors from `alloc`, which takes the same arguments.

    weight: the number of an argument that is a model's weight. Where it is large its float32 is remembered while it
    does not change, and so is what the kernel itself remembers of that.
    """

    def decorate(run: Callable) -> Callable:
        @functools.wraps(run)
        def in_float32(*args):
            if args[0].dtype not in SLOW:
                return run(*args)
            results = run(*(_wide_weight(x) if i == weight else _wide(x) for i, x in enumerate(args)))
            if isinstance(results, torch.Tensor):
                return _as(alloc(*args), results)
            return tuple(map(_as, alloc(*args), results))

        return in_float32

    return decorate


def _wide(x):
    if not isinstance(x, torch.Tensor) or x.dtype not in SLOW:
        return x
    # What is dense keeps its strides; of anything else the layout that convolutions see in it is kept.
    layout = torch.preserve_format if is_dense(x) or x.dim() != 4 else memory_format(x)
    return cached(torch.empty_like(x, dtype=torch.float32, memory_format=layout)).copy_(x)


def is_dense(x: torch.Tensor) -> bool:
    """Whether it is contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _wide_weight(weight: torch.Tensor) -> torch.Tensor:
    worth_it = weight.nbytes >= _LARGE_WEIGHT and is_dense(weight)
    wide = derived(weight, "float32", lambda: _wide(weight)) if worth_it else None
    return _wide(weight) if wide is None else wide


def _as(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` with the dtype and strides of `like`, an uninitialised tensor."""
    return x if (x.dtype, x.stride()) == (like.dtype, like.stride()) else cached(like).copy_(x)
