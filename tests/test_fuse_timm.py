"""pyfused.fuse on timm's models, made without their weights: nothing is downloaded."""

import copy

import pytest
import torch
from test_fuse import rows, steps
from torch import nn

import pyfused

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("fused_wins")


def vgg():
    from timm.models.vgg import VGG

    return VGG(cfg=[8, "M", 16, 16, "M"], num_classes=5, mlp_ratio=0.01)


def named(name):
    return lambda: timm.create_model(name, pretrained=False, num_classes=5)


MODELS = {
    "resnet": named("test_resnet"),
    "convnext": named("test_convnext"),
    "efficientnet": named("test_efficientnet"),
    "vgg": vgg,
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name](), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    """Three optimizer steps: the loss and every parameter's gradient."""
    plain, x = make(name)
    swapped = copy.deepcopy(plain)
    pyfused.fuse(swapped, x, verbose=False)
    report = pyfused.fuse_report(swapped)
    assert report.rows and not report.notes and (report.fused or name != "vgg")
    for expected, got in zip(steps(plain, (x,)), steps(swapped, (x,))):
        usual = max(t.abs().max().item() for t in expected.values())
        for key, t in expected.items():
            torch.testing.assert_close(got[key], t, rtol=1e-3, atol=1e-4 * usual, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_inference(name):
    plain, x = make(name)
    swapped = copy.deepcopy(plain)
    pyfused.fuse(swapped, x, mode="inference", verbose=False)
    assert pyfused.fuse_report(swapped).rows and not pyfused.fuse_report(swapped).notes
    with torch.no_grad():
        torch.testing.assert_close(swapped.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)


def with_statistics(name):
    """A model in eval mode whose norms have had other batches than that of their defaults."""
    model, x = make(name)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.5, 2)
    return model.eval(), x


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_every_norm_folds(name):
    """Also BatchNormAct2d, which has dropout and activation within, and norms with an Identity or a shortcut behind."""
    plain, x = with_statistics(name)
    swapped = copy.deepcopy(plain)
    pyfused.fuse(swapped, x, mode="inference", verbose=False)
    folded = [row for row in pyfused.fuse_report(swapped).fused if "batch_norm" in row.pattern]
    assert len(folded) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-4, atol=1e-4)


def negated(module, args, output):
    return -output


CHANGES = {
    "norm in training": lambda norm: norm.train(),
    "another activation": lambda norm: setattr(norm, "act", nn.Tanh()),
    "hook on the norm": lambda norm: norm.register_forward_hook(negated),
    "hook on its activation": lambda norm: norm.act.register_forward_hook(negated),
    "hook on its dropout": lambda norm: norm.drop.register_forward_hook(negated),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_to_a_folded_norm_count(change):
    plain, x = with_statistics("efficientnet")
    swapped = copy.deepcopy(plain)
    pyfused.fuse(swapped, x, mode="inference", verbose=False)
    assert rows(swapped)["conv_stem"].pattern == "conv2d + batch_norm + silu"
    for model in (plain, swapped):
        change(model.bn1)
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-4, atol=1e-4)
