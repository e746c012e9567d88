"""What is remembered of a weight: when it is used, when it must not be, and when it is let go."""

import gc
import threading

import pytest
import torch

import pyfused
from pyfused import memory

_C = pytest.importorskip("pyfused._C")
PF = pyfused.functional
CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def nothing_remembered():
    pyfused.empty_cache()
    yield
    pyfused.empty_cache()


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 14, 14, generator=g).to(memory_format=CHANNELS_LAST)
    return x, torch.nn.Parameter(torch.randn(64, 48, 3, 3, generator=g) / 20)


def twice(x, weight):
    """The second call is the one that remembers."""
    PF.conv2d_relu(x, weight, padding=1)
    return PF.conv2d_relu(x, weight, padding=1)


def fresh(x, weight):
    return PF.conv2d_relu(x, weight.detach().clone(), padding=1)


def test_remembers_at_the_second_sight_and_gives_the_same_bits(layer):
    x, weight = layer
    with torch.no_grad():
        first = PF.conv2d_relu(x, weight, padding=1)
        assert memory.derived_held() == 0
        second = PF.conv2d_relu(x, weight, padding=1)
        assert memory.derived_held() == 4 * 36 * (48 * 64 + 16)
        third = PF.conv2d_relu(x, weight, padding=1)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_a_remembered_transform_is_what_is_used(layer):
    """Spoil the remembered value: had the third call not used it, its result would not change."""
    x, weight = layer
    with torch.no_grad():
        out = twice(x, weight)
        next(iter(memory._derived.values())).value.zero_()
        assert not torch.equal(PF.conv2d_relu(x, weight, padding=1), out)


