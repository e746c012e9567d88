"""Drop-in modules: same constructors, parameters and state_dict as the torch.nn modules they replace."""

import math

import torch.nn as nn
import torch.nn.functional as F

from . import functional


class Conv2dReLU(nn.Conv2d):
    """relu(conv2d(input)). Arguments, parameters and state_dict as torch.nn.Conv2d; see functional.conv2d_relu."""

    def _conv_forward(self, input, weight, bias):
        return functional.conv2d_relu(*_padded(self, input, weight, bias))


class Conv2dReLUMaxPool2d(nn.Conv2d):
    """max_pool2d(relu(conv2d(input)), pool_size, pool_stride), see functional.conv2d_relu_max_pool2d.

    Args: as torch.nn.Conv2d, and
        pool_size: rows and columns of the pooling window.
        pool_stride: step between windows; default: pool_size.
    """

    def __init__(self, *args, pool_size=2, pool_stride=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.pool_size, self.pool_stride = pool_size, pool_stride

    def _conv_forward(self, input, weight, bias):
        arguments = _padded(self, input, weight, bias)
        return functional.conv2d_relu_max_pool2d(*arguments, pool_size=self.pool_size, pool_stride=self.pool_stride)

    def extra_repr(self):
        return f"{super().extra_repr()}, pool_size={self.pool_size}, pool_stride={self.pool_stride}"


class _ConvAct:
    def __init__(self, *args, activation="relu", negative_slope=0.01, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, input, residual=None):
        arguments = _padded(self, input, self.weight, self.bias)
        options = {"activation": self.activation, "negative_slope": self.negative_slope, "residual": residual}
        return functional.conv_act(*arguments, **options)

    def extra_repr(self):
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}"


class ConvAct1d(_ConvAct, nn.Conv1d):
    """activation(conv1d(input) + residual), see functional.conv_act.

    Args: as torch.nn.Conv1d, and
        activation, negative_slope: of functional.conv_act.
    """


class ConvAct2d(_ConvAct, nn.Conv2d):
    """activation(conv2d(input) + residual), see functional.conv_act.

    Args: as torch.nn.Conv2d, and
        activation, negative_slope: of functional.conv_act.
    """


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Arguments and state_dict as torch.nn.CrossEntropyLoss, and `z_loss` and `softcap` of functional.cross_entropy."""

    def __init__(self, *args, z_loss=0.0, softcap=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input, target):
        options = (self.weight, self.ignore_index, self.reduction, self.label_smoothing)
        return functional.cross_entropy(input, target, *options, z_loss=self.z_loss, softcap=self.softcap)


class LinearCrossEntropyLoss(nn.Module):
    """cross_entropy(linear(input), target) without storing the logits; see functional.linear_cross_entropy.

    Arguments and state_dict as torch.nn.LinearCrossEntropyLoss (torch 2.13) without `options`, and
        z_loss, softcap: of functional.linear_cross_entropy.

    Raises:
        RuntimeError: `weight` is not (num_classes,), or `label_smoothing` is not in [0, 1].
    """

    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None, reduction="mean",
        weight=None, ignore_index=None, label_smoothing=0.0, z_loss=0.0, softcap=None,
    ):  # fmt: skip
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.z_loss, self.softcap = z_loss, softcap
        # Flat, as in torch: nn.Linear has no further dimensions.
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input, target):
        classes = (self.num_classes, *self.out_features)
        bias = None if self.linear.bias is None else self.linear.bias.reshape(classes)
        return functional.linear_cross_entropy(
            input, self.linear.weight.reshape(*classes, -1), target, linear_bias=bias, weight=self.weight,
            reduction=self.reduction, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip

    def extra_repr(self):
        names = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _padded(conv: nn.Conv1d | nn.Conv2d, input, weight, bias) -> tuple:
    """The positional arguments of functional.conv2d_relu; padding other than with zeros is done here."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return input, weight, bias, conv.stride, padding, conv.dilation, conv.groups


class EmbeddingDot(nn.Module):
    """Scores of users and items: dot product of their embeddings, plus biases; see functional.embedding_dot.

    Args:
        num_users, num_items: rows of the tables `user` and `item`, two nn.Embedding.
        embedding_dim: D, their width.
        bias: add `user_bias` and `item_bias`, nn.Embedding with D = 1.
        padding_idx: row of both tables (or a pair: one for each) that starts as zeros and gets no gradient.
        sparse: gradients are coalesced sparse tensors.

    The attribute `optimizer`, None at first, can be set to one of pyfused.optim made with this module's parameters:
    backward then takes its steps and no gradient is stored.
    """

    def __init__(self, num_users, num_items, embedding_dim, *, bias=False, padding_idx=None, sparse=False):
        super().__init__()
        self.optimizer = None
        padding = padding_idx if isinstance(padding_idx, (tuple, list)) else (padding_idx, padding_idx)
        for name, rows, padding_row in (("user", num_users, padding[0]), ("item", num_items, padding[1])):
            setattr(self, name, nn.Embedding(rows, embedding_dim, padding_row, sparse=sparse))
            if bias:
                setattr(self, f"{name}_bias", nn.Embedding(rows, 1, padding_row, sparse=sparse))

    def forward(self, user, item):
        """user [B] and item [B] or [B, K] -> scores of item's shape."""
        biases = (self.user_bias.weight, self.item_bias.weight) if hasattr(self, "user_bias") else (None, None)
        tables = (self.user.weight, self.item.weight, *biases)
        padding = (self.user.padding_idx, self.item.padding_idx)
        options = {"padding_idx": padding, "sparse": self.user.sparse, "optimizer": self.optimizer}
        return functional.embedding_dot(user, item, *tables, **options)
