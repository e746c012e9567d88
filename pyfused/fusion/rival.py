"""Whether a fused call is faster than what Inductor makes of the same calls: no compiled layer is to get slower.

Convolutions are timed while compiling, and the times kept where fuse() keeps its own. To let Inductor compile every
candidate would take minutes, so it is taken at its best: as eager PyTorch in channels_last, which is how it lays out
convolutions. Without gradients what stands behind the convolution, but for a pool, is free: it joins the convolution or
passes that are made anyway. With gradients a ReLU in place stands for any activation, and as fast as that is fast
enough: Inductor trains convolution + bias + ReLU 1.1 to 8 times slower than eager PyTorch (bench/results/cpu.csv),
because it sums up the bias gradient by itself.

Losses and embedding products have limits. On two Xeon cores the fixed costs, 30 us and more, make cross_entropy lose
up to 4096 x 64 and 256 x 1000 (0.9 of Inductor's speed; 512 x 1000: 1.1), linear heads up to 128 x 1000 (0.9; 512 x
1000: 1.0), and products of 256 pairs of 16 (0.8; 1024 of 64: 1.6). Forward alone, and into sparse gradients, products
are Inductor's, which is 1.3 times faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map

from . import measure
from .candidate import attribute
from .graph import Attr, Match

LEAST_LOGITS, LEAST_GATHERED = 2_000_000, 20_000  # bytes; numbers of each table


def pays(match: Match, root: fx.GraphModule) -> bool:
    """Whether to fuse this match in a graph of TorchDynamo's before Inductor gets it."""

    def given(x):
        if isinstance(x, Attr):
            return attribute(root, x)
        return fx.map_arg(x, lambda node: node.meta["example_value"])

    first = given(match.nodes[0])
    if match.pattern == "linear + cross_entropy":
        return _numbers(first) * first.itemsize >= LEAST_LOGITS
    args, kwargs = tuple(map(given, match.args)), {name: given(x) for name, x in match.kwargs.items()}
    if match.pattern == "cross_entropy":
        return _numbers(args[0]) * args[0].itemsize >= LEAST_LOGITS
    if match.pattern.startswith("embedding"):
        _, item, weight, _ = args
        trained = torch.is_grad_enabled() and not kwargs["sparse"]
        return trained and _numbers(item) * weight.shape[1] >= LEAST_GATHERED
    # Under autocast the dtype is not the input's.
    return is_faster(match.pattern, match.function, args, kwargs, first.dtype, torch.is_grad_enabled())


def _numbers(x: torch.Tensor) -> int:
    return _hint(x.numel())


def is_faster(pattern: str, function: Callable, args: tuple, kwargs: dict, dtype: torch.dtype, training: bool) -> bool:
    """Whether function(*args, **kwargs) beats Inductor. args: a convolution's; tensors may be fake."""
    with unset_fake_temporarily():
        args, kwargs = tree_map(lambda x: _real(x, dtype), (args, kwargs))
        key = f"compiled {pattern}: {measure.describe(*args, *kwargs.values())}"
        theirs = [_channels_last(x) for x in args]
        pool = [kwargs[name] for name in ("pool_size", "pool_stride") if name in kwargs]
        needed, needed_by_rival = (
            [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]
            for values in ((*args, *kwargs.values()), theirs)
        )
        training = training and bool(needed_by_rival)

        def rival():
            z = (F.conv1d if theirs[1].dim() == 3 else F.conv2d)(*theirs)
            z = z.relu_() if training and kwargs.get("activation") != "none" else z
            return F.max_pool2d(z, *pool) if pool else z

        times = measure.times_of(key, rival, lambda: function(*args, **kwargs), needed, training, needed_by_rival)
    return times.speedup(training) >= (1 / measure.MARGIN if training else measure.MARGIN)


def _hint(size) -> int:
    """The size at hand, of one that may change; Inductor is not told that it was looked at."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else 64


def _real(x, dtype: torch.dtype):
    """Ones in this dtype, like a tensor that may be fake."""
    if not isinstance(x, torch.Tensor):
        return _hint(x)
    shape, stride = [[_hint(n) for n in sizes] for sizes in (x.shape, x.stride())]
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
    ones = torch.ones(max(elements, 0), dtype=dtype, device=x.device)
    return ones.as_strided(shape, stride).requires_grad_(x.requires_grad)


def _channels_last(x):
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        return x
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
