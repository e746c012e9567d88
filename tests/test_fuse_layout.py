"""pyfused.fuse and images in NCHW: converted to channels_last where the whole model is faster, and nowhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyfused
from pyfused.fusion import measure

pytestmark = pytest.mark.usefixtures("fused_wins")

IMAGES = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))


class Spy(nn.Module):
    """Passes tensors on; `seen`: whether the last one was channels_last."""

    seen = None

    def forward(self, x):
        Spy.seen = x.is_contiguous(memory_format=torch.channels_last)
        return x


class Last(nn.Module):
    """Applies any function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Doubled(nn.Module):
    """Writes to its input."""

    def forward(self, x):
        return x.mul_(2)


class Scaled(nn.Sequential):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def network(*last, first=(), kind=nn.Sequential):
    torch.manual_seed(1)
    return kind(*first, nn.Conv2d(3, 8, 3), nn.ReLU(), Spy(), nn.Conv2d(8, 8, 3), nn.ReLU(), *last)


def fused(model, mode="train", example=IMAGES):
    result = pyfused.fuse(copy.deepcopy(model), example.clone(), mode=mode, verbose=False)
    return result, pyfused.fuse_report(result)


def seen(model, *args):
    """How the tensors lay between the convolutions in this call."""
    model(*args)
    return Spy.seen


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("classify", [False, True])
def test_the_faster_layout_is_taken(mode, classify):
    model = network(*[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)] * classify)
    model.train(mode == "train")
    swapped, report = fused(model, mode)
    assert report.channels_last == 2.0 and len(report.fused) == 2 and not report.notes
    assert "converted to channels_last, outputs back, which is 2.00x as fast" in " ".join(str(report).split())
    assert seen(swapped, IMAGES) and not seen(model, IMAGES)
    x, y = (IMAGES.clone().requires_grad_() for _ in range(2))
    got, expected = swapped(x), model(y)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(swapped.parameters(), model.parameters(), strict=True):
        assert a.stride() == b.stride() and a.grad.stride() == b.grad.stride()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for twin in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert seen(twin, IMAGES) and torch.equal(twin(IMAGES), swapped(IMAGES))
    assert not seen(pyfused.unfuse(swapped), IMAGES)


def test_the_slower_layout_is_not(monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda before, after: [1.0, 1.0])
    swapped, report = fused(network())
    assert report.channels_last is None and not seen(swapped, IMAGES)


def test_what_is_channels_last_already_is_not_converted():
    _, report = fused(network(), example=IMAGES.contiguous(memory_format=torch.channels_last))
    assert report.channels_last is None and len(report.fused) == 2


REFUSED = {
    "a view of all features": Last(lambda x: x.view(len(x), -1)),
    "an output that is no longer contiguous": Last(lambda x: x.flatten(2)),
    "another result": Last(lambda x: x * x.stride(1)),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_models_that_need_nchw_keep_it(why, mode):
    model = network(REFUSED[why])
    swapped, report = fused(model, mode)
    assert report.channels_last is None and len(report.fused) == 2 and not seen(swapped, IMAGES)
    torch.testing.assert_close(swapped(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_model_that_writes_to_its_input_still_does():
    swapped, report = fused(network(first=[Doubled()]))
    x = IMAGES.clone()
    swapped(x)
    assert report.channels_last is None and torch.equal(x, 2 * IMAGES)


def test_calls_of_another_kind_are_the_models_own():
    model = network(kind=Scaled)
    swapped, report = fused(model)
    assert report.channels_last and seen(swapped, IMAGES) and seen(swapped.eval(), IMAGES)
    assert not seen(swapped, IMAGES, 2.0)
    torch.testing.assert_close(swapped(IMAGES, 2.0), 2 * swapped(IMAGES), rtol=1e-4, atol=1e-5)
    assert swapped(IMAGES[0]).shape == (8, 5, 7)
    swapped, report = fused(model.eval(), "inference")
    assert report.channels_last and seen(swapped, IMAGES) and not seen(swapped.train(), IMAGES)


def test_without_verification_nothing_is_converted():
    swapped = pyfused.fuse(network(), IMAGES, verify=False, verbose=False)
    assert pyfused.fuse_report(swapped).channels_last is None and not seen(swapped, IMAGES)
