"""16-bit convolutions and products on CPUs without instructions for them run in float32; on others they do not."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import pyfused
import pyfused.functional as P
from pyfused import _C
from pyfused.backends.cpu import conv_act, linear_cross_entropy, widen

pytestmark = pytest.mark.skipif(_C is None, reason="the package was built without its extension")
linear_chunks = importlib.import_module("pyfused.ops.linear_chunks")
conv2d_relu = importlib.import_module("pyfused.ops.conv2d_relu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=HALVES, ids=str)
def dtype(request, monkeypatch):
    monkeypatch.setattr(widen, "SLOW", frozenset(HALVES))
    return request.param


def leaves(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).div(4).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_grads(function, tensors, dtype=None):
    """Of `function` on copies of the tensors in another dtype; all results in the tensors' own."""
    own = tensors[0].dtype
    inputs = [x.detach().to(dtype or own).requires_grad_() for x in tensors]
    output = function(*inputs)
    upstream = torch.linspace(-1, 1, output.numel()).to(own).to(output.dtype).view_as(output)
    return [x.to(own) for x in (output.detach(), *torch.autograd.grad(output, inputs, upstream))]


# (function of input, weight, bias; their shapes). Sizes that no other test has: how a call runs is remembered by shape.
CONVOLUTIONS = {
    "winograd": (lambda x, w, b: P.conv2d_relu(x, w, b, padding=1), (3, 32, 29, 31), (48, 32, 3, 3)),
    "large_weight": (lambda x, w, b: P.conv2d_relu(x, w, b, padding=1), (2, 96, 23, 25), (112, 96, 3, 3)),
    "1x1": (lambda x, w, b: P.conv2d_relu(x, w, b), (5, 96, 27, 29), (64, 96, 1, 1)),
    "strided": (lambda x, w, b: P.conv2d_relu(x, w, b, stride=2), (3, 32, 43, 41), (64, 32, 5, 5)),
    "direct": (lambda x, w, b: P.conv2d_relu(x, w, b, stride=2, padding=3), (2, 3, 61, 67), (64, 3, 7, 7)),
    "pooled": (lambda x, w, b: P.conv2d_relu_max_pool2d(x, w, b), (3, 32, 31, 33), (48, 32, 3, 3)),
    "silu": (lambda x, w, b: P.conv_act(x, w, b, padding=1, activation="silu"), (3, 32, 33, 31), (48, 32, 3, 3)),
    "gelu_rows": (lambda x, w, b: P.conv_act(x, w, b, activation="gelu"), (4, 80, 611), (96, 80, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_float32s_rounded(dtype, name):
    function, *shapes = CONVOLUTIONS[name]
    tensors = leaves(dtype, *shapes, shapes[1][:1])
    narrow, wide = outputs_and_grads(function, tensors), outputs_and_grads(function, tensors, torch.float32)
    assert all(x.dtype == dtype for x in narrow)
    for a, b in zip(narrow, wide):
        # The output that backward starts from was rounded; where it became 0 or tied, a gradient may go elsewhere.
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
    assert torch.equal(narrow[0], wide[0])


INPUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "one channel of many": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :1],
    "expanded": lambda x: x[:1, :1].transpose(2, 3).expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("channels", [1, 48])
@pytest.mark.parametrize("name", INPUTS)
def test_strides_are_those_promised(dtype, name, channels):
    """Of a tensor with gaps, or with a dimension of 1, a copy may look like another layout."""
    torch.manual_seed(0)
    x = INPUTS[name](torch.randn(3, 32, 19, 37).to(dtype))
    weight = torch.randn(channels, x.shape[1], 1, 1).to(dtype)
    options = ((1, 1), (0, 0), (1, 1), 1)
    args = (x, weight, None, *options)
    output = torch.ops.pyfused.conv2d_relu(*args)
    grads = torch.ops.pyfused.conv2d_relu_backward(output, x, weight, output, *options, [True] * 3)
    promised = conv2d_relu.alloc(*args), *conv2d_relu.alloc_backward(output, x, weight, output, *options, [True] * 3)
    for actual, expected in zip((output, *grads), promised):
        assert (actual.dtype, actual.stride()) == (dtype, expected.stride())
    expected = F.conv2d(x.float(), weight.float()).relu().to(dtype)  # sums in another order may round the other way
    torch.testing.assert_close(output, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_remembered_weight_is_made_again_when_it_changes(dtype):
    x, w, b = (t.detach() for t in leaves(dtype, (3, 128, 17, 39), (144, 128, 3, 3), (144,)))
    assert w.nbytes >= widen._LARGE_WEIGHT
    for change in (lambda: None, lambda: w.mul_(-1), lambda: w.data.mul_(2)):  # .data: the version does not show it
        change()
        for _ in range(4):
            expected = P.conv2d_relu(x.float(), w.float(), b.float()).to(dtype)
            assert torch.equal(P.conv2d_relu(x, w, b), expected)


def test_native_dtypes_are_left_alone(monkeypatch):
    monkeypatch.setattr(widen, "SLOW", frozenset())
    monkeypatch.setattr(widen, "_wide", lambda x: pytest.fail("a tensor was converted"))
    outputs_and_grads(CONVOLUTIONS["direct"][0], leaves(torch.bfloat16, (2, 3, 59, 71), (64, 3, 7, 7), (64,)))
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert widen.product_dtype(x) == torch.bfloat16
    assert conv_act._cedes(x.view(1, 1, 2, 2), x.view(1, 1, 2, 2), None, None, (1, 1), (0, 0), (1, 1), 1, conv_act.GELU)


# rows, classes: one chunk, several of rows with several blocks of classes, blocks of classes without gradients
@pytest.mark.parametrize("rows, classes", [(40, 300), (300, 9001)])
@pytest.mark.parametrize("kind", ["labels", "smoothed", "soft", "weighted", "none"])
def test_linear_cross_entropy(dtype, rows, classes, kind, monkeypatch):
    features = 70 if rows == 40 else 600  # of 9001 x 600 float32, 2 MiB are 873 classes
    monkeypatch.setattr(linear_cross_entropy, "_chunk", few_rows)
    tensors = leaves(dtype, (rows, features), (classes, features), (classes,))
    target, class_weights, options = torch.randint(classes, (rows,)), torch.rand(classes).to(dtype), {}
    target[3] = -100
    if kind == "soft":
        target = torch.rand(rows, classes).softmax(1).to(dtype)
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
    if kind == "none":
        options["reduction"] = "none"

    def function(x, w, b):
        aim, weight = (t.to(x.dtype) if t.is_floating_point() else t for t in (target, class_weights))
        with pyfused.use_backend("cpu"):  # however small
            return P.linear_cross_entropy(
                x, w, aim, linear_bias=b, weight=weight if kind == "weighted" else None, **options
            )

    # Two units in the last place: what `wide` rounds once, the upstream gradient and a scaling round on the way.
    narrow, wide = outputs_and_grads(function, tensors), outputs_and_grads(function, tensors, torch.float32)
    for a, b in zip(narrow, wide):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.no_grad():  # by blocks of classes
        torch.testing.assert_close(function(*tensors), narrow[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def few_rows(input, linear_weight):
    return torch.empty(128, len(linear_weight), dtype=widen.product_dtype(input))


def test_probabilities_are_converted_a_chunk_at_a_time(dtype, monkeypatch):
    rows, classes, features, sizes = 300, 1000, 70, []
    original = linear_chunks._like

    def like(chunk, x):
        sizes.append(0 if x is None else x.numel())
        return original(chunk, x)

    monkeypatch.setattr(linear_chunks, "_like", like)
    monkeypatch.setattr(linear_cross_entropy, "_chunk", few_rows)
    x, w = leaves(dtype, (rows, features), (classes, features))
    target = torch.rand(rows, classes).softmax(1).to(dtype)
    with pyfused.use_backend("cpu"):
        P.linear_cross_entropy(x, w, target).backward()
        P.linear_cross_entropy(x, w, target, reduction="none").sum().backward()
    assert max(sizes) == 128 * classes
