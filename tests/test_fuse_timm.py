"""pyfused.fuse on timm's models, made without their weights: nothing is downloaded."""

import copy

import pytest
import torch
from test_fuse import steps

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
