"""The one table of cases: op x options x shape, each with the reason why it is there.

A case makes the keyword arguments of a public function in pyfused.functional, floating tensors in float64. The tests
round them to each dtype and run every backend, every instruction set, forward and backward, on them; `bench/` has its
own shapes. To add a case, append to an op's list; to add an op, append a list to CASES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyfused.ops import conv_act

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOT_FLOAT64 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    op: str  # name of the function in pyfused.functional
    name: str  # unique within the op
    why: str  # the branch or the bug that this case reaches
    make: Callable[[torch.Generator], dict]  # -> keyword arguments; floating tensors in float64
    grad: tuple[str, ...]  # arguments to differentiate
    dtypes: tuple[torch.dtype, ...] = DTYPES
    slack: float = 0.0  # float32 error allowed beyond eager's, relative to the largest value: an op's documented bound

    def slack_for(self, dtype: torch.dtype) -> float:
        return self.slack if dtype == torch.float32 else 0.0

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """The arguments rounded to `dtype`, strides kept, `grad` ones requiring gradients."""

        def prepare(name, value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            rounded = torch.empty_like(value, dtype=dtype).copy_(value)  # empty_like keeps dense strides
            if value.stride() != rounded.stride():  # a slice or an expanded tensor: same view of a rounded storage
                storage = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=torch.float64)
                storage.untyped_storage().copy_(value.untyped_storage())
                rounded = storage.to(dtype).as_strided(value.shape, value.stride(), value.storage_offset())
            return rounded.requires_grad_(name in self.grad)

        made = self.make(torch.Generator().manual_seed(seed))
        return {name: prepare(name, value) for name, value in made.items()}


def randn(g: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


def randint(g: torch.Generator, high: int, *shape: int, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(high, shape, generator=g).to(dtype)


# --- conv2d_relu -----------------------------------------------------------------------------------------------------
CHANNELS_LAST = torch.channels_last
# Winograd F(4x4, 3x3) in float32 loses about 1e-5 of the largest value, ten times what a direct sum loses; see
# csrc/cpu/kernels/conv2d_winograd.cpp. pyfused.set_conv_algorithm("direct") does without it.
WINOGRAD = 3e-5


def conv_case(
    name, why, shape, c_out, kernel, *, op="conv2d_relu", bias=True, layout=None, weight_layout=None, exact=False,
    dtypes=DTYPES, slack=0.0, view=None, residual=None, **options,
) -> Case:  # fmt: skip
    """`exact`: multiples of 1/8, so that no dtype rounds the output and a maximum has ties. `view`: of the input.

    `residual`: the memory format of one. bias: "gaps" for one whose numbers are not adjacent.
    """

    def make(g):
        def values(*shape, scale=1.0):
            return randint(g, 9, *shape).double() / 4 - 1 if exact else randn(g, *shape, scale=scale)

        weight_shape = (c_out, shape[-1 - len(kernel)] // options.get("groups", 1), *kernel)
        weight = values(*weight_shape, scale=(c_out / max(1, torch.Size(weight_shape).numel())) ** 0.5)
        arguments = {"input": values(*shape), "weight": weight.round() if exact else weight, **options}
        arguments["input"] = arguments["input"].contiguous(memory_format=layout or torch.contiguous_format)
        if weight_layout:
            arguments["weight"] = arguments["weight"].contiguous(memory_format=weight_layout)
        if view:
            arguments["input"] = view(arguments["input"])
        if bias:
            arguments["bias"] = values(2 * c_out)[::2] if bias == "gaps" else values(c_out)
        if residual:
            arguments["residual"] = values(*conv_act.reference(**arguments).shape).contiguous(memory_format=residual)
        return arguments

    grad = ("input", "weight", *["bias"] * bool(bias), *["residual"] * bool(residual))
    return Case(op, name, why, make, grad, dtypes, slack)


def frozen_input(case: Case) -> Case:
    """The same for a first layer: the input needs no gradient, which is what the direct weight gradient takes."""
    grad = tuple(name for name in case.grad if name != "input")
    return Case(case.op, f"{case.name}-frozen-input", case.why, case.make, grad, case.dtypes, case.slack)


def first_layers(op="conv2d_relu", dtypes=DTYPES, exact=False, **pool) -> list[Case]:
    def case(name, why, *args, **options):
        return frozen_input(conv_case(name, why, *args, op=op, dtypes=dtypes, exact=exact, **pool, **options))

    return [
        case("gray", "one channel, two whole vectors of output channels", (3, 1, 12, 13), 32, (3, 3)),
        case("gray-cl", "one channel in channels_last: strides that both layouts share", (2, 1, 12, 14), 40, (3, 3),
             layout=CHANNELS_LAST),
        case("rgb-cl", "three interleaved channels, padding, a tail of output channels", (2, 3, 15, 14), 37, (3, 3),
             layout=CHANNELS_LAST, padding=1),
        case("stem", "7x7 with stride 2, an incomplete vector of output channels", (2, 3, 23, 24), 9, (7, 7), stride=2,
             padding=3),
        case("no-bias", "strides that differ, four channels", (1, 4, 17, 16), 70, (5, 4), bias=False, stride=(2, 1)),
        case("flat-kernels", "kernel of one row, padding that differs", (1, 2, 8, 9), 3, (1, 6), padding=(0, 2)),
        case("narrow", "kernel of one column, padding wider than the kernel", (1, 2, 8, 9), 16, (2, 1), padding=(2, 3)),
        case("bands", "an image of several bands of rows", (1, 3, 41, 130), 33, (3, 3)),
        case("columns", "register tiles of every width but one, of two vectors and of one", (1, 3, 7, 25), 33, (3, 3)),
        case("columns-5x5", "that one; stride 2", (1, 3, 9, 37), 33, (5, 5), stride=2, layout=CHANNELS_LAST),
        case("weight-cl", "channels_last by the weight alone", (2, 3, 9, 9), 20, (3, 3), weight_layout=CHANNELS_LAST),
        case("sliced", "an input with gaps", (4, 3, 10, 12), 8, (2, 2), view=lambda x: x[::2, :, 1:, ::2]),
        case("one-window", "a map of 2x2", (5, 1, 4, 4), 6, (3, 3)),
        case("bias-gaps", "a bias with gaps", (2, 2, 7, 8), 9, (3, 3), bias="gaps"),
    ]  # fmt: skip


CONV2D_RELU: list[Case] = [
    conv_case("plain", "stride, padding, bias", (2, 3, 9, 11), 5, (3, 3), stride=2, padding=1),
    *first_layers(),
    conv_case("wide-kernel", "wider than the direct kernels: PyTorch's convolution", (2, 2, 12, 12), 5, (3, 8)),
    conv_case("channels", "more channels than the direct kernels take", (2, 9, 8, 9), 21, (3, 3), stride=2, padding=1),
    conv_case("bias-gaps", "a bias with gaps", (2, 9, 8, 9), 21, (2, 2), bias="gaps"),
    conv_case("channels-cl", "the same in channels_last", (2, 9, 8, 9), 21, (2, 2), layout=CHANNELS_LAST),
    conv_case("rows", "bias gradient over several parts' rows", (3, 6, 20, 21), 7, (1, 1), layout=CHANNELS_LAST),
    conv_case("grouped", "groups", (2, 6, 7, 8), 9, (3, 3), groups=3, padding=1),
    conv_case("depthwise", "as many groups as channels", (2, 5, 7, 8), 10, (3, 3), groups=5, layout=CHANNELS_LAST),
    conv_case("depthwise-wide", "depthwise in channels_last, its own kernel, a tail of channels", (2, 35, 9, 12), 35,
              (3, 3), groups=35, padding=1, layout=CHANNELS_LAST),
    conv_case("depthwise-strided", "the same with stride 2", (2, 18, 11, 9), 18, (5, 5), groups=18, padding=2, stride=2,
              layout=CHANNELS_LAST, bias=False),
    conv_case("deep", "several blocks of input channels", (2, 70, 5, 5), 20, (1, 1), layout=CHANNELS_LAST),
    conv_case("broad", "several blocks of output channels", (1, 20, 5, 5), 140, (1, 1), layout=CHANNELS_LAST),
    conv_case("large-map", "pixels enough for several parts of a weight gradient", (2, 2, 25, 31), 4, (1, 1)),
    conv_case("strided-dilated", "strides that share a divisor with the dilation, or not", (1, 3, 13, 14), 4, (3, 3),
              stride=(2, 3), dilation=2, padding=(3, 1)),
    conv_case("dilated", "dilation that differs", (1, 3, 12, 13), 4, (3, 3), dilation=(2, 3), padding=2),
    conv_case("same", "padding='same' of an even kernel pads one side more", (2, 3, 8, 9), 4, (4, 2), padding="same"),
    conv_case("same-dilated", "padding='same' under dilation", (2, 3, 8, 9), 4, (3, 3), padding="same", dilation=2),
    conv_case("valid", "padding='valid'", (2, 3, 8, 9), 4, (3, 3), padding="valid"),
    conv_case("unbatched", "(C, H, W)", (3, 8, 9), 4, (3, 3), padding=(1,)),
    conv_case("empty", "no images", (0, 3, 8, 9), 4, (3, 3)),
    conv_case("empty-cl", "no images, more channels", (0, 20, 8, 9), 24, (3, 3), layout=CHANNELS_LAST),
    conv_case("one-pixel", "1x1 maps: every layout at once", (3, 5, 1, 1), 6, (3, 3), padding=1),
    conv_case("winograd", "Winograd on NCHW: converted and back", (6, 16, 9, 10), 16, (3, 3), slack=WINOGRAD),
    conv_case("winograd-cl", "Winograd, tails of channels, padding", (2, 19, 11, 14), 37, (3, 3), layout=CHANNELS_LAST,
              padding=1, slack=WINOGRAD),
    conv_case("winograd-wide", "Winograd, padding 2, several blocks", (2, 32, 12, 9), 80, (3, 3), layout=CHANNELS_LAST,
              padding=2, slack=WINOGRAD, bias=False),
    conv_case("tiny", "3x3 maps: one output, for which a Winograd tile does not pay", (300, 32, 3, 3), 32, (3, 3),
              layout=CHANNELS_LAST),
    conv_case("winograd-small", "Winograd on maps of one tile", (40, 32, 3, 3), 32, (3, 3), padding=1,
              layout=CHANNELS_LAST, slack=WINOGRAD),
    conv_case("1x1", "a matrix product, tails of channels and pixels", (4, 19, 9, 11), 37, (1, 1)),
    conv_case("1x1-cl", "the same in channels_last", (4, 19, 9, 11), 37, (1, 1), layout=CHANNELS_LAST),
    conv_case("1x1-weight-cl", "channels_last by the weight alone", (5, 20, 8, 8), 24, (1, 1),
              weight_layout=CHANNELS_LAST, bias=False),
]  # fmt: skip

# --- conv_act --------------------------------------------------------------------------------------------------------
PLAIN = torch.contiguous_format


def act_case(name, why, *args, **options) -> Case:
    return conv_case(name, why, *args, op="conv_act", **options)


CONV_ACT: list[Case] = [
    *[
        act_case(name, "the activation: whole vectors and a tail", (2, 9, 8, 9), 21, (3, 3), activation=name)
        for name in conv_act.ACTIVATIONS
    ],
    act_case("cl", "channels_last, a tail of channels", (2, 9, 8, 9), 21, (2, 2), layout=CHANNELS_LAST,
             activation="gelu"),
    act_case("rows", "a convolution of rows", (2, 6, 50), 7, (3,), activation="gelu"),
    *[
        act_case(f"{name}-exact", f"the edges of {name} themselves", (2, 4, 9, 9), 5, (2, 2), exact=True,
                 activation=name)
        for name in ("relu6", "hardswish", "leaky_relu")
    ],
    act_case("negative-slope", "a slope below 0: the output does not tell z's sign", (2, 4, 9, 9), 5, (2, 2),
             activation="leaky_relu", negative_slope=-0.25),
    act_case("steep", "z far out, where exponentials end and derivatives are 0 or 1", (2, 30, 8, 8), 5, (3, 3),
             activation="gelu", view=lambda x: x * 8),
    act_case("steep-tanh", "the same for the tanh form", (2, 30, 8, 8), 5, (3, 3), activation="gelu_tanh",
             view=lambda x: x * 8),
    act_case("steep-silu", "the same for SiLU", (2, 30, 8, 8), 5, (3, 3), activation="silu", view=lambda x: x * 40),
    act_case("residual-relu", "ResNet's block: act' from the output", (2, 6, 9, 9), 6, (3, 3), padding=1,
             residual=PLAIN),
    act_case("residual-cl", "a residual in channels_last", (2, 6, 9, 9), 20, (3, 3), layout=CHANNELS_LAST,
             residual=CHANNELS_LAST, activation="silu"),
    act_case("residual-mixed", "a residual in the other layout", (2, 6, 9, 9), 20, (3, 3), layout=CHANNELS_LAST,
             residual=PLAIN, activation="gelu"),
    act_case("residual-none", "an addition alone, no bias", (2, 6, 9, 9), 6, (3, 3), residual=PLAIN, bias=False,
             activation="none"),
    act_case("residual-rows", "a residual of rows", (2, 6, 30), 5, (3,), residual=PLAIN, activation="gelu_tanh"),
    act_case("residual-unbatched", "a residual of (C, H, W)", (6, 9, 9), 5, (3, 3), residual=PLAIN),
    act_case("rows-unbatched", "(C, L)", (3, 40), 4, (5,), stride=(2,), padding=(1,)),
    act_case("rows-same", "padding='same' of an even kernel, dilated", (2, 3, 40), 4, (4,), padding="same", dilation=3,
             activation="silu"),
    act_case("rows-grouped", "wav2vec2's positional convolution", (2, 8, 40), 8, (16,), padding=8, groups=4,
             activation="gelu"),
    act_case("rows-strided", "wav2vec2's first layer: one channel, a wide kernel", (2, 1, 200), 20, (10,), stride=5,
             bias=False, activation="gelu"),
    act_case("rows-relu", "ReLU of rows: conv2d_relu's direct kernels on maps of height 1", (3, 2, 60), 40, (3,),
             padding=1),
    act_case("rows-gaps", "rows with gaps", (4, 5, 60), 9, (3,), view=lambda x: x[::2, :, ::2], activation="gelu"),
    act_case("blocks", "several blocks and threads, rows over several parts", (3, 6, 50, 51), 17, (1, 1),
             layout=CHANNELS_LAST, activation="hardswish", dtypes=NOT_FLOAT64),
    act_case("empty", "no images", (0, 3, 8, 9), 4, (3, 3), activation="gelu"),
    act_case("winograd", "Winograd without its ReLU, NCHW", (6, 16, 9, 10), 16, (3, 3), slack=WINOGRAD,
             activation="silu"),
    act_case("winograd-cl", "Winograd, channels_last, a residual", (2, 19, 11, 14), 37, (3, 3), layout=CHANNELS_LAST,
             padding=1, slack=WINOGRAD, residual=CHANNELS_LAST),
]  # fmt: skip

# --- conv2d_relu_max_pool2d ------------------------------------------------------------------------------------------
# Random values in float32 and float64 only: in 16 bits two candidates of a window round to the same, and which is
# "the" maximum is then chance. Exact values, which no dtype rounds, for the others.
POOL = "conv2d_relu_max_pool2d"
WIDE = (torch.float32, torch.float64)


def pool_case(*args, dtypes=WIDE, **options) -> Case:
    return conv_case(*args, op=POOL, dtypes=dtypes, **options)


CONV2D_RELU_MAX_POOL2D: list[Case] = [
    pool_case("plain", "overlapping windows", (2, 3, 9, 11), 5, (3, 3), padding=1, pool_size=3, pool_stride=2),
    *first_layers(POOL, WIDE),
    *[
        Case(c.op, f"{c.name}-exact", f"{c.why}; ties, all dtypes", c.make, c.grad)
        for c in first_layers(POOL, exact=True)[:4]
    ],
    pool_case("exact", "ties through the separate pooling pass", (2, 6, 9, 11), 5, (3, 3), dtypes=DTYPES, exact=True),
    pool_case("exact-cl", "the same in channels_last", (2, 6, 9, 11), 21, (3, 3), dtypes=DTYPES, exact=True,
              layout=CHANNELS_LAST),
    pool_case("gaps", "windows further apart than wide", (2, 3, 14, 15), 5, (3, 3), pool_size=2, pool_stride=3),
    pool_case("gaps-cl", "the same in channels_last", (2, 3, 14, 15), 20, (3, 3), pool_size=2, pool_stride=3,
              layout=CHANNELS_LAST),
    pool_case("overlap-cl", "overlapping windows in channels_last", (2, 6, 14, 15), 20, (3, 3), pool_size=(2, 3),
              pool_stride=(1, 2), layout=CHANNELS_LAST),
    pool_case("wide", "more pooled columns than one strip", (1, 5, 4, 560), 2, (2, 3), pool_size=2),
    pool_case("grouped", "groups, then the separate pooling pass", (2, 6, 9, 10), 9, (3, 3), groups=3),
    pool_case("single", "a window of one element", (1, 3, 6, 6), 4, (3, 3), pool_size=1),
    pool_case("largest", "254 elements, the last place that a byte can name", (1, 2, 4, 130), 3, (2, 3), padding=(0, 1),
              pool_size=(2, 127), pool_stride=(1, 3)),
    pool_case("beyond", "256 elements: eager PyTorch", (1, 2, 17, 17), 3, (2, 2), pool_size=16),
    pool_case("unbatched", "(C, H, W)", (3, 8, 9), 4, (3, 3)),
    pool_case("empty", "no images", (0, 3, 8, 9), 4, (3, 3)),
    pool_case("winograd", "Winograd on NCHW: converted and back", (5, 16, 9, 11), 16, (3, 3), slack=WINOGRAD),
    pool_case("winograd-cl", "Winograd, tails of channels, padding", (2, 19, 11, 14), 37, (3, 3), layout=CHANNELS_LAST,
              padding=1, slack=WINOGRAD),
    pool_case("1x1-cl", "1x1, then the separate pooling pass", (4, 19, 9, 11), 37, (1, 1), layout=CHANNELS_LAST),
    pool_case("depthwise-cl", "depthwise, then the separate pooling pass", (2, 24, 11, 12), 24, (3, 3), groups=24,
              layout=CHANNELS_LAST),
    pool_case("winograd-3x3", "Winograd, then the separate pooling pass", (2, 17, 11, 14), 20, (3, 3), padding=1,
              layout=CHANNELS_LAST, slack=WINOGRAD, pool_size=3, pool_stride=2),
]  # fmt: skip


# --- cross_entropy ---------------------------------------------------------------------------------------------------
def logits(g, *shape, layout="contiguous", scale=2.0):
    """Random logits; layouts: contiguous, channels_last, transposed (class stride not 1), sliced (row gaps)."""
    if layout == "transposed":
        return randn(g, shape[1], shape[0], scale=scale).t()
    if layout == "sliced":
        return randn(g, shape[0], shape[1] + 3, scale=scale)[:, 2:-1]
    x = randn(g, *shape, scale=scale)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def labels(g, classes, *shape, ignored=None, rows=1):
    t = randint(g, classes, *shape)
    if ignored is not None and t.numel() > 1:
        t.view(-1)[rows] = ignored
    return t


def cross_entropy_case(
    name, why, shape=(6, 5), layout="contiguous", ignored=None, ignored_rows=1, probabilities=False, weight=False,
    edit=None, margin=None, dtypes=DTYPES, **options,
) -> Case:  # fmt: skip
    """`margin`: of the label's logit over the largest other one, about."""

    def make(g):
        x = logits(g, *shape, layout=layout)
        if edit is not None:
            edit(x)
        classes, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
        soft = randn(g, *shape).softmax(min(1, len(shape) - 1)) if probabilities else None
        target = labels(g, classes, *rows, ignored=ignored, rows=ignored_rows) if soft is None else soft
        if margin is not None:
            x.scatter_(1, target.unsqueeze(1), margin + x.max().item())
        made = {"input": x, "target": target, **options}
        return {**made, "weight": randn(g, classes).abs() + 0.1} if weight else made

    return Case("cross_entropy", name, why, make, ("input",), dtypes)


