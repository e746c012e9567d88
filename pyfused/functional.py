"""The fused functions, named and ordered as in torch.nn.functional."""

from .ops.conv2d_relu import conv2d_relu
from .ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from .ops.conv_act import conv_act
from .ops.cross_entropy import cross_entropy
from .ops.embedding_dot import embedding_dot
from .ops.in_batch_cross_entropy import in_batch_cross_entropy
from .ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv_act",
    "cross_entropy",
    "embedding_dot",
    "in_batch_cross_entropy",
    "linear_cross_entropy",
]
