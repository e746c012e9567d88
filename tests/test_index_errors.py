"""Labels and ids out of range on a GPU: NaN where they are used, gradient 0, and an error later, in the CPU's words."""

import importlib

import pytest
import torch
from conftest import INTERPRETED

import pyfused
import pyfused.functional as PF
from pyfused import _binary, dispatch

pytestmark = pytest.mark.parametrize("variant", ["cuda", "cuda-emulated", "triton"], indirect=True)
BAD = pytest.mark.parametrize("bad", [-1, 9, 2**40])
REPORTING = ("cuda_check_labels", "cuda_cross_entropy", "cuda_embedding_dot", "cuda_in_batch_ids")


@pytest.fixture
def device(variant, monkeypatch):
    """A device that is behind: what its kernels note is there only when pyfused.check_errors() looks. Otherwise a CUDA
    kernel raises for the one before it, if that has finished."""
    take, notes = getattr(_binary._C, "cuda_check_errors", None), []

    def late(run):
        def call(*args):
            run(*args)
            if variant == "cuda":
                torch.cuda.synchronize()
            try:
                take()
            except IndexError as note:
                notes.append(note)

        return call

    def check_errors():
        if notes:
            first = notes[0]
            notes.clear()
            raise first

    if dispatch._forced == "cuda":
        for name in REPORTING:
            monkeypatch.setattr(_binary._C, name, late(getattr(_binary._C, name)))
        monkeypatch.setattr(_binary._C, "cuda_check_errors", check_errors)
    return variant


def raises_once(name, position, value, limit):
    words = rf"^{name} {value} is out of bounds: {name}\[{position}\] must lie in \[0, {limit}\)$"
    with pytest.raises(IndexError, match=words):
        pyfused.check_errors()
    pyfused.check_errors()


@BAD
@pytest.mark.op("cross_entropy")
def test_label(device, bad):
    x = torch.randn(6, 9, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, bad, 5], device=device)
    loss = PF.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert loss.isnan().tolist() == [False] * 4 + [True, False]
    assert grad.isfinite().all() and grad.any(1).tolist() == [True] * 4 + [False, True]
    raises_once("target", 4, bad, 9)


@BAD
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.op("linear_cross_entropy")
def test_label_of_a_linear_layer(device, reduction, bad):
    """Nothing flows from its row, to the next row neither."""
    x, w = (torch.randn(n, 8, device=device, requires_grad=True) for n in (6, 9))
    target = torch.tensor([0, 1, 2, 3, 3, 5], device=device)
    target[4] = bad
    loss = PF.linear_cross_entropy(x, w, target, reduction=reduction)
    assert loss.isnan().tolist() == ([False] * 4 + [True, False] if reduction == "none" else True)
    got = torch.autograd.grad(loss, (x, w), torch.ones_like(loss))
    target[4] = -100
    with pyfused.use_backend("reference"):
        loss = PF.linear_cross_entropy(x, w, target, reduction=reduction)
    for a, b in zip(got, torch.autograd.grad(loss, (x, w), torch.ones_like(loss)), strict=True):
        torch.testing.assert_close(a, b)
    raises_once("target", 4, bad, 9)


@BAD
@pytest.mark.parametrize("rows", [2, 4, 6])
@pytest.mark.op("linear_cross_entropy")
def test_label_in_a_chunk_of_a_linear_layer(device, monkeypatch, rows, bad):
    """It is named by its place in the whole target; in the last of three chunks, of two, or in the only one."""
    adapter = importlib.import_module(f"pyfused.backends.{dispatch._forced}.linear_cross_entropy")
    monkeypatch.setattr(adapter, "_chunk", lambda input, weight: input.new_empty(rows, len(weight)))
    target = torch.tensor([0, 1, -100, 3, 3, 8], device=device)
    target[5] = bad
    loss = PF.linear_cross_entropy(*(torch.randn(n, 8, device=device) for n in (6, 9)), target, reduction="none")
    assert loss.isnan().tolist() == [False] * 5 + [True]
    raises_once("target", 5, bad, 9)


@pytest.mark.parametrize("position", [255, 256, 1000])
@pytest.mark.op("linear_cross_entropy")
def test_label_among_many_of_a_linear_layer(device, monkeypatch, position):
    """More than a pass of all threads over the whole target reaches, when emulated."""
    if INTERPRETED and position != 256:
        pytest.skip("a program of Triton's has no threads, and its interpreter takes long for so many rows")
    adapter = importlib.import_module(f"pyfused.backends.{dispatch._forced}.linear_cross_entropy")
    monkeypatch.setattr(adapter, "_chunk", lambda input, weight: input.new_empty(600, len(weight)))
    target = torch.full((position + 1,), -100, device=device)
    target[position] = 9
    PF.linear_cross_entropy(*(torch.randn(n, 8, device=device) for n in (position + 1, 9)), target, reduction="none")
    raises_once("target", position, 9, 9)


@pytest.mark.op("cross_entropy")
def test_several_labels(device):
    """One of them is named, by its own place and value."""
    target = torch.tensor([9, 10, 11, 12, 13, 14], device=device)
    PF.cross_entropy(torch.randn(6, 9, device=device), target, reduction="none")
    with pytest.raises(IndexError, match=r"^target (9 .*\[0\]|10 .*\[1\]|11 .*\[2\]|12 .*\[3\]|13 .*\[4\]|14 .*\[5\])"):
        pyfused.check_errors()
    pyfused.check_errors()


@BAD
@pytest.mark.parametrize("name", ["user", "item"])
@pytest.mark.op("embedding_dot")
def test_id(device, name, bad):
    tables = [torch.randn(9, 8, device=device, requires_grad=True) for _ in range(2)]
    ids = {"user": torch.arange(6), "item": torch.arange(6) + 1}
    ids[name][3] = bad
    scores = PF.embedding_dot(*(x.to(device) for x in ids.values()), *tables)
    grads = torch.autograd.grad(scores, tables, torch.ones_like(scores))
    assert scores.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    for grad, rows in zip(grads, ([0, 1, 2, 4, 5], [1, 2, 3, 5, 6])):
        assert grad.isfinite().all() and grad.any(1).nonzero().flatten().tolist() == rows
    raises_once(name, 3, bad, 9)


@BAD
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["user", "item"])
@pytest.mark.op("in_batch_cross_entropy")
def test_id_of_a_batch(device, name, reduction, bad):
    """Every row's softmax contains every item: all losses are NaN, all gradients 0, whatever comes from upstream."""
    g = torch.Generator().manual_seed(0)
    shapes = {"user_weight": (9, 8), "item_weight": (9, 8), "item_bias": (9,), "log_q": (6,)}
    given = {n: torch.randn(s, generator=g).to(device).requires_grad_() for n, s in shapes.items()}
    ids = {"user": torch.arange(6), "item": torch.arange(6) + 1}
    ids[name][2] = bad
    loss = PF.in_batch_cross_entropy(*(x.to(device) for x in ids.values()), **given, reduction=reduction)
    assert loss.isnan().all()
    for upstream in (1.0, torch.nan):
        for grad in torch.autograd.grad(loss, given.values(), torch.full_like(loss, upstream), retain_graph=True):
            assert (grad == 0).all()
    raises_once(name, 2, bad, 9)
    good = torch.arange(6, device=device)
    loss = PF.in_batch_cross_entropy(good, good, **given, reduction=reduction)
    assert loss.isfinite().all() and all(grad.any() for grad in torch.autograd.grad(loss.sum(), given.values()))
    pyfused.check_errors()
