"""pyfused.fuse on random compositions of what models are made of: the same outputs, gradients and buffers as before."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused

pytestmark = pytest.mark.usefixtures("fused_wins")

C = 4  # channels everywhere, so that anything fits behind anything


class Call(nn.Module):
    """A module whose forward is `run` of its children and the input."""

    def __init__(self, run, *children):
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(children)

    def forward(self, x):
        return self.run(self.parts, x)


class Scaled(nn.Module):
    """Keywords, a buffer and a list that forward changes."""

    def __init__(self, child):
        super().__init__()
        self.child, self.seen = child, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, scale=1.0, mask=None):
        self.count += 1
        self.seen.append(x.shape[0])
        y = self.child(x) * scale
        return y if mask is None else y * mask


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3) * 0.2)

    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, padding=1))


class Named(nn.Sequential):
    """A subclass, which need not be what it was made from."""


def chain(parts, x):
    for part in parts:
        x = part(x)
    return x


def added_in_place(parts, x):
    y = parts[0](x) * 1.0
    y += x
    return F.relu(y)


def without_grad(parts, x):
    with torch.no_grad():
        y = parts[0](x)
    return 0.1 * y + x


def hooked(child):
    child.register_forward_hook(lambda module, args, out: out * 1.5)
    return child


def holder(child):
    """A module that is never called itself."""
    module = nn.Identity()
    module.child = child
    return module


COMPOSITIONS = [
    lambda tree: nn.Sequential(tree(), tree()),
    lambda tree: nn.Sequential(tree(), nn.Sequential(tree())),
    lambda tree: Named(tree(), tree()),
    lambda tree: Call(chain, tree(), tree()),
    lambda tree: Call(lambda parts, x: parts[0].child(x), holder(tree())),
    lambda tree: Call(lambda parts, x: F.relu(parts[0](x) + x), tree()),
    lambda tree: Call(added_in_place, tree()),
    lambda tree: Call(without_grad, tree()),
    lambda tree: Call(lambda parts, x: parts[0](parts[0](x)), tree()),
    lambda tree: Call(lambda parts, x: parts[0](x) + parts[1](x / 2), *[tree()] * 2),  # one module, two names
    lambda tree: Call(lambda parts, x: torch.cat([p(x)[:, :2] for p in parts], 1), tree(), tree()),
    lambda tree: Call(lambda parts, x: parts[0 if x.sum() > -1e9 else 1](x), tree(), tree()),  # no graph
    lambda tree: Call(lambda parts, x: {"y": parts[0](x), "x": x}["y"], tree()),
    lambda tree: Call(lambda parts, x: parts[0](x, scale=0.5, mask=torch.ones_like(x[:, :1])), Scaled(tree())),
    lambda tree: Call(lambda parts, x: checkpoint(parts[0], x, use_reentrant=False), tree()),
    lambda tree: nn.ModuleDict({"only": hooked(tree())})["only"],
]
LEAVES = [
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU()),
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.SiLU()),
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True)),
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
    lambda: nn.Conv2d(C, C, 3, padding=1, groups=2),
    lambda: nn.Conv2d(C, C, 1),
    lambda: nn.BatchNorm2d(C),
    Functional,
]


class Classifier(nn.Module):
    """Its loss, alone or with what else models return."""

    def __init__(self, body, returns):
        super().__init__()
        self.body, self.head, self.criterion, self.returns = body, nn.Linear(C, 5), nn.CrossEntropyLoss(), returns

    def forward(self, x, labels):
        logits = self.head(self.body(x).mean((2, 3)))
        loss = self.criterion(logits, labels)
        return [loss, (loss, logits), {"loss": loss, "label": logits.argmax(1)}, (loss + logits.square().mean(),)][
            self.returns
        ]


def loss_of(out):
    return out if isinstance(out, torch.Tensor) else out["loss"] if isinstance(out, dict) else out[0]


def random_model(seed):
    choose = random.Random(seed)

    def tree(depth):
        if depth == 0:
            return choose.choice(LEAVES)()
        return choose.choice(COMPOSITIONS)(lambda: tree(depth - 1))

    return Classifier(tree(choose.choice([1, 2, 2, 3])), choose.randrange(4))


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("seed", range(100))
def test_random_models(seed, mode):
    torch.manual_seed(seed)
    model = random_model(seed).train(mode == "train")
    x, labels = torch.randn(3, C, 8, 8), torch.randint(5, (3,))
    eager, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    pyfused.fuse(model, (x, labels), mode=mode, verbose=False)
    report = pyfused.fuse_report(model)
    assert report.rows and not report.notes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for _ in range(2):
        loss, expected = loss_of(model(x, labels)), loss_of(eager(x, labels))
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=2e-5)
        if mode == "train":
            loss.backward()
            expected.backward()
    for p, q in zip(model.parameters(), eager.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-4 * max(1.0, q.grad.abs().max().item()))
    for t, expected in zip(model.state_dict().values(), eager.state_dict().values()):
        torch.testing.assert_close(t, expected, rtol=1e-3, atol=1e-4)
    assert [type(m) for m in pyfused.unfuse(model).modules()] == [type(m) for m in eager.modules()]
