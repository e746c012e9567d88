"""The whole model before and after: outputs, gradients of all parameters, and buffers; nothing of it stays behind."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

# Largest difference allowed of any output, gradient or buffer: root mean square, relative to that of the tensor itself,
# or to a hundredth of that of all gradients, or buffers of its name, for one that is zero but for rounding: a bias
# before BatchNorm, its running mean where a convolution without bias follows another norm.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of gradients in float32: where rounding decides a ReLU or a maximum the other way, an element moves to another place.
# Against float64 the first layer's gradient of VGG-11 errs by 2e-3 (channels_last) and 4e-3 (NCHW) in eager PyTorch, by
# 3e-3 fused. Behind many norms in training mode it is more, of the unfused model, too: so twice what a gradient changes
# by is allowed where the inputs change by a random 1e-5 of themselves, about what Winograd's layers lose. (ResNet-18:
# that change makes 1.4 to 1.9%, the other memory format 0.7 to 0.8%, fusing 0.8 to 1.4%.) But no more than bfloat16's
# tenth, and nothing where a gradient is not finite then: that would let a wrong one pass.
KINKS, NUDGE, MOST = 1e-2, 1e-5, 1e-1
PIECE = 1 << 20  # elements that are compared at a time


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it GPUs multiply float32 as float32. As TF32, PyTorch's default for convolutions, each layer loses 3e-4,
    which would have to be allowed, and hide what is to be found."""
    products = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [x.fp32_precision for x in products]
    try:
        for x in products:
            x.fp32_precision = "ieee"
        yield
    finally:
        for x, precision in zip(products, before):
            x.fp32_precision = precision


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Within it the model is in this mode; training flags, buffers and random states are restored at the end.

    A model that is in training mode keeps the flags of its parts, some of which may be frozen.
    """
    flags = {module: module.training for module in model.modules()}
    if model.training != training:
        model.train(training)
    before = state_of(model)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        restore(model, before)


def state_of(model: nn.Module) -> tuple:
    devices = [torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    buffers = {name: None if b is None else b.clone() for name, b in model.named_buffers()}
    return buffers, torch.get_rng_state(), devices, random.getstate()


def restore(model: nn.Module, state: tuple) -> None:
    buffers, cpu, devices, python = state
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    torch.set_rng_state(cpu)
    for states in devices:
        torch.cuda.set_rng_state_all(states)
    random.setstate(python)


def results(model: nn.Module, args: tuple, kwargs: dict, training: bool) -> dict[str, torch.Tensor]:
    """Every output tensor; in training also every parameter's gradient, and every buffer as the call leaves it.

    The gradients are those of the loss, if scalars that can be differentiated are among the outputs, else of a random
    combination of all outputs.
    """
    state = state_of(model)
    found = {}
    with exact_float32(), torch.set_grad_enabled(training):
        leaves = output_tensors(model, args, kwargs)
        if training:
            found |= {f"gradient of {name}": d for name, d in gradients(model, leaves).items()}
    found |= {f"output {i}": x.detach() for i, x in enumerate(leaves)}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    restore(model, state)
    return found


def output_tensors(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """What a call returns; dataclasses, such as outputs of other libraries, as dictionaries."""
    output = model(*args, **kwargs)
    output = vars(output) if hasattr(output, "__dataclass_fields__") else output
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]


def gradients(model: nn.Module, leaves: list) -> dict[str, torch.Tensor]:
    """By the parameters' names, see `results`."""
    differentiable = [x for x in leaves if x.requires_grad]
    scalars = [x for x in differentiable if x.numel() == 1]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not differentiable or not parameters:
        return {}
    g, total = torch.Generator().manual_seed(0), 0
    for x in scalars or differentiable:
        total = total + (x * torch.randn(x.shape, generator=g).to(x)).sum()
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: d for name, d in zip(parameters, grads) if d is not None}


def nudged(inputs):
    """Arguments with every floating-point number changed by at most NUDGE of itself."""
    g = torch.Generator().manual_seed(1)

    def change(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            return x
        factor = (1 + NUDGE * (2 * torch.rand(x.shape, generator=g) - 1)).to(x)
        return (x.detach() * factor).requires_grad_(x.requires_grad)

    return tree_map(change, inputs)


def allowance(name: str, tolerance: float, own: dict[str, float] | None = None) -> float:
    """What a tensor may differ by where outputs may differ by `tolerance`; own: differences from nudged inputs."""
    if not name.startswith("gradient") or tolerance != TOLERANCE[torch.float32]:
        return tolerance
    sensitivity = (own or {}).get(name, 0.0)
    return max(KINKS, min(2 * sensitivity, MOST)) if math.isfinite(sensitivity) else KINKS


def compare(before: dict, after: dict, tolerance: float, own: dict | None = None) -> tuple[float, float, str]:
    """(how many times what is allowed, difference, name) of what differs most by that measure."""
    found = differences(before, after)
    return max((error / allowance(name, tolerance, own), error, name) for name, error in found.items())


def differences(before: dict, after: dict) -> dict[str, float]:
    """By name; infinite where shapes differ or what is finite, or an output that was contiguous, so that the caller may
    take a view of it, no longer is."""
    if before.keys() != after.keys():
        return {", ".join(before.keys() ^ after.keys()): float("inf")}
    sizes, alike = {}, {}
    for name, x in before.items():
        sizes[name] = _squares(x)
        alike.setdefault(_kind(name), []).append(sizes[name])
    usual = {kind: _rms(*map(sum, zip(*values))) for kind, values in alike.items()}
    found = {"": 0.0}
    for name, expected in before.items():
        got = after[name]
        torn = name.startswith("output") and expected.is_contiguous() and not got.is_contiguous()
        off = None if torn else _squares(expected, got)
        scale = max(_rms(*sizes[name]), 1e-2 * usual[_kind(name)], 1e-30)
        found[name] = float("inf") if off is None else _rms(*off) / scale
    return found


def _squares(expected: torch.Tensor, got: torch.Tensor | None = None) -> tuple[float, int] | None:
    """(sum of squares, number) of the finite elements, or of the differences from `got`; None if that is finite
    elsewhere or of another shape. In float64, a piece at a time: a large weight's gradient is not copied whole."""
    if got is not None and got.shape != expected.shape:
        return None
    tensors = [x.to_dense() if x.is_sparse else x for x in (expected, got) if x is not None]
    total, count = 0.0, 0
    for pieces in zip(*(x.reshape(-1).split(PIECE) for x in tensors)):
        x, *other = (piece.double() for piece in pieces)
        finite = x.isfinite()
        for y in other:
            if not torch.equal(finite, y.isfinite()):
                return None
            x = x - y
        total, count = total + x[finite].square().sum().item(), count + int(finite.sum())
    return total, count


def _kind(name: str) -> str:
    """What a tensor is compared with where it is next to zero: all gradients, or buffers of its name."""
    return "gradient" if name.startswith("gradient") else name.rpartition(".")[2]


def _rms(squares: float, count: int) -> float:
    return (squares / count) ** 0.5 if count else 0.0


def tolerance(model: nn.Module, outputs: dict) -> float:
    """Of the least exact dtype that the model computes in."""
    dtypes = {p.dtype for p in model.parameters()} | {x.dtype for x in outputs.values()}
    for device in {p.device.type for p in model.parameters()} or {"cpu"}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float32])