def block(value, rows, classes):
    def edit(x):
        x[rows, classes] = value

    return edit


CROSS_ENTROPY: list[Case] = [
    *[
        cross_entropy_case(
            f"classes_{c}", "rows and classes around 4, 8 and 16 lanes; gathered below 40 classes", (19, c)
        )
        for c in (1, 2, 3, 7, 8, 9, 15, 16, 17, 19, 20, 31, 33, 39)
    ],
    *[
        cross_entropy_case(f"classes_{c}", "vectors along the classes: with and without an overlapping tail", (5, c))
        for c in (40, 47, 48, 49, 63, 64, 65, 99, 100, 199, 200, 1000, 1025)
    ],
    cross_entropy_case(
        "many_rows", "several chunks, so several threads; a group that is not full at the end", (9001, 10)
    ),
    cross_entropy_case("long_rows", "groups of few rows", (7, 33000), reduction="none"),
    cross_entropy_case("no_batch", "(C,) logits, label of no dimension", (5,)),
    cross_entropy_case("no_batch_none", "and a loss per row", (50,), reduction="none"),
    cross_entropy_case("empty_mean", "no rows: NaN", (0, 5)),
    cross_entropy_case("empty_sum", "no rows: 0", (0, 5), reduction="sum"),
    cross_entropy_case("image", "(N, C, H, W): lanes along the positions, and groups across two images", (3, 21, 5, 7)),
    cross_entropy_case(
        "image_aligned", "whole groups within one image: no gathering element by element", (2, 5, 8, 16)
    ),
    cross_entropy_case("image_many_classes", "class stride not 1, many classes", (2, 100, 3, 3), reduction="none"),
    cross_entropy_case(
        "image_many_classes_weight", "and class weights, smoothed", (2, 100, 3, 3), weight=True, label_smoothing=0.1
    ),
    cross_entropy_case("image_many_classes_soft", "and soft targets", (2, 100, 3, 3), probabilities=True, weight=True),
    cross_entropy_case("sequence", "(N, C, d1)", (2, 11, 9), reduction="sum"),
    cross_entropy_case("sequence_15", "a class less than two times what a GPU's thread loads at once", (2, 15, 9)),
    cross_entropy_case("volume", "(N, C, d1, d2, d3)", (2, 3, 2, 3, 4), ignored=-100),
    cross_entropy_case("channels_last", "classes innermost, few", (2, 21, 4, 5), "channels_last"),
    cross_entropy_case("channels_last_many", "classes innermost, many", (2, 70, 4, 5), "channels_last"),
    cross_entropy_case(
        "transposed",
        "rows innermost: the wrong stride here gave silently wrong losses elsewhere",
        (37, 50),
        "transposed",
    ),
    cross_entropy_case("sliced", "gaps between the rows", (9, 57), "sliced", reduction="none"),
    cross_entropy_case("sliced_few", "gaps between the rows, gathered", (9, 10), "sliced"),
    cross_entropy_case("ignored", "an ignored row; the mean must not count it", ignored=-100),
    cross_entropy_case("ignored_none", "loss 0 of an ignored row", (6, 210), ignored=-100, reduction="none"),
    cross_entropy_case(
        "ignored_first",
        "whose upstream gradient scaled every row elsewhere",
        (6, 50),
        ignored=-100,
        ignored_rows=0,
        reduction="none",
    ),
    *[
        cross_entropy_case(
            f"all_ignored_{name}",
            f"no row counts: {why}",
            shape,
            ignored=-100,
            ignored_rows=slice(None),
            weight=True,
            **options,
        )
        for name, why, shape, options in (
            ("tile", "mean NaN, gradients 0", (6, 5), {}),
            ("rows", "mean NaN, gradients 0", (6, 210), {}),
            ("image", "mean NaN, gradients 0", (2, 5, 4), {"label_smoothing": 0.1}),
            ("sum", "0", (6, 50), {"reduction": "sum"}),
        )
    ],
    *[
        cross_entropy_case(
            f"confident_{path}",
            "1 - p is lost in 16 bits: the label's gradient must not pass through them; float64's truth loses it",
            shape,
            margin=8.0,
            reduction="none",
            dtypes=NOT_FLOAT64,
        )
        for path, shape in (("tile", (19, 11)), ("rows", (7, 49)), ("long", (7, 209)), ("image", (2, 5, 4)))
    ],
    cross_entropy_case("ignore_index_0", "a valid class as ignore_index", ignored=0, ignore_index=0),
    cross_entropy_case("ignore_index_large", "ignore_index above the classes", (6, 50), ignored=255, ignore_index=255),
    cross_entropy_case("weight", "class weights in the mean's denominator", weight=True, ignored=-100),
    cross_entropy_case(
        "weight_rows", "class weights, vectors along the classes", (6, 50), weight=True, reduction="sum"
    ),
    *[
        cross_entropy_case(
            f"smoothing_{name}", f"label smoothing, {why}", shape, label_smoothing=0.1, ignored=-100, **options
        )
        for shape, path in (((19, 11), "tile"), ((7, 49), "rows"), ((5, 209), "long"))
        for name, why, options in (
            (f"{path}", "mean", {}),
            (f"{path}_weight", "class weights", {"weight": True}),
            (f"{path}_none", "per row", {"weight": True, "reduction": "none"}),
        )
    ],
    cross_entropy_case("smoothing_1", "nothing left on the label", label_smoothing=1.0),
    *[
        cross_entropy_case(f"probabilities_{name}", why, shape, probabilities=True, **options)
        for name, why, shape, options in (
            ("tile", "soft targets, gathered", (19, 11), {}),
            ("rows", "soft targets along the classes", (7, 109), {}),
            ("weight", "and class weights: the mean divides by the rows", (7, 109), {"weight": True}),
            ("smoothing", "and smoothing", (19, 11), {"weight": True, "label_smoothing": 0.2}),
            ("image", "soft targets in (N, C, H, W)", (2, 5, 3, 7), {"reduction": "none"}),
            ("no_batch", "soft target (C,)", (5,), {}),
        )
    ],
    cross_entropy_case(
        "probabilities_layout", "logits strided, soft targets contiguous", (7, 49), "transposed", probabilities=True
    ),
    *[
        cross_entropy_case(f"{name}_{path}", why, shape, ignored=-100, **options)
        for shape, path in (((19, 11), "tile"), ((7, 49), "rows"), ((5, 209), "long"))
        for name, why, options in (
            ("z_loss", "penalty on lse", {"z_loss": 0.01}),
            ("z_loss_weight", "the penalty takes the label's class weight", {"z_loss": 0.1, "weight": True}),
            ("softcap", "padding lanes must not become -softcap", {"softcap": 3.0}),
            ("lse", "log-sum-exp of every row, differentiable", {"return_lse": True}),
            (
                "all",
                "everything at once",
                dict(z_loss=0.1, softcap=2.0, return_lse=True, label_smoothing=0.1, weight=True),
            ),
        )
    ],
    *[
        cross_entropy_case(f"masked_{name}_{path}", why, (9, c), edit=block(value, rows, classes), reduction="none")
        for c, path in ((17, "tile"), (210, "rows"))
        for name, why, value, rows, classes in (
            ("first", "-inf in the first 16 classes of a row: NaN elsewhere", -torch.inf, 0, slice(0, 16)),
            ("last", "-inf in the last classes", -torch.inf, 0, slice(c - 9, None)),
            ("row", "nothing but -inf: NaN", -torch.inf, 3, slice(None)),
            ("inf", "+inf: NaN", torch.inf, 3, 5),
            ("nan", "NaN stays in its row", torch.nan, 3, 5),
            ("huge", "logits near the largest float16", 6e4, 2, slice(0, 3)),
            ("low", "logits far below 0", -6e4, 2, slice(None)),
        )
    ],
    *[
        cross_entropy_case(
            f"masked_{name}_long",
            f"-inf throughout {why} of a row",
            (1, 4601),
            edit=block(-torch.inf, 0, classes),
            reduction="none",
            label_smoothing=smoothing,
        )
        for name, why, classes, smoothing in (
            ("first", "the first block of 4096 classes", slice(0, 4200), 0.0),
            ("last", "the last block", slice(4000, None), 0.0),
            ("first_smooth", "the first block, smoothed: infinite", slice(0, 4200), 0.1),
        )
    ],
]


