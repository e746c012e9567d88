"""The reference models: fused and eager are the same function of the same parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyfused.models import MnistCNN, Recommender
from pyfused.train import standardise


def cnn_inputs():
    g = torch.Generator().manual_seed(0)
    return (standardise(torch.randint(256, (6, 1, 28, 28), generator=g)),)


def pairs():
    g = torch.Generator().manual_seed(0)
    return torch.randint(20, (6,), generator=g), torch.randint(30, (6,), generator=g)


def lists():
    g = torch.Generator().manual_seed(0)
    return torch.randint(20, (6,), generator=g), torch.randint(30, (6, 9), generator=g)


MODELS = [
    pytest.param(lambda fused: MnistCNN(fused=fused), cnn_inputs, id="cnn"),
    pytest.param(lambda fused: Recommender(20, 30, 12, fused=fused), pairs, id="recommender-pairs"),
    pytest.param(lambda fused: Recommender(20, 30, 12, fused=fused), lists, id="recommender-lists"),
]


@pytest.mark.parametrize("make, inputs", MODELS)
def test_the_seed_decides_the_parameters_fused_or_not(make, inputs):
    states = []
    for fused in (False, True):
        torch.manual_seed(3)
        states.append(make(fused).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("make, inputs", MODELS)
def test_fused_equals_eager(make, inputs):
    """In float32, against the eager model in float64: results and every gradient, after a state_dict went across."""
    torch.manual_seed(0)
    eager, fused, exact = make(False), make(True), make(False).double()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that biases count
    fused.load_state_dict(eager.state_dict())
    exact.load_state_dict(eager.state_dict())
    outputs = []
    for model in (eager, fused, exact):
        given = (x.double() if model is exact and x.is_floating_point() else x for x in inputs())
        outputs.append(model(*given))
        upstream = torch.linspace(-1, 1, outputs[-1].numel()).view_as(outputs[-1]).to(outputs[-1])
        outputs[-1].backward(upstream)
    results = {"output": outputs} | {
        name: [model.get_parameter(name).grad for model in (eager, fused, exact)]
        for name, _ in exact.named_parameters()
    }
    for name, (of_eager, of_fused, truth) in results.items():
        scale = truth.abs().max().item()
        assert scale > 0, f"{name}: nothing to compare"
        eager_error, fused_error = ((x.double() - truth).abs().max().item() / scale for x in (of_eager, of_fused))
        # 2e-5: what the Winograd transform may lose in one layer.
        assert fused_error <= 2 * eager_error + 2e-5, f"{name}: {fused_error:.1e}, eager {eager_error:.1e}"


def test_cnn_is_the_reference_architecture():
    model = MnistCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 93_322
    layers = nn.Sequential(
        *(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2), model.conv3, nn.ReLU()),
        *(nn.Flatten(), model.dense1, nn.ReLU(), model.dense2),
    )
    assert torch.equal(model(*cnn_inputs()), layers(*cnn_inputs()))


@pytest.mark.parametrize("fused", [False, True])
def test_cnn_takes_channels_last(fused):
    """Dense weights are numbered (channel, row, column): the memory format must not reorder the features."""
    torch.manual_seed(0)
    model = MnistCNN(fused=fused)
    expected = model(*cnn_inputs())
    model.to(memory_format=torch.channels_last)
    found = model(cnn_inputs()[0].to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_score_all_agrees_with_forward(fused):
    torch.manual_seed(0)
    model = Recommender(20, 30, 12, fused=fused)
    nn.init.normal_(model.item_bias.weight)
    everything = model(torch.arange(20), torch.arange(30).expand(20, 30))
    torch.testing.assert_close(model.score_all(), everything)


def test_a_ranking_loss_gives_users_no_bias():
    """Why Recommender has none: the softmax gradient of a user's bias is zero but for rounding."""
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.zeros(5, 1, requires_grad=True)
    F.cross_entropy(scores + bias, torch.zeros(5, dtype=torch.int64)).backward()
    assert bias.grad.abs().max() < 1e-6 < scores.grad.abs().max()
