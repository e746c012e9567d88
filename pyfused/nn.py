"""Drop-in modules: same constructors, parameters and state_dict as the torch.nn modules they replace."""

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


def _padded(conv: nn.Conv2d, input, weight, bias) -> tuple:
    """The positional arguments of functional.conv2d_relu; padding other than with zeros is done here."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return input, weight, bias, conv.stride, padding, conv.dilation, conv.groups
