"""conv2d_relu on CUDA, by one of three algorithms.

direct         conv2d_direct.py: first layers.
implicit_gemm  csrc/cuda/conv2d_implicit_gemm*.cu: tensor cores, channels_last, bias and ReLU inside, in backward the
               ReLU's mask and the bias gradient.
cudnn          PyTorch's convolution in the layout given. Where that is channels_last, bias and ReLU are one pass after
               it, the mask and the bias gradient one pass before its gradients: csrc/cuda/conv2d_epilogue.cu.

No GPU has measured them. The rule, see `choose`, is an estimate for an H100. First layers: the direct kernels multiply
at some 40 Tflop/s, in float32, and cuDNN at 300, but 8 channels for 1 to 4, and with a pass over the output, in 16 bits
4 bytes a number, 1.3 ps at 3 TB/s. So a number of the output costs 0.05 ps for each product of the direct kernels
against 0.05 ps for each tap and the pass: direct up to some 28 products more than taps. Other layers: cuDNN at 600
Tflop/s in 16 bits and ours at 350, which is what the second-level cache can feed, make a product 2.4 fs dearer.
Forward, ours saves the pass: worth it up to some 500 products a number, pooled twice as many. Backward, ours saves one
pass of five for twice the products: cuDNN.

PYFUSED_AUTOTUNE=1 measures all that can run instead, once for each sizes, dtype and device; so does
torch.backends.cudnn.benchmark, which lets PyTorch measure cuDNN's own algorithms.

Ours give the same bits every time, cuDNN its gradients where PyTorch's would: torch.backends.cudnn.deterministic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from ... import _C
from ...dispatch import kernel
from ...ops import conv2d_relu as op
from . import conv2d_direct as direct

# "own": never cuDNN where a kernel of ours can run; "cudnn": always; for tests and benchmarks.
forced: str | None = os.environ.get("PYFUSED_CUDA_CONV") or None
AUTOTUNE = os.environ.get("PYFUSED_AUTOTUNE", "0") == "1"
FEW_PRODUCTS = 512  # for each number of the output
FEW_MORE = 28  # products for each number of the output than taps, of first layers


# --- Choice
def cannot_gemm(input, weight, stride, padding, dilation, groups) -> str | None:
    """Why the implicit GEMM cannot run this, or None."""
    if groups != 1:
        return "the implicit GEMM has no groups"
    if input.dtype == torch.float64:
        return "the implicit GEMM has no float64"
    shapes = (input.shape, op.output_shape(input, weight, stride, padding, dilation))
    if len(input) >= 2**28 or any(math.prod(shape[1:]) >= 2**30 for shape in shapes):
        return "the implicit GEMM takes fewer than 2^28 images, of fewer than 2^30 numbers"
    if stride[0] * stride[1] > 16:
        return "the implicit GEMM's input gradient takes a launch for each of stride x stride positions"
    return None


def choose(input, weight, stride, padding, dilation, groups, *, backward=False, pooled=False) -> tuple[str, str]:
    """The algorithm by the rule above, and why."""
    if forced == "cudnn":
        return "cudnn", "asked for"
    if direct.cannot(input, weight, stride, padding, dilation, groups) is None:
        more = weight[0].numel() - weight[0, 0].numel()
        if more <= FEW_MORE or _exact(input) or forced == "own":
            return "direct", "few input channels"
        return "cudnn", "few input channels, but so many taps that cuDNN's faster arithmetic outweighs its passes"
    if reason := cannot_gemm(input, weight, stride, padding, dilation, groups):
        return "cudnn", reason
    if forced == "own":
        return "implicit_gemm", "asked for"
    if backward:
        return "cudnn", "the implicit GEMM would save one pass of five"
    if op.memory_format(input, weight) != torch.channels_last:
        return "cudnn", "the implicit GEMM would have to convert to channels_last"
    if weight[0].numel() > FEW_PRODUCTS * (2 if pooled else 1) or _exact(input):
        return "cudnn", "cuDNN's faster arithmetic outweighs the passes that the implicit GEMM would save"
    return "implicit_gemm", "few products for each number of the output, over which it saves passes"


_measured: dict[Hashable, str] = {}


class Plan(NamedTuple):
    """The algorithms that could run an op on certain arguments, and the one that the rule chooses, and why."""

    candidates: dict[str, Callable]
    rule: tuple[str, str]
    key: tuple  # what a measurement holds for: tensors by their sizes, strides, dtype and device

    def choice(self) -> tuple[str, str]:
        """The one that runs, and why: the fastest if it has been measured, else the rule's."""
        if self._is_measured():
            if name := _measured.get(self._measurement()):
                return name, "measured to be the fastest"
            return self.rule[0], f"{self.rule[1]}; to be measured by the first call"
        return self.rule

    def run(self):
        if self._is_measured() and self._measurement() not in _measured:
            with torch.cuda.device_of(next(x for x in self.key if isinstance(x, torch.Tensor))):
                if not torch.cuda.is_current_stream_capturing():
                    fastest = min(self.candidates, key=lambda name: seconds(self.candidates[name]))
                    _measured[self._measurement()] = fastest
        return self.candidates[self.choice()[0]]()

    def how(self) -> str:
        return ", ".join(self.choice())

    def _is_measured(self) -> bool:
        return (AUTOTUNE or torch.backends.cudnn.benchmark) and not forced and len(self.candidates) > 1

    def _measurement(self) -> Hashable:
        def hashable(x):
            if isinstance(x, torch.Tensor):
                return x.shape, x.stride(), x.dtype, x.device
            return tuple(x) if isinstance(x, list) else x  # torch.compile and torch.ops hand over lists

        return (*map(hashable, self.key), torch.backends.cudnn.conv.fp32_precision)


