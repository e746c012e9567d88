"""The reference models: their shapes and parameters, and that pyfused.fuse finds what there is to find in them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyfused
from pyfused.models import (
    GPT,
    DotConcat,
    ImageCNN,
    MatrixFactorization,
    MnistCNN,
    PhotoCNN,
    SmallCNN,
    TwoTower,
    resnet18,
    resnet50,
)
from pyfused.tasks.task import Classification
from pyfused.tasks.text import NextToken


def ids(*shape, high=20):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def step(module, model, inputs, classes):
    labels = ids(inputs.numel() if inputs.dim() == 2 else len(inputs), high=classes)
    return module(model), (inputs, labels.view(inputs.shape) if inputs.dim() == 2 else labels)


CNN = {"conv2d + relu + max_pool2d": 1, "cross_entropy": 1}
# model in its training step, its inputs, and how often fuse swaps each pattern where the fused call wins
FOUND = {
    "small-cnn": (lambda: step(Classification, SmallCNN(), images(6, 1, 28, 28), 10), CNN),
    "mnist-cnn": (
        lambda: step(Classification, MnistCNN(), images(6, 1, 28, 28), 10),
        {"conv2d + relu + max_pool2d": 2, "conv2d + relu": 1, "cross_entropy": 1},
    ),
    "image-cnn": (
        lambda: step(Classification, ImageCNN(5, 32), images(4, 3, 32, 32), 5),
        {"conv2d + relu + max_pool2d": 2, "conv2d + relu": 1, "cross_entropy": 1},
    ),
    "photo-cnn": (
        lambda: step(Classification, PhotoCNN(5), images(4, 3, 32, 32), 5),
        {"conv2d + relu + max_pool2d": 5, "linear + cross_entropy": 1},
    ),
    "factorisation": (
        lambda: (MatrixFactorization(20, 20, 8, user_bias=True, mean=3.0), (ids(9), ids(9))),
        {"embedding dot + bias": 1},
    ),
    "factorisation-lists": (
        lambda: (MatrixFactorization(20, 20, 8), (ids(9), ids(9, 5))),
        {"embedding dot + bias": 1},
    ),
    "gpt": (lambda: step(NextToken, GPT(256, 16, 32, 2, 2), ids(3, 16), 256), {"linear + cross_entropy": 1}),
    "resnet18": (lambda: step(Classification, resnet18(5), images(2, 3, 64, 64), 5), {"linear + cross_entropy": 1}),
}


@pytest.mark.parametrize("name", FOUND)
def test_fuse_finds_the_patterns_and_changes_nothing_else(name, fused_wins):
    torch.manual_seed(0)
    make, expected = FOUND[name]
    model, inputs = make()
    before = model(*inputs).detach()
    pyfused.fuse(model, inputs, verbose=False)
    report = pyfused.fuse_report(model)
    patterns = [row.pattern for row in report.fused]
    assert {pattern: patterns.count(pattern) for pattern in expected} == expected
    assert report.error < 1e-3 and not report.notes
    torch.testing.assert_close(model(*inputs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "model, shape, parameters",
    [
        (SmallCNN(), (2, 1, 28, 28), 320 + 32 * 169 * 128 + 128 + 1290),
        (MnistCNN(), (2, 1, 28, 28), 93_322),
        (ImageCNN(5), (1, 3, 224, 224), 896 + 18_496 + 36_928 + 64 * 52 * 52 * 64 + 64 + 325),
        (PhotoCNN(5), (1, 3, 35, 50), 896 + 18_496 + 73_856 + 295_168 + 590_080 + 1285),
        (resnet18(), (2, 3, 64, 64), 11_689_512),
        (resnet50(), (2, 3, 64, 64), 25_557_032),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_sizes(model, shape, parameters):
    """Those of the ResNets are the published ones."""
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(shape)).shape[0] == shape[0]


def test_mnist_cnn_takes_channels_last():
    """Dense weights are numbered (channel, row, column): the memory format must not reorder the features."""
    torch.manual_seed(0)
    model, x = MnistCNN(), images(6, 1, 28, 28)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


def test_gpt_sees_only_what_came_before():
    torch.manual_seed(0)
    model, tokens = GPT(50, 16, 32, 2, 2), ids(2, 16, high=50)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9] - b[:, 9]).abs().max() > 1e-3
    assert a.shape == (2, 16, 50) and model(tokens[:, :5]).shape == (2, 5, 50)


def test_scores_by_hand():
    torch.manual_seed(0)
    user, item = ids(6), ids(6, 3, high=30)
    model = MatrixFactorization(20, 30, 4, user_bias=True, mean=2.5)
    two_tower, concat = TwoTower(20, 30, 4, temperature=0.2), DotConcat(20, 30, 4, torch.tensor([1.0, 2.0, 5.0]))
    for m in (model, two_tower):
        nn.init.normal_(m.item_bias.weight)
    nn.init.normal_(model.user_bias.weight)
    for b in range(6):
        for k in range(3):
            u, i = user[b], item[b, k]
            score = model.user.weight[u] @ model.item.weight[i] + model.item_bias.weight[i] + model.user_bias.weight[u]
            torch.testing.assert_close(model(user, item)[b, k], score[0] + 2.5)
            cosine = F.cosine_similarity(two_tower.user.weight[u], two_tower.item.weight[i], dim=0)
            users, items, bias = two_tower.factors()
            torch.testing.assert_close(users[u] @ items[i] + bias[i], cosine / 0.2 + two_tower.item_bias.weight[i, 0])
            p, q = concat.user.weight[u], concat.item.weight[i]
            logits = concat.dense(torch.cat([p, q, (p @ q)[None]]))
            torch.testing.assert_close(concat(user, item[:, k])[b], logits)
            probabilities = logits.softmax(0)
            expected = probabilities[0] + 2 * probabilities[1] + 5 * probabilities[2]
            torch.testing.assert_close(concat.score(user, item[:, k])[b], expected)
    torch.testing.assert_close(model(user, item[:, 1]), model(user, item)[:, 1])


def test_factors_rank_as_the_model_does():
    """What differs is the same for all items of a user."""
    torch.manual_seed(0)
    model = MatrixFactorization(20, 30, 4, user_bias=True, mean=2.5)
    users, items, bias = model.factors()
    everything = model(torch.arange(20), torch.arange(30).expand(20, 30))
    difference = everything - (users @ items.T + bias)
    torch.testing.assert_close(difference, difference[:, :1].expand(20, 30))


def test_a_ranking_loss_gives_users_no_bias():
    """Why a ranking's factorisation has none: the softmax gradient of a user's bias is zero but for rounding."""
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.zeros(5, 1, requires_grad=True)
    F.cross_entropy(scores + bias, torch.zeros(5, dtype=torch.int64)).backward()
    assert bias.grad.abs().max() < 1e-6 < scores.grad.abs().max()