# --- linear_cross_entropy --------------------------------------------------------------------------------------------
def linear_cross_entropy_case(
    name, why, rows=9, dim=8, classes=50, bias=False, weight=False, probabilities=False, ignored=None, ignored_rows=1,
    dtypes=DTYPES, **options,
) -> Case:  # fmt: skip
    def make(g):
        batch = () if rows is None else (rows,)
        made = {"input": randn(g, *batch, dim), "linear_weight": randn(g, classes, dim, scale=0.5)}
        made["target"] = (
            randn(g, *batch, classes).softmax(-1)
            if probabilities
            else labels(g, classes, *batch, ignored=ignored, rows=ignored_rows)
        )
        made |= {"linear_bias": randn(g, classes)} if bias else {}
        made |= {"weight": randn(g, classes).abs() + 0.1} if weight else {}
        return {**made, **options}

    grad = ("input", "linear_weight", *(["linear_bias"] if bias else []))
    return Case("linear_cross_entropy", name, why, make, grad, dtypes)


LINEAR_CROSS_ENTROPY: list[Case] = [
    linear_cross_entropy_case("mean", "gradients made in forward"),
    linear_cross_entropy_case("sum", "and not divided", reduction="sum", bias=True),
    linear_cross_entropy_case(
        "none", "logits computed again in backward, an upstream gradient per row", reduction="none", bias=True
    ),
    linear_cross_entropy_case(
        "ignored_first",
        "whose upstream gradient scaled every row elsewhere",
        ignored=-100,
        ignored_rows=0,
        reduction="none",
    ),
    linear_cross_entropy_case(
        "all_ignored", "mean NaN, gradients 0", ignored=-100, ignored_rows=slice(None), bias=True
    ),
    linear_cross_entropy_case("no_batch", "input (D,)", rows=None, bias=True),
    linear_cross_entropy_case("no_batch_none", "input (D,), loss of no dimension", rows=None, reduction="none"),
    linear_cross_entropy_case(
        "chunks",
        "chunks of rows, the last one shorter",
        rows=770,
        classes=9001,
        dim=4,
        ignored=-100,
        bias=True,
    ),
    linear_cross_entropy_case(
        "chunks_none", "the same, recomputed", rows=770, classes=9001, dim=4, ignored=-100, reduction="none"
    ),
    linear_cross_entropy_case(
        "wide", "more than 256 features: a bias counted once per block of them elsewhere", dim=513, bias=True
    ),
    linear_cross_entropy_case(
        "wide_few_classes", "the same, small enough for Triton's interpreter", rows=3, dim=257, classes=7, bias=True
    ),
    linear_cross_entropy_case(
        "options", "weights, smoothing, ignored rows", weight=True, label_smoothing=0.1, ignored=3, ignore_index=3
    ),
    linear_cross_entropy_case("z_loss", "z-loss and softcap", z_loss=0.01, softcap=2.0, bias=True, reduction="sum"),
    linear_cross_entropy_case("probabilities", "soft targets", probabilities=True, label_smoothing=0.1),
    linear_cross_entropy_case(
        "by_classes",
        "blocks of classes on a CPU: where no gradient is made, and for bfloat16 with fast products",
        rows=1000,
        classes=9001,
        dim=4,
        ignored=-100,
        bias=True,
        weight=True,
        z_loss=0.01,
        softcap=20.0,
    ),
    linear_cross_entropy_case(
        "by_classes_none", "the same, a loss for every row", rows=1000, classes=9001, dim=4, reduction="none"
    ),
    linear_cross_entropy_case("few_classes", "gathered tiles", classes=5, rows=40),
    linear_cross_entropy_case("empty", "no rows: NaN", rows=0, bias=True),
]


