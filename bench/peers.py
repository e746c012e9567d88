"""Other people's GPU kernels for the same ops. Whatever is not installed is announced and left out by the harness."""

from __future__ import annotations

from collections.abc import Callable


def _liger(x, target):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x.clone(), target)  # it writes the gradient over its input


def _flash_attention(x, target):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(x, target)[0].mean()


def _quack(x, target):
    from quack.cross_entropy import cross_entropy

    return cross_entropy(x, target, reduction="mean")


def _apex(x, target):
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    return SoftmaxCrossEntropyLoss.apply(x, target).mean()


def _liger_linear(x, weight, target):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def _quack_linear(x, weight, target):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, target)


def _cut(x, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)


PEERS: dict[str, dict[str, Callable]] = {
    "cross_entropy": {"liger on a copy": _liger, "flash-attn": _flash_attention, "quack": _quack, "apex": _apex},
    "linear_cross_entropy": {"liger": _liger_linear, "quack": _quack_linear, "cut-cross-entropy": _cut},
}
