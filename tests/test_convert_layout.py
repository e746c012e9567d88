"""convert_layout: between contiguous and channels_last, on every instruction set."""

import pytest
import torch

_C = pytest.importorskip("pyfused._C")
pytestmark = pytest.mark.usefixtures("isa")
CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(
    "shape",
    [(2, 32, 8, 16), (1, 17, 5, 7), (3, 1, 4, 5), (2, 6, 1, 1), (1, 3, 9, 67), (0, 4, 3, 3), (1, 64, 33, 31)],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_both_ways(shape, dtype, threads):
    g = torch.Generator().manual_seed(0)
    x = (255 * torch.rand(shape, generator=g)).to(dtype)
    last = torch.zeros_like(x, memory_format=CHANNELS_LAST)
    _C.convert_layout(last, x, threads)
    assert torch.equal(last, x)
    back = torch.zeros_like(x, memory_format=torch.contiguous_format)
    _C.convert_layout(back, last, threads)
    assert torch.equal(back, x)


def test_bits_are_kept():
    x = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")]).repeat(40).view(1, 10, 4, 4)
    last = torch.zeros_like(x, memory_format=CHANNELS_LAST)
    _C.convert_layout(last, x, 1)
    assert torch.equal(last.contiguous().view(torch.int32), x.view(torch.int32))


def test_arguments_are_checked():
    x = torch.zeros(2, 3, 4, 5)
    for out in (torch.zeros(2, 3, 5, 4), x.clone(), x.double(), x.half()):
        source = x if out.dtype == x.dtype else x.to(out.dtype) if out.dtype == torch.half else x
        with pytest.raises(ValueError, match="convert_layout: out:"):
            _C.convert_layout(out, source, 1)