# --- embedding_dot ---------------------------------------------------------------------------------------------------
# Long sums whose rounding in float64 depends on luck, the truth's too: there test_embedding_dot.py has exact sums.


def embedding_case(
    name, why, users=7, items=9, batch=5, per_user=None, dim=16, bias=False, ids=torch.int64, dtypes=DTYPES, **options
):  # fmt: skip
    def make(g):
        shape = (batch,) if per_user is None else (batch, per_user)
        tables = {"user_weight": randn(g, users, dim), "item_weight": randn(g, items, dim)}
        if bias:
            tables |= {"user_bias": randn(g, users), "item_bias": randn(g, items, 1)}
        ids_of = {"user": randint(g, users, batch, dtype=ids), "item": randint(g, items, *shape, dtype=ids)}
        return {**ids_of, **tables, **options}

    weights, biases = ("user_weight", "item_weight"), ("user_bias", "item_bias")
    return Case("embedding_dot", name, why, make, (*weights, *(biases if bias else ())), dtypes)


def strided_embedding(g):
    return {
        "user": randint(g, 7, 10)[::2],
        "item": randint(g, 9, 3, 5, dtype=torch.int32).T,
        "user_weight": randn(g, 7, 40)[:, :20],
        "item_weight": randn(g, 20, 9).T,
        "user_bias": randn(g, 7, 2)[:, 0],
    }


