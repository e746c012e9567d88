"""The Triton backend with the tiles that only PYFUSED_AUTOTUNE=1 would choose: they compute the same."""

import importlib

import pytest
import torch
from accuracy import check_gradients
from cases import CASES

NAMES = {
    "cross_entropy": ("all_tile", "all_rows", "masked_first_rows", "probabilities_rows", "masked_first_long"),
    "embedding_dot": ("pairs", "bias-per-user", "strides", "dim-200"),
    "conv2d_relu": ("channels-cl", "plain", "strided-dilated"),
    "conv2d_relu_max_pool2d": ("plain",),
}
SOME = [case for case in CASES if case.name in NAMES.get(case.op, ())]


@pytest.mark.parametrize("variant", ["triton"], indirect=True)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)
def test_other_tiles(case, variant, number, monkeypatch):
    chosen = []

    def choose(key, candidates, run):
        chosen.append(candidates[min(number, len(candidates) - 1)])
        return chosen[-1]

    for name in ("cross_entropy", "embedding_dot", "conv2d_relu"):
        monkeypatch.setattr(importlib.import_module(f"pyfused.backends.triton.{name}"), "choose", choose)
    check_gradients(case, variant, torch.float32)
    assert chosen


def test_the_cases_are_there():
    assert len(SOME) == sum(map(len, NAMES.values()))
