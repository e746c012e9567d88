"""The Triton backend with the tiles that only PYFUSED_AUTOTUNE=1 would choose, and with chunks of a few rows: they
compute the same."""

import importlib

import pytest
import torch
from accuracy import check_gradients
from cases import CASES
from test_forward import test_forward as check_outputs

from pyfused.ops.linear_chunks import chunk_buffer

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


CHUNKED = {
    "linear_cross_entropy": ("mean", "sum", "none", "options", "z_loss", "probabilities"),
    "in_batch_cross_entropy": ("hits", "few-hits", "temperature", "bias-log-q"),
}
OF_CHUNKS = [case for case in CASES if case.name in CHUNKED.get(case.op, ())]
KINDS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("variant", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(c, KINDS[i % 3], id=f"{c.id}-{KINDS[i % 3]}") for i, c in enumerate(OF_CHUNKS)]
)
def test_chunks(case, variant, kind, monkeypatch):
    """Real ones have 1024 rows and more."""
    page, chunks = importlib.import_module(f"pyfused.backends.triton.{case.op}"), []
    original = page._chunk

    def few_rows(*args):
        whole = original(*args)
        chunks.append(chunk_buffer(whole, *whole.shape, 4))
        assert len(chunks[-1]) < len(whole)
        return chunks[-1]

    monkeypatch.setattr(page, "_chunk", few_rows)
    check_outputs(case, variant, kind)
    check_gradients(case, variant, kind)
    assert chunks


ODD = ("all_rows", "channels_last_many", "masked_first_rows", "masked_nan_rows", "probabilities_rows", "softcap_rows",
       "smoothing_rows_weight")  # fmt: skip
OF_ODD_ROWS = [case for case in CASES if case.op == "cross_entropy" and case.name in ODD]


@pytest.mark.parametrize("variant", ["triton"], indirect=True)
@pytest.mark.parametrize("case", OF_ODD_ROWS, ids=lambda c: c.id)
def test_rows_that_begin_within_a_vector(case, variant, monkeypatch):
    """Some blocks begin before their row, some end after it, some lie within it."""
    page, units = importlib.import_module("pyfused.backends.triton.cross_entropy"), []
    original = page._tile

    def tile(*args):
        units.append(original(*args))
        return units[-1]

    monkeypatch.setattr(page, "tiles", lambda *args: [(1, 16, 4)])
    monkeypatch.setattr(page, "_tile", tile)
    kind = (torch.float32, torch.bfloat16)[OF_ODD_ROWS.index(case) % 2]
    check_outputs(case, variant, kind)
    check_gradients(case, variant, kind)
    assert {tile["UNIT"] for tile in units} == {8}


def test_the_cases_are_there():
    assert len(OF_ODD_ROWS) == len(ODD)
    assert len(SOME) == sum(map(len, NAMES.values()))
    assert len(OF_CHUNKS) == sum(map(len, CHUNKED.values()))