def unaligned_embedding(g):
    return {
        "user": randint(g, 7, 5),
        "item": randint(g, 9, 5, 3),
        "user_weight": randn(g, 7, 17)[:, :16],
        "item_weight": randn(g, 9, 24)[:, 1:17],
    }


EMBEDDING_DOT: list[Case] = [
    embedding_case("pairs", "[B] x [B], whole vectors only"),
    embedding_case(
        "per-user", "[B] x [B, K], groups of four scores that share their user and groups that do not", per_user=6
    ),
    embedding_case("per-user-4", "K = 4: every group of four has one user", per_user=4, dim=33),
    embedding_case("k-1", "K = 1 keeps its dimension", per_user=1),
    embedding_case("bias", "biases of both shapes, [n] and [n, 1]", bias=True),
    embedding_case("bias-per-user", "the user's bias goes to all K of its scores", bias=True, per_user=3),
    embedding_case("int32", "32-bit ids", ids=torch.int32, per_user=2),
    embedding_case(
        "padding", "rows without gradient, biases too, counted from the end", bias=True, per_user=4, padding_idx=-2
    ),
    embedding_case("padding-pair", "a padding row in one table only, its last", batch=40, padding_idx=(None, 8)),
    embedding_case("all-padding", "every id is padding: no row gets a gradient", users=1, padding_idx=(0, None)),
    embedding_case("sparse", "coalesced sparse gradients", batch=40, bias=True, sparse=True),
    embedding_case("sparse-padding", "the padding row is left out", batch=12, per_user=3, padding_idx=3, sparse=True),
    embedding_case(
        "one-row",
        "all gradients of a table go to one row, over many chunks",
        users=1,
        batch=1500,
        dim=24,
        bias=True,
        dtypes=NOT_FLOAT64,
    ),
    embedding_case(
        "chunks", "runs that end at, before and after the borders of chunks", users=5, items=700, batch=1100, dim=8
    ),
    embedding_case(
        "chunks-per-user", "one user's items fill several chunks", batch=3, per_user=600, items=40, bias=True
    ),
    embedding_case("digits", "a sort of several digits", users=5000, items=3000, batch=300, dim=4),
    embedding_case("empty-batch", "B = 0", batch=0, bias=True),
    embedding_case("no-items", "K = 0", per_user=0),
    embedding_case("no-columns", "D = 0 leaves the biases", dim=0, bias=True, per_user=2),
    Case(
        "embedding_dot",
        "strides",
        "strided ids, table rows with gaps, a transposed table",
        strided_embedding,
        ("user_weight", "item_weight", "user_bias"),
    ),
    Case(
        "embedding_dot",
        "unaligned",
        "whole vectors, but at addresses that are no multiple of 16 bytes",
        unaligned_embedding,
        ("user_weight", "item_weight"),
    ),
    *(
        embedding_case(f"dim-{dim}", "tails: shorter than a vector, one past it, several widths", dim=dim, batch=30)
        for dim in (1, 3, 4, 5, 8, 9, 15, 17, 31, 64, 65, 100, 129, 200)
    ),
    embedding_case("dim-4096", "long rows", dim=4096, dtypes=NOT_FLOAT64),
]