def seconds(run: Callable, repetitions: int = 10) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # chooses among cuDNN's own algorithms
    begin.record()
    for _ in range(repetitions):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repetitions


# --- Implicit GEMM
TILE = {False: 64, True: 128}  # rows and columns
INNER = 64  # bytes of the inner dimension at a time


def _exact(input) -> bool:
    """Whether float32 is to be multiplied as float32 and not as TF32: what PyTorch is told of its own convolutions."""
    return input.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"


def _large(rows: int, columns: int, parts: int = 1) -> bool:
    """Tiles of 128 x 128, not 64 x 64: where they fill a GPU of some 100 multiprocessors and are not half empty."""
    tiles = _tiles(rows, columns, True)
    return tiles * parts >= 100 and tiles * 4 <= 1.25 * _tiles(rows, columns, False)


def _tiles(rows: int, columns: int, large: bool) -> int:
    return -(-rows // TILE[large]) * -(-columns // TILE[large])


def _splits(rows: int, columns: int, most: int, large: bool) -> int:
    """Blocks that share the pixels of the weight gradient: about two for each of 132 multiprocessors in all."""
    return min(most, -(-264 // _tiles(rows, columns, large)))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _written(x: torch.Tensor) -> torch.Tensor:
    """`x`, to which nobody has written yet, if it is channels_last, else a tensor to copy to it when it is filled."""
    return x if _is_channels_last(x) else torch.empty_like(x, memory_format=torch.channels_last)


def gemm(out, code, input, weight, bias, stride, padding, dilation):
    """Fills `out`; with code, which is filled too, it is pooled by 2x2 windows."""
    written = [None if x is None else _written(x) for x in (out, code)]
    given = (_channels_last(input), _channels_last(weight), None if bias is None else bias.contiguous())
    large = _large(_pixels(out) * (1 if code is None else 4), weight.shape[0])
    _C.cuda_conv2d_implicit_gemm(*written, *given, *stride, *padding, *dilation, _exact(input), large)
    for x, result in zip((out, code), written):
        if x is not result:
            x.copy_(result)


def gemm_backward(grad, input, weight, saved, stride, padding, dilation, needed):
    """saved: the output, the codes of 2x2 pooling, or None: grad is masked already."""
    grads = d_input, d_weight, d_bias = op.alloc_grads(input, weight, needed)
    grad, saved = _channels_last(grad), None if saved is None else _channels_last(saved)
    options = (*stride, *padding, *dilation, _exact(input))
    if needed[0]:
        out, transposed = _written(d_input), _channels_last(weight.transpose(0, 1))
        large = _large(_pixels(input), input.shape[1])
        _C.cuda_conv2d_implicit_gemm_backward_input(out, grad, saved, transposed, *options, large)
        if out is not d_input:
            d_input.copy_(out)
    if needed[1] or needed[2]:
        pixels = _pixels(grad) * (4 if saved is not None and saved.dtype == torch.uint8 else 1)
        workspace, large = _weight_workspace(weight, pixels)
        written = (d_weight if needed[1] else torch.empty_like(weight), d_bias if needed[2] else None)
        given = (workspace, grad, saved, _channels_last(input))
        _C.cuda_conv2d_implicit_gemm_backward_weight(*written, *given, *options, large)
    return grads


def _weight_workspace(weight, pixels) -> tuple[torch.Tensor, bool]:
    """For each split of the pixels a gradient of weight and bias; and whether tiles are large."""
    rows, columns = weight.shape[0], weight[0].numel()
    most = max(1, pixels * weight.itemsize // (32 * INNER))  # splits of 32 steps
    large = not _exact(weight) and _large(rows, columns, most)
    splits = _splits(rows, columns, most, large)
    return weight.new_empty(splits, rows * (columns + 1), dtype=torch.float32), large


# --- Around cuDNN's convolutions
def _pixels(x: torch.Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _matrix(x: torch.Tensor | None) -> torch.Tensor | None:
    """[pixels, channels], a view, of a channels_last tensor."""
    return None if x is None else x.permute(0, 2, 3, 1).view(_pixels(x), x.shape[1])


def _relu_grad(g, d_bias, grad, output) -> None:
    parts = min(512, _pixels(grad) // 32 + 1)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    workspace = grad.new_empty(parts, grad.shape[1], dtype=dtype)
    _C.cuda_conv2d_relu_grad(_matrix(g), d_bias, workspace, _matrix(grad), _matrix(output))


def _is_channels_last(*tensors) -> bool:
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)


def _cudnn(input, weight, bias, stride, padding, dilation, groups, like):
    # PyTorch's depthwise kernel adds the bias itself, at no cost; cuDNN leaves it to a pass of its own.
    fused = bias is not None and _is_channels_last(like) and groups == 1
    out = torch.convolution(input, weight, None if fused else bias, stride, padding, dilation, False, (0, 0), groups)
    if not fused:
        return op.conform(out.relu_(), like)
    out = op.conform(out, like)
    _C.cuda_conv2d_bias_relu(_matrix(out), bias.contiguous())
    return out


def _cudnn_backward(grad, input, weight, output, options, needed):
    if not _is_channels_last(output):
        g = torch.ops.aten.threshold_backward(grad, output, 0)
        return op.convolution_backward(g, input, weight, *options, needed)
    grad = _channels_last(grad)
    g = torch.empty_like(grad) if needed[0] or needed[1] else None
    d_bias = weight.new_empty(weight.shape[0] if needed[2] else 0)
    _relu_grad(g, d_bias if needed[2] else None, grad, output)
    needed = [*needed[:2], False]
    if g is None:
        return (*op.alloc_grads(input, weight, needed)[:2], d_bias)
    return (*op.convolution_backward(g, input, weight, *options, needed)[:2], d_bias)


# --- The registered ops
def plan(*args) -> Plan:
    input, weight, bias, stride, padding, dilation, groups = args
    rule = choose(input, weight, stride, padding, dilation, groups)

    def filled(run, *more):
        out = op.alloc(*args)
        run(out, None, input, weight, bias, stride, padding, *more)
        return out

    candidates = {"cudnn": lambda: _cudnn(*args, op.alloc(*args))}
    if not direct.cannot(input, weight, *args[3:]):
        candidates["direct"] = lambda: filled(direct.forward)
    if not cannot_gemm(input, weight, *args[3:]):
        candidates["implicit_gemm"] = lambda: filled(gemm, dilation)
    return Plan(candidates, rule, args)


def plan_backward(grad, input, weight, output, stride, padding, dilation, groups, needed) -> Plan:
    options = (stride, padding, dilation, groups)
    rule = choose(input, weight, *options, backward=True)

    def by_direct():
        def masked():
            return torch.ops.aten.threshold_backward(grad, output, 0)

        return direct.backward(grad, output, input, weight, stride, padding, needed, masked)

    candidates = {"cudnn": lambda: _cudnn_backward(grad, input, weight, output, options, needed)}
    if not direct.cannot(input, weight, *options):
        candidates["direct"] = by_direct
    if not cannot_gemm(input, weight, *options):
        candidates["implicit_gemm"] = lambda: gemm_backward(grad, input, weight, output, *options[:3], needed)
    return Plan(candidates, rule, ("backward", grad, input, weight, *options, tuple(needed)))


@kernel("conv2d_relu", "cuda", how=lambda *args: plan(*args).how())
def forward(*args):
    return plan(*args).run()


@kernel("conv2d_relu_backward", "cuda", how=lambda *args: plan_backward(*args).how())
def backward(*args):
    return plan_backward(*args).run()
