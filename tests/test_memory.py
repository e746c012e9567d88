"""The cache of output memory: reuse, bounds, threads, and that its tensors are ordinary tensors."""

import copy
import pickle
import threading

import pytest
import torch

from pyfused import _binary, memory

pytestmark = pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))


@pytest.fixture(autouse=True)
def fresh_cache():
    memory.set_cache_limit(1 << 30)
    memory.empty_cache()
    yield
    memory.set_cache_limit(1 << 30)
    memory.empty_cache()


def test_small_tensors_stay_with_malloc():
    x = torch.empty(_binary._C.cache_smallest // 4 - 1)
    assert memory.cached(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_same_shape_strides_and_dtype(dtype):
    like = torch.empty(3, 16, 65, 67, dtype=dtype).to(memory_format=torch.channels_last)
    x = memory.cached(like)
    assert (x.shape, x.stride(), x.dtype, x.device) == (like.shape, like.stride(), like.dtype, like.device)
    x.fill_(3)
    assert (x == 3).all()


def test_another_shape_than_the_prototypes():
    like = torch.zeros(3, dtype=torch.bfloat16)
    x = _binary._C.cached_like(like, (2, 3, 100, 200), (60_000, 1, 600, 3))
    assert (x.shape, x.stride(), x.dtype) == ((2, 3, 100, 200), (60_000, 1, 600, 3), torch.bfloat16)
    x.fill_(3)
    assert (x == 3).all() and x.untyped_storage().nbytes() >= 240_000
    with pytest.raises(ValueError, match="a stride for each size"):
        _binary._C.cached_like(like, (2, 3), (3,))


def test_memory_is_reused_and_bounded():
    x = memory.cached(torch.empty(1000, 1000))
    address = x.data_ptr()
    del x
    held = memory.cache_held()
    assert 4_000_000 <= held <= 5_000_000
    y = memory.cached(torch.empty(990, 1000))  # the same size class
    assert y.data_ptr() == address and memory.cache_held() == 0
    memory.set_cache_limit(1_000_000)
    del y
    assert memory.cache_held() == 0, "a block over the limit goes back to the system"


def test_sizes_no_longer_asked_for_make_room():
    memory.set_cache_limit(9_000_000)
    old, kept = memory.cached(torch.empty(1000, 1000)), memory.cached(torch.empty(600, 1000))
    address = kept.data_ptr()
    del old, kept
    new = memory.cached(torch.empty(500, 1000))
    del new
    assert memory.cache_held() <= 9_000_000
    big = memory.cached(torch.empty(800, 2000))
    del big  # more than fits beside the others: the longest unused goes
    assert memory.cache_held() <= 9_000_000
    again = memory.cached(torch.empty(800, 2000))
    assert memory.cache_held() < 9_000_000 - 6_400_000 + 1 and again.data_ptr() != address


def test_empty_cache_gives_back():
    tensors = [memory.cached(torch.empty(1000, 1000)) for _ in range(3)]
    del tensors
    assert memory.cache_held() > 0
    memory.empty_cache()
    assert memory.cache_held() == 0


def test_views_keep_the_memory_alive():
    x = memory.cached(torch.empty(1000, 1000)).fill_(1)
    row = x[5]
    del x
    other = memory.cached(torch.empty(1000, 1000)).fill_(2)
    assert (row == 1).all() and (other == 2).all()


def test_tensors_are_ordinary():
    x = memory.cached(torch.empty(300, 300)).normal_().requires_grad_()
    (x * 2).sum().backward()
    assert (x.grad == 2).all()
    assert torch.equal(copy.deepcopy(x), x) and torch.equal(pickle.loads(pickle.dumps(x)), x)


def test_threads():
    errors = []

    def work(value):
        for _ in range(200):
            x = memory.cached(torch.empty(200, 200)).fill_(value)
            if not (x == value).all():
                errors.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="at least 0 bytes, got -1"):
        memory.set_cache_limit(-1)