# --- in_batch_cross_entropy ------------------------------------------------------------------------------------------
def in_batch_case(
    name, why, batch=7, users=6, items=50, dim=8, bias=False, log_q=False, ids=torch.int64, rows=1.0, dtypes=DTYPES,
    **options,
) -> Case:  # fmt: skip
    def make(g):
        arguments = {
            "user": randint(g, users, batch, dtype=ids),
            "item": randint(g, items, batch, dtype=ids),
            "user_weight": randn(g, users, dim, scale=rows),
            "item_weight": randn(g, items, dim, scale=rows),
        }
        if bias:
            arguments["item_bias"] = randn(g, *((items, 1) if bias == "column" else (items,)))
        if log_q:
            arguments["log_q"] = torch.rand(batch, generator=g, dtype=torch.float64).clamp(min=0.01).log()
        return {**arguments, **options}

    grad = ("user_weight", "item_weight", *(["item_bias"] if bias else []), *(["log_q"] if log_q else []))
    return Case("in_batch_cross_entropy", name, why, make, grad, dtypes)


IN_BATCH_CROSS_ENTROPY: list[Case] = [
    in_batch_case("plain", "no bias, no log_q: the products alone; fewer scores in a row than a vector row has"),
    in_batch_case("bias", "bias of the item, both as a vector and for its gradient", bias=True),
    in_batch_case("bias-column", "the weight of an nn.Embedding(n, 1) as it is", bias="column"),
    in_batch_case("log-q", "the correction alone, its sign, and its own gradient", log_q=True, reduction="none"),
    in_batch_case("bias-log-q", "both offsets of a column in one", bias=True, log_q=True, reduction="sum"),
    in_batch_case("few-hits", "a hit or two in some rows", 12, items=9),
    in_batch_case("hits", "3 items: most of a row masked; many pairs' gradients in one row", 40, items=3),
    in_batch_case("hits-kept", "the same scores unmasked", 40, items=3, mask_accidental_hits=False),
    in_batch_case("hits-blocks", "rows of several blocks of 64 ids and a tail", 203, items=300),
    in_batch_case("int32", "32-bit ids in the gathers, the mask and the sums", 40, items=9, ids=torch.int32),
    in_batch_case("one-pair", "B = 1: no negatives, loss 0", 1, bias=True),
    in_batch_case("empty-sum", "B = 0: loss 0, gradients 0", 0, bias=True, log_q=True, reduction="sum"),
    in_batch_case("empty-none", "B = 0: no losses", 0, reduction="none"),
    in_batch_case("one-item", "every other entry masked: loss 0, gradients 0", 20, items=1, bias=True),
    in_batch_case("confident", "scores of some hundreds: softmax of 0 and 1", 33, rows=6.0),
    in_batch_case("temperature", "scale multiplies the products, not bias and log_q", scale=6.5, bias=True, log_q=True),
    in_batch_case("chunks", "several chunks of rows, the last one shorter", 1001, 90, 120, bias=True),
    in_batch_case("chunks-none", "the same, computed again", 1001, 90, 120, bias=True, reduction="none"),
    in_batch_case(
        "tiles",
        "three tiles of 64 x 64 scores, hits in all; D of several panels of 64 bytes",
        150,
        items=40,
        dim=70,
        bias=True,
        log_q=True,
    ),
    in_batch_case(
        "tiles-none", "the same, upstream gradients of every pair", 150, items=40, dim=70, bias=True, reduction="none"
    ),
    in_batch_case("wide", "D = 300: rows too long for the tiles of a GPU, by chunks", 12, items=9, dim=300, bias=True),
    in_batch_case("odd-dim", "D = 13: row tails in the sums by id", dim=13, reduction="none"),
]

CASES = [*CONV2D_RELU, *CONV_ACT, *CONV2D_RELU_MAX_POOL2D, *CROSS_ENTROPY, *LINEAR_CROSS_ENTROPY, *EMBEDDING_DOT]
CASES += IN_BATCH_CROSS_ENTROPY