def test_implicit_gemm_remembers_its_packed_weight(layer):
    """A stride, and a weight that is larger than the maps; until it changes."""
    x, weight = layer
    with torch.no_grad():
        for factor in (1, -2):
            weight.mul_(factor)
            expected = torch.nn.functional.conv2d(x.double(), weight.double(), stride=2).relu()
            for held in (0, 4 * 4 * 9 * 48 * 16, 4 * 4 * 9 * 48 * 16):
                out = PF.conv2d_relu(x, weight, stride=2)
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
                assert memory.derived_held() == held


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "one element": lambda w: w[3, 5, 1, 1].add_(1),
    "behind the version's back": lambda w: w.data.mul_(-1),
    "one element behind its back": lambda w: w.data[63, 47, 2, 2].neg_(),
    "through NumPy": lambda w: w.detach().numpy().__imul__(3),
    "other memory": lambda w: setattr(w, "data", w.data * 2),
    "two elements swapped": lambda w: w.data[0, 0].copy_(w.data[0, 0].flip(0, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_never_served_what_was_remembered(layer, change):
    x, weight = layer
    with torch.no_grad():
        before = twice(x, weight)
        change(weight)
        for _ in range(3):
            out = PF.conv2d_relu(x, weight, padding=1)
            assert torch.equal(out, fresh(x, weight)) and not torch.equal(out, before)


def test_training_remembers_nothing(layer):
    x, weight = layer
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(3):
        PF.conv2d_relu(x, weight, padding=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert memory.derived_held() == 0


def test_training_behind_the_versions_back_is_left_alone_for_longer_and_longer():
    """torch.optim.Adam(fused=True) writes to the parameters without a new version."""
    source, made = torch.randn(2000), []

    def see():
        return memory.derived(source, "double", lambda: (made.append(1), source * 2)[1])

    for _ in range(1000):
        value = see()
        assert value is None or torch.equal(value, source * 2)
        source.data.add_(1)
    assert 10 < len(made) < 25
    values = [see() for _ in range(memory.LONGEST_REST + 2)]
    assert torch.equal(values[-1], source * 2) and torch.equal(see(), values[-1])


def test_a_new_weight_in_the_place_of_a_freed_one(layer):
    x, weight = layer
    with torch.no_grad():
        for seed in range(4):
            w = torch.nn.Parameter(weight + seed)
            assert torch.equal(twice(x, w), fresh(x, w))
            assert memory.derived_held() > 0
            del w
            gc.collect()
            assert memory.derived_held() == 0 and not memory._derived


def test_inference_mode(layer):
    x, weight = layer
    with torch.inference_mode():
        w = weight.clone()  # an inference tensor: it has no version
        before = twice(x, w)
        w.mul_(2)
        assert torch.equal(PF.conv2d_relu(x, w, padding=1), fresh(x, w)) and not torch.equal(before, fresh(x, w))


def test_a_constant_is_remembered_at_once_and_not_read_again(layer, monkeypatch):
    x, weight = layer
    weight = memory.constant(weight.detach().clone())
    expected = fresh(x, weight)
    monkeypatch.setattr(memory, "_fingerprint", None)
    assert torch.equal(PF.conv2d_relu(x, weight, padding=1), expected) and memory.derived_held() > 0
    next(iter(memory._derived.values())).value.zero_()
    assert not torch.equal(PF.conv2d_relu(x, weight, padding=1), expected)


def test_folded_norms_are_constants(layer):
    """In a fused model in eval mode; what they are folded from is known by its version."""
    from pyfused.fusion.conv import fold

    norm = torch.nn.BatchNorm2d(64).eval()
    given = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        folded, _ = fold(layer[1], None, *given)
        assert hasattr(folded, "_pyfused_constant") and fold(layer[1], None, *given)[0] is folded
        norm.weight.mul_(2)
        assert torch.equal(fold(layer[1], None, *given)[0], folded * 2)


def test_bounded_and_the_least_recently_used_goes_first(layer, monkeypatch):
    x, weight = layer
    size = 4 * 36 * (48 * 64 + 16)
    monkeypatch.setattr(memory, "DERIVED_LIMIT", 2 * size)
    weights = [torch.nn.Parameter(weight + i) for i in range(3)]
    with torch.no_grad():
        twice(x, weights[0])
        twice(x, weights[1])
        PF.conv2d_relu(x, weights[0], padding=1)
        twice(x, weights[2])
    assert memory.derived_held() == 2 * size
    remembered = [entry.source() for entry in memory._derived.values() if entry.value is not None]
    assert remembered[0] is weights[0] and remembered[1] is weights[2]


def test_empty_cache(layer):
    with torch.no_grad():
        twice(*layer)
    pyfused.empty_cache()
    assert memory.derived_held() == 0


def test_weights_with_gaps_and_small_ones_are_left_alone(layer):
    x, weight = layer
    with torch.no_grad():
        gaps = torch.zeros(64, 48, 3, 6)[..., ::2].copy_(weight)
        assert torch.equal(twice(x, gaps), fresh(x, weight))
        twice(x[:, :16].to(memory_format=CHANNELS_LAST), weight[:16, :16].clone())
    assert memory.derived_held() == 0


def test_threads_share(layer):
    x, weight = layer
    expected, failures = fresh(x, weight), []

    def run():
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(PF.conv2d_relu(x, weight, padding=1), expected):
                    failures.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def fingerprint(x, threads=1):
    out = torch.zeros(1, dtype=torch.int64)
    _C.fingerprint(out, x, threads)
    return out.item()


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("count", [0, 1, 7, 128, 1000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_sees_every_element(isa, count, dtype):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        x = torch.arange(float(count)).to(dtype)
        first = fingerprint(x)
        assert first == fingerprint(x.clone(), threads=3)
        for at in range(0, count, max(1, count // 97)):
            changed = x.clone()
            changed[at] = -changed[at] if at else 0.5
            assert fingerprint(changed) != first
        assert count < 2 or fingerprint(x.flip(0)) != first
        assert fingerprint(torch.cat([x, torch.zeros(1, dtype=dtype)])) != first
    finally:
        _C.set_isa(before)


def test_fingerprint_checks_its_arguments():
    with pytest.raises(ValueError, match="out"):
        _C.fingerprint(torch.zeros(2, dtype=torch.int64), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="input"):
        _C.fingerprint(torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), 1)
