"""pyfused.fuse: the model computes what it did, is what it was, and every decision is told."""

import copy
import gc
import pickle
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from architectures import ARCHITECTURES, Block, LanguageModel, ResNet, loss_of
from torch import nn

import pyfused
from pyfused.fusion import convolved, head, losses, measure, search, verify
from pyfused.fusion.trace import CannotTrace, Signature, graph_of, install

pytestmark = pytest.mark.usefixtures("fused_wins")


def fused(model, example, **options):
    return pyfused.fuse(model, example, verbose=False, **options)


def rows(model):
    return {row.place: row for row in pyfused.fuse_report(model).rows}


def steps(model, example, count=3):
    """Losses and gradients of `count` optimizer steps."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(model(*example))
        loss.backward()
        found.append(
            {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
        optimizer.step()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_training_is_the_same(architecture):
    """Three steps against float64: losses and every gradient as good as the unfused model's."""
    torch.manual_seed(0)
    eager = architecture.make()
    swapped, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    example, example64 = architecture.example(torch.float32), architecture.example(torch.float64)
    fused(swapped, example)
    assert sorted(r.pattern for r in pyfused.fuse_report(swapped).fused) == sorted(architecture.patterns)
    for e, s, truth in zip(steps(eager, example), steps(swapped, example), steps(exact, example64)):
        usual = max(t.abs().max().item() for t in truth.values())
        for name, t in truth.items():
            eager_error, fused_error = ((x[name].double() - t).abs().max().item() for x in (e, s))
            # 1e-4: what a Winograd layer may lose and later steps and layers amplify.
            allowed = 4 * eager_error + 1e-4 * t.abs().max().item() + 1e-6 * usual
            assert fused_error <= allowed, f"{name}: {fused_error:.1e}, eager {eager_error:.1e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_inference_is_the_same(architecture):
    torch.manual_seed(0)
    model = architecture.make().eval()
    example = architecture.example(torch.float32)
    with torch.no_grad():
        expected = model(*example)
        fused(model, example, mode="inference")
        got = model(*example)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert pyfused.fuse_report(model).error is not None or not pyfused.fuse_report(model).fused


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_model_stays_what_it_is(architecture):
    torch.manual_seed(0)
    model = architecture.make()
    example = architecture.example(torch.float32)
    before = {name: (id(p), p.clone()) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    keys, kind, random = list(model.state_dict()), type(model), torch.get_rng_state()
    flags = [m.training for m in model.modules()]
    assert fused(model, example) is model
    assert list(model.state_dict()) == keys
    assert isinstance(model, kind) and repr(model) == repr(pyfused.unfuse(copy.deepcopy(model)))
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and not m._forward_pre_hooks for m in model.modules() for p in m.parameters())
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        assert before[name][0] == id(p) and torch.equal(before[name][1], p)
    pyfused.unfuse(model)
    assert type(model) is kind and all("pyfused" not in repr(type(m).__mro__) for m in model.modules())
    with pytest.raises(ValueError, match="has not been fused"):
        pyfused.fuse_report(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_copies_are_fused_too(architecture, how):
    torch.manual_seed(0)
    model = architecture.make()
    example = architecture.example(torch.float32)
    fused(model, example)
    twin = how(model)
    assert [type(m)._pyfused_base for m in twin.modules() if hasattr(m, "_pyfused_plan")]
    assert all(a is not b for a, b in zip(model.parameters(), twin.parameters()))
    for a, b in zip(steps(model, example, 1), steps(twin, example, 1)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    pyfused.unfuse(twin)
    assert type(twin) is type(pyfused.unfuse(model))


# --- Decisions
def test_only_winners_are_kept(monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: [1.0, 0.99])
    model = ARCHITECTURES[1].make()
    fused(model, ARCHITECTURES[1].example(torch.float32))
    report = pyfused.fuse_report(model)
    assert not report.fused and len(report.rows) == 3 and is_documented(report.rows[0].reason)
    assert all("not faster here: 1.01" in row.reason for row in report.rows)
    assert type(model) is nn.Sequential


def test_training_decides_in_train_mode(monkeypatch):
    answers = iter([[3.0, 1.0], [1.0, 2.0]])  # forward wins, forward + backward loses
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: next(answers))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    fused(model, torch.randn(2, 3, 8, 8))
    (row,) = pyfused.fuse_report(model).rows
    assert (row.forward, row.training, row.fused) == (3.0, 0.5, False)


def test_nothing_is_timed_twice(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: calls.append(1) or [2.0, 1.0])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x, wider = (torch.randn(2, 3, 8, w).contiguous(memory_format=torch.channels_last) for w in (8, 9))
    fused(model, x)
    fused(model, x)
    assert len(calls) == 2  # forward, and forward + backward
    fused(model, wider)
    assert len(calls) == 4
    monkeypatch.setattr(measure, "_processor", lambda: "another one")
    fused(model, x)
    assert len(calls) == 6


@pytest.mark.parametrize(
    "change",
    [
        ("_processor", measure, lambda: "another one"),
        ("__version__", torch, "99.0"),
        ("__version__", pyfused, "99.0"),
        ("get_num_threads", torch, lambda: 99),
        ("_forced", pyfused.dispatch, "reference"),
        ("is_autocast_enabled", torch, lambda device: device == "cuda"),
        ("benchmark", type(torch.backends.cudnn), True),  # not of the module: its flags may be frozen
        ("conv", torch.backends.cudnn, SimpleNamespace(fp32_precision="tf32")),
        ("matmul", torch.backends.cuda, SimpleNamespace(fp32_precision="tf32")),
    ],
    ids=lambda c: c[0],
)
def test_times_are_kept_per_machine_and_version(change, monkeypatch):
    name, owner, value = change
    calls = []
    monkeypatch.setattr(measure, "seconds", lambda eager, fused: calls.append(1) or [2.0, 1.0])
    key = "a call"
    measure.times_of(key, None, None, [], False)
    measure.times_of(key, None, None, [], False)
    assert len(calls) == 1
    monkeypatch.setattr(owner, name, value)
    measure.times_of(key, None, None, [], False)
    assert len(calls) == 2


def test_times_are_kept_per_shape_dtype_stride_and_gradient():
    x = torch.zeros(2, 3, 4, 4)
    others = (x[:1], x.double(), x.to(memory_format=torch.channels_last), x.clone().requires_grad_(), 1, 2.0, "same")
    assert len({measure.describe(y) for y in (x, *others)}) == len(others) + 1
    assert measure.describe(x) == measure.describe(torch.ones_like(x))


def test_a_cache_that_cannot_be_written_or_read_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    fused(model, x)
    assert pyfused.fuse_report(model).fused
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure.cache_file().parent.mkdir()
    measure.cache_file().write_text("{half a file")
    fused(model, x)
    assert pyfused.fuse_report(model).fused and measure._read()


def test_verification_undoes_what_is_wrong(monkeypatch):
    monkeypatch.setattr(losses.functional, "cross_entropy", lambda input, *a: input.square().mean())
    model = LossInside()
    fused(model, (torch.randn(4, 6), torch.tensor([0, 1, 2, 3])))
    report = pyfused.fuse_report(model)
    assert not report.fused and "Everything was undone: " in report.notes[-1] and type(model) is LossInside
    assert "did not pass verification" in str(report)


def test_what_is_zero_but_for_rounding_is_measured_by_its_like():
    """The running mean of a norm behind another and a convolution without bias: EfficientNets have such."""
    before = {"buffer a.running_mean": torch.tensor([0.1, -0.1]), "buffer b.running_mean": torch.tensor([1e-9, 1e-9])}
    after = before | {"buffer b.running_mean": -before["buffer b.running_mean"]}
    assert 0 < verify.compare(before, after, 1e-3)[1] < 1e-3
    only = {"buffer b.running_mean": before["buffer b.running_mean"], "buffer table": torch.tensor([1e3])}
    assert verify.compare(only, only | {"buffer b.running_mean": torch.zeros(2)}, 1e-3)[1:] == (
        1,
        "buffer b.running_mean",
    )


def test_tensors_are_compared_piece_by_piece(monkeypatch):
    """Wherever the pieces end: the same error, and infinite what is finite elsewhere."""
    expected, off = torch.arange(10.0), torch.zeros(10)
    expected[4], off[[2, 9]] = torch.inf, torch.tensor([3.0, 4.0])
    error = 5 / expected[expected.isfinite()].norm().item()
    elsewhere = torch.where(torch.arange(10) == 8, torch.nan, expected)
    for piece in (1, 3, 10, 64):
        monkeypatch.setattr(verify, "PIECE", piece)
        found = verify.compare({"output 0": expected}, {"output 0": expected + off}, 1.0)
        assert found[:2] == pytest.approx((error, error)) and found[2] == "output 0"
        for wrong in (elsewhere, expected[:9]):
            assert verify.compare({"output 0": expected}, {"output 0": wrong}, 1.0)[0] == float("inf")


def test_gradients_may_take_other_branches_in_float32():
    before = {name: torch.ones(2, dtype=torch.float64) for name in ("output 0", "gradient of w")}
    for tolerance, allowed in ((1e-3, 1e-2), (1e-9, 1e-9), (1e-1, 1e-1)):
        for name, off, most in (("output 0", 1.5 * tolerance, tolerance), ("gradient of w", 1.5 * allowed, allowed)):
            within, beyond = (
                verify.compare(before, before | {name: before[name] + x}, tolerance)[0] for x in (off / 2, off)
            )
            assert within < 1 < beyond and verify.allowance(name, tolerance) == most


def test_gradients_may_differ_as_much_as_nudged_inputs_make_them():
    """In float32; twice that, but no more than a tenth. Outputs may not."""
    own = {"output 0": 0.03} | {
        f"gradient of {n}": x for n, x in zip("wvutn", (0.03, 0.001, 0.3, torch.inf, torch.nan))
    }
    before = {name: torch.ones(2) for name in own}
    for name, allowed in zip(own, (1e-3, 0.06, 1e-2, 1e-1, 1e-2, 1e-2)):
        for off, fits in ((0.9 * allowed, True), (1.1 * allowed, False)):
            assert (verify.compare(before, before | {name: before[name] + off}, 1e-3, own)[0] <= 1) == fits
    assert verify.allowance("gradient of w", 1e-9, own) == 1e-9


@pytest.mark.parametrize("precision", ["tf32", "none"])
def test_float32_is_verified_as_float32(precision):
    """Not as TF32, which would have to be allowed what it loses."""
    products, seen = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append([p.fp32_precision for p in products])
            return super().forward(x)

    with emulated.float32_as(products[0], precision), emulated.float32_as(products[1], precision):
        verify.results(Model(3, 4), (torch.randn(2, 3),), {}, True)
        assert seen == [["ieee", "ieee"]] and [p.fp32_precision for p in products] == [precision, precision]


def test_models_that_refuse_nudged_inputs_are_verified_all_the_same():
    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            if (x != x.round()).any():
                raise ValueError("whole numbers only")
            return F.relu(self.conv(x))

    model = Exact()
    before = {name: b.clone() for name, b in model.state_dict().items()}
    fused(model, torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8))
    assert pyfused.fuse_report(model).fused and pyfused.fuse_report(model).error is not None
    assert all(torch.equal(b, before[name]) for name, b in model.state_dict().items())


def test_models_without_numbers_to_nudge_are_not_run_for_it(monkeypatch):
    monkeypatch.setattr(search, "differences", lambda *_: pytest.fail("compared with itself"))
    model, tokens = LanguageModel(), torch.randint(40, (3, 7))
    fused(model, (tokens, tokens))
    assert pyfused.fuse_report(model).fused


def test_what_a_forward_that_is_no_graph_did_to_the_module_is_undone():
    """While it is traced its tensors are placeholders; none may stay behind in a buffer, a list, a dict or a set."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.seen, self.named, self.kinds = conv(), [], {}, set()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            self.named["x"] = x
            self.kinds.add(type(x))
            return F.relu(self.conv(x)) if x.sum() > 0 else x

    model = Writes()
    with pytest.raises(CannotTrace, match="control flow"):
        graph_of(model, Writes, Signature.of(Writes.forward, model, (torch.ones(2, 3, 8, 8),), {}))
    assert torch.equal(model.calls, torch.zeros(())) and not model.seen and not model.named and not model.kinds


def test_nudged_inputs():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    ids = torch.arange(3)
    args, kwargs = verify.nudged(((x, ids), {"half": x.detach().half(), "name": "x"}))
    change = (args[0] - x).abs() / x.abs()
    assert 0.5e-5 < change.max() < 1.1e-5 and args[0].stride() == x.stride()
    assert args[0].is_leaf and args[0].requires_grad and args[1] is ids and kwargs["name"] == "x"
    assert kwargs["half"].dtype == torch.float16


class LossInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x, y):
        return F.cross_entropy(x * self.scale, y)


# --- Reasons
def conv(*args, **kwargs):
    return nn.Conv2d(3, 4, 3, *args, **kwargs)


class Custom(nn.Conv2d):
    pass


def with_hook():
    module = conv()
    module.register_forward_hook(lambda *a: None)
    return module


def functional(body):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return body(self, x)

    return Functional


class NoGraph(nn.Module):
    def __init__(self, conv, activation=F.relu):
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x):
        return self.activation(self.conv(x)) if x.sum() > 0 else x


class Remembers(NoGraph):
    def forward(self, x):
        self.last = x
        return self.activation(self.conv(x))


def circular():
    return conv(padding=1, padding_mode="circular")


REASONS = {
    "no relu": (lambda: nn.Sequential(conv(), nn.Sigmoid()), "Sigmoid follows, which is not fused"),
    "returned": (lambda: nn.Sequential(conv()), "its output is what the module returns"),
    "subclass": (lambda: nn.Sequential(Custom(3, 4, 3), nn.ReLU()), "Custom is a subclass of Conv2d"),
    "padding mode": (lambda: nn.Sequential(conv(padding=1, padding_mode="circular"), nn.ReLU()), "padding_mode is"),
    "hook": (lambda: nn.Sequential(with_hook(), nn.ReLU()), "the Conv2d has hooks"),
    "weight_norm": (lambda: nn.Sequential(nn.utils.weight_norm(conv()), nn.ReLU()), "the Conv2d has hooks"),
    "parametrised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU()),
        "the Conv2d is parametrised",
    ),
    "batch norm": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()),
        "BatchNorm2d stands before the activation",
    ),
    "pool indices": (
        functional(lambda self, x: F.max_pool2d(self.conv(x), 2, return_indices=True)[0].relu()),
        "follows, which is not fused",
    ),
    "padded pool": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2, padding=1), nn.ReLU()), "MaxPool2d has padding=1"),
    "ceil": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()), "MaxPool2d has ceil_mode=True"),
    "dilated pool": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2, dilation=2), nn.ReLU()), "MaxPool2d has dilation=2"),
    "used twice": (functional(lambda self, x: (lambda y: F.relu(y) + y)(self.conv(x))), "used in several places"),
    "inplace afterwards": (functional(lambda self, x: (lambda y: (F.relu_(y), y)[1])(self.conv(x))), "several places"),
    "after addition": (functional(lambda self, x: F.relu(self.conv(x) + 1)), "add follows, which is not fused"),
    "addition alone": (
        functional(lambda self, x: torch.sigmoid(self.conv(x) + self.one)),
        "an addition follows, and then sigmoid follows",
    ),
    "residual of the wrong kind": (functional(lambda self, x: F.relu(torch.add(self.conv(x), 1.0))), "add follows"),
    "added twice": (functional(lambda self, x: F.relu(torch.add(self.one, self.conv(x), alpha=2))), "add follows"),
    "pool before GELU": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.GELU()),
        "MaxPool2d follows, and then GELU follows, which is not fused",
    ),
    "no graph": (lambda: NoGraph(circular()), "is not one graph"),
    "no graph and no activation": (lambda: NoGraph(conv(), torch.sigmoid), "sigmoid reads its output"),
    "attribute": (lambda: Remembers(circular()), "it changes or makes attributes: last"),
    "unused": (functional(lambda self, x: x), "it is not called with these inputs"),
}


def is_documented(reason):
    """Whether docs/why-not-fused.md has a line for it; … there stands for anything."""
    page = Path(__file__).parents[1] / "docs" / "why-not-fused.md"
    lines = [line.split(" | ")[0] for line in page.read_text().splitlines() if line.startswith("| `")]
    phrases = [phrase for line in lines for phrase in re.findall("`([^`]+)`", line)]
    return any(re.fullmatch(".*".join(map(re.escape, phrase.split("…"))), reason) for phrase in phrases)


@pytest.mark.parametrize("make, reason", REASONS.values(), ids=REASONS)
def test_reasons(make, reason):
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 8, 8).abs()
    model.register_parameter("one", nn.Parameter(torch.ones(())))
    expected = model(x)
    attributes = set(vars(model))
    fused(model, x)
    (row,) = pyfused.fuse_report(model).rows
    told = row.note if row.fused else row.reason  # where the convolution alone is replaced
    assert reason in told and is_documented(told) and (row.pattern == "conv2d" or not row.fused)
    assert set(vars(model)) - attributes == {"_pyfused_report"}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: F.relu(x, inplace=True), lambda x: x.__imul__(2)])
def test_a_convolution_is_not_moved_past_what_may_write_to_its_input(write):
    model = functional(lambda self, x: (lambda y, x: F.relu(y))(self.conv(x), write(x)))()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = F.relu(model.conv(x))
        fused(model, x.clone(), mode="inference")
        (row,) = pyfused.fuse_report(model).rows
        assert "which runs between its parts, may write to a tensor" in row.reason
        torch.testing.assert_close(model(x.clone()), expected)


def test_a_pool_that_cannot_join_is_left_behind_the_fused_call():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    fused(model, torch.randn(2, 3, 8, 8))
    (row,) = pyfused.fuse_report(model).rows
    assert row.pattern == "conv2d + relu" and row.fused and row.note == "MaxPool2d has padding=1"


def test_quantised_convolutions_are_named():
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of PyTorch has no quantised engine")
    model = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.quantize_per_tensor(torch.randn(2, 3, 8, 8), 0.1, 0, torch.quint8)
    fused(model, x, mode="inference")
    (row,) = pyfused.fuse_report(model).rows
    assert "is not torch.nn.Conv2d" in row.reason


def test_uninitialised_models_are_left_alone():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    fused(model, torch.randn(2, 3, 8, 8))
    assert "uninitialised" in pyfused.fuse_report(model).notes[0] and type(model[0]) is nn.LazyConv2d


def test_sharded_models_are_left_alone():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = dist.fsdp.fully_shard(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        fused(model, torch.randn(2, 3, 8, 8))
        assert "sharded" in pyfused.fuse_report(model).notes[0]
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    finally:
        dist.destroy_process_group()


# --- What the trace took for granted is checked at each call
def test_hooks_of_later_run():
    model, x, seen = nn.Sequential(conv(), nn.ReLU()), torch.randn(2, 3, 8, 8), []
    fused(model, x)
    handle = model[0].register_forward_hook(lambda *a: seen.append(1))
    model(x)
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_parametrizations_of_later_count():
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(), nn.ReLU()), torch.randn(2, 3, 8, 8)
    fused(model, x)
    nn.utils.parametrizations.spectral_norm(model[0])
    model.eval()
    torch.testing.assert_close(model(x), F.relu(F.conv2d(x, model[0].weight, model[0].bias)))


def test_training_flags_count():
    """Dropout by flag, and BatchNorm that is back in training."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[0]
    model, (x,) = architecture.make(), architecture.example(torch.float32)
    fused(model, x)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    model = Block(4, norm=True).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 4, 8, 8)
    fused(model, x, mode="inference")
    assert pyfused.fuse_report(model).fused
    for m in (model, plain):
        m.train()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.bn1.running_var, plain.bn1.running_var)


def test_other_arguments_run_the_models_own_code():
    model = ARCHITECTURES[9].make()
    user, item, target = ARCHITECTURES[9].example()
    fused(model, (user, item, target))
    plain = pyfused.unfuse(copy.deepcopy(model))
    for args, kwargs in (((user, item), {}), ((user, item[:, 0]), {}), ((user,), {"item": item, "target": target})):
        torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))


def test_other_shapes_of_embeddings_are_as_eager():
    """sum(1) is not over the last dimension for ids [B, L], and ids that broadcast are no pairs."""
    model = ARCHITECTURES[8].make()
    user, item = ARCHITECTURES[8].example()
    fused(model, (user, item))
    plain = pyfused.unfuse(copy.deepcopy(model))
    torch.testing.assert_close(model(user[:1], item), plain(user[:1], item))


class Projection(nn.Module):
    """A residual block whose shortcut is a convolution, too; Identity where others have dropout."""

    def __init__(self):
        super().__init__()
        self.body, self.shortcut = (nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Identity()) for _ in range(2))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def test_of_two_convolutions_that_are_added_one_has_the_addition():
    torch.manual_seed(0)
    model, x = Projection().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    fused(model, x, mode="inference")
    found = rows(model)
    assert found["body.0"].pattern == "conv2d + batch_norm + add + relu"
    assert found["shortcut.0"].pattern == "conv2d + batch_norm" and found["shortcut.0"].fused
    assert is_documented(found["shortcut.0"].note)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Listed(nn.Module):
    """Sequentials that no Sequential holds: in a list, in a dict, and in a module that is not called itself."""

    def __init__(self):
        super().__init__()
        block = lambda c_in: nn.Sequential(nn.Conv2d(c_in, 4, 3), nn.ReLU())  # noqa: E731
        self.blocks, self.named = nn.ModuleList([block(3), block(4)]), nn.ModuleDict({"last": block(4)})
        self.holder = nn.Identity()
        self.holder.block = block(4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.holder.block(self.named["last"](x)).mean((2, 3))


class InContext(nn.Module):
    """Two blocks, the first of which runs in a context that a graph of forward would not show."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.second(self.run(self.first, x).float() + x[..., 1:-1, 1:-1])


def without_grad(block, x):
    with torch.no_grad():
        return block(x)


def in_autocast(block, x):
    with torch.autocast("cpu", torch.bfloat16):
        return block(x)


def checkpointed(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


def offloaded(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block(x)


@pytest.mark.parametrize("run", [without_grad, in_autocast, checkpointed, offloaded], ids=lambda f: f.__name__)
def test_contexts_within_a_forward_stay(run):
    """The forward itself is no graph; what runs in the context is a module with a graph of its own."""
    torch.manual_seed(0)
    model, x = InContext(run), torch.randn(2, 3, 12, 12)
    eager = copy.deepcopy(model)
    fused(model, x)
    report = pyfused.fuse_report(model)
    assert [row.place for row in report.fused] == ["first.0", "second.0"] and not report.notes
    calls = []
    model.first.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    for m in (model, eager):
        m(x).square().sum().backward()
    assert calls == {without_grad: [False], checkpointed: [True, True]}.get(run, [True])
    rtol = 2e-2 if run is in_autocast else 1e-4
    for p, q in zip(model.parameters(), eager.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_blocks_in_lists_are_found_once(mode):
    torch.manual_seed(0)
    model, x = Listed(), torch.randn(2, 3, 12, 12)
    expected = model(x)
    fused(model, x, mode=mode)
    places = [row.place for row in pyfused.fuse_report(model).rows]
    assert places == ["blocks.0.0", "blocks.1.0", "named.last.0", "holder.block.0"]
    assert len(pyfused.fuse_report(model).fused) == 4
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_folded_batch_norm_follows_its_tensors():
    torch.manual_seed(0)
    model = nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    fused(model, x, mode="inference")
    assert pyfused.fuse_report(model).fused
    with torch.no_grad():
        first = model(x)
        model[1].running_mean.add_(1)
        assert not torch.equal(model(x), first)
        model.load_state_dict({k: v.clone() + 0.1 for k, v in model.state_dict().items()})
        torch.testing.assert_close(model(x), pyfused.unfuse(copy.deepcopy(model))(x))
        model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        torch.testing.assert_close(model(x), pyfused.unfuse(copy.deepcopy(model))(x))
    model(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pyfused.unfuse(model)(x).sum().backward()
    for a, b in zip(got, model.parameters()):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-4)


def test_without_example_the_first_call_is_one():
    model, x = nn.Sequential(conv(), nn.ReLU()), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fused(model, None) is model and type(model) is nn.Sequential
    torch.testing.assert_close(model(x), expected)
    assert pyfused.fuse_report(model).fused and not model._forward_pre_hooks
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_modes():
    with pytest.raises(ValueError, match="mode must be"):
        pyfused.fuse(nn.ReLU(), torch.randn(1), mode="eval")
    model = nn.Sequential(conv(), nn.ReLU()).eval()  # training is asked for, so it is what is measured
    fused(model, torch.randn(2, 3, 8, 8))
    assert not model.training and pyfused.fuse_report(model).rows[0].training == 2.0


def test_the_report_prints(capsys):
    torch.manual_seed(0)
    pyfused.fuse(ResNet(True), torch.randn(2, 3, 32, 32))
    assert "candidates fused" in capsys.readouterr().out


# --- Convolutions in forwards that are no graph
class Branches(nn.Module):
    """Two convolutions of rows whose forward looks at sizes; `between` stands between the first and its activation."""

    def __init__(self, between=lambda y: y, activation=F.gelu):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 3, stride=2)
        self.between, self.activation = between, activation

    def forward(self, x):
        if x.shape[-1] < 4 or x.isnan().any():
            raise ValueError("too short, or not a number")
        return F.silu(self.conv2(self.activation(self.between(self.conv1(x)))))


@pytest.mark.parametrize("lazily", [False, True], ids=["now", "lazily"])
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fuse_is_called_where_there_are_no_gradients(context, mode, lazily):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()).train(mode == "train")
    plain = copy.deepcopy(model)
    with context():
        x = torch.randn(2, 3, 8, 8)
        pyfused.fuse(model, None if lazily else x, mode=mode, verbose=False)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert all(row.fused for row in rows(model).values()) and len(rows(model)) == 2
    x = torch.randn(2, 3, 8, 8)
    for m in (model, plain):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_model_of_inference_tensors_is_left_alone():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
        before = model(x)
        pyfused.fuse(model, x, mode="inference", verbose=False)
        assert "inference_mode" in pyfused.fuse_report(model).notes[0]
        assert torch.equal(model(x), before)


SOUND = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("activation", [F.gelu, torch.relu, lambda y: F.leaky_relu(y, inplace=True), torch.Tensor.relu])
def test_convolutions_without_a_graph(activation, mode):
    torch.manual_seed(0)
    model = Branches(activation=activation)
    plain = copy.deepcopy(model)
    fused(model, (SOUND,), mode=mode)
    found = rows(model)
    assert found.keys() == {"conv1", "conv2"} and all(row.fused for row in found.values())
    assert found["conv2"].pattern == "conv1d + silu"
    for x in (SOUND, SOUND[..., :9], SOUND[0]):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    for m in (model, plain):
        m(SOUND).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    twin = pickle.loads(pickle.dumps(model.conv1))
    assert type(twin)._pyfused_base is nn.Conv1d and type(pyfused.unfuse(model).conv1) is nn.Conv1d
    torch.testing.assert_close(F.gelu(twin(SOUND)), F.gelu(plain.conv1(SOUND)))


@pytest.mark.parametrize(
    "between, reason",
    [
        (lambda y: y * 2, "mul reads its output"),
        (lambda y: y + F.gelu(y), "add reads its output"),
        (lambda y: (y.relu_(), y * 2)[1], "mul reads its output"),
        (lambda y: (F.silu(y, inplace=True), y * 2)[1], "mul reads its output"),
        (lambda y: y.transpose(1, 2).transpose(1, 2), "transpose reads its output"),
    ],
)
def test_what_else_reads_a_convolution(between, reason):
    torch.manual_seed(0)
    model = Branches(between)
    plain = copy.deepcopy(model)
    fused(model, (SOUND,))
    assert reason in rows(model)["conv1"].reason and rows(model)["conv2"].fused
    install(model.conv1, convolved.ConvPlan())  # also where fuse would not
    for m in (model, plain):
        m(SOUND).sum().backward()
    torch.testing.assert_close(model(SOUND), plain(SOUND))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_convolution_that_was_put_off_does_not_see_its_input_change():
    module, x = nn.Conv1d(4, 6, 3), SOUND.clone()
    install(module, convolved.ConvPlan())
    out = module(x)
    assert (out.shape, out.dtype, len(out)) == ((2, 6, 18), torch.float32, 2)
    x.add_(1)
    for read in (F.gelu, torch.sum):
        with pytest.raises(RuntimeError, match="were put off, and what they are computed from has changed"):
            read(out)


def test_bad_calls_of_convolutions_that_are_put_off_raise_what_they_did():
    module = nn.Conv1d(4, 6, 3)
    install(module, convolved.ConvPlan())
    for x in (SOUND[:, :3], SOUND[..., :2], SOUND[None, None]):
        with pytest.raises(RuntimeError):
            module(x)


def test_convolutions_that_are_put_off_under_autocast():
    torch.manual_seed(0)
    model = Branches()
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused(model, (SOUND,))
        assert rows(model)["conv1"].fused
        out = model.conv1(SOUND)
        got, expected = model(SOUND), plain(SOUND)
    assert got.dtype == expected.dtype and out.dtype == torch.bfloat16 == (out + 0).dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


# --- Heads
def test_logits_that_were_put_off_can_be_read():
    torch.manual_seed(0)
    model = LanguageModel()
    tokens, labels = torch.randint(40, (3, 7)), torch.randint(40, (3, 7))
    fused(model, (tokens, labels))
    plain = pyfused.unfuse(copy.deepcopy(model))
    out, expected = model(tokens, labels), plain(tokens, labels)
    assert type(out["logits"]).__name__ == "Deferred" and out["logits"].shape == (3, 7, 40)
    torch.testing.assert_close(out["logits"] * 2, expected["logits"] * 2)
    torch.testing.assert_close(out["loss"], expected["loss"])
    (out["loss"] + out["logits"].square().mean()).backward()
    (expected["loss"] + expected["logits"].square().mean()).backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert type(model(tokens, labels)["logits"]) is torch.Tensor
    assert type(model.eval()(tokens, labels)["logits"]) is torch.Tensor


def test_shifted_logits_that_were_put_off_can_be_read():
    """A view of a slice would raise without the contiguous() between them."""
    torch.manual_seed(0)
    weight = torch.randn(9, 4, requires_grad=True)
    shifted = head.defer(torch.randn(2, 5, 4), weight, None)[:, :-1].contiguous().view(-1, 9)
    expected = F.linear(shifted.rows, weight)
    F.cross_entropy(shifted, torch.randint(9, (8,))).backward()
    assert torch.equal(shifted.argmax(-1), expected.argmax(-1))


def test_logits_that_were_put_off_are_not_read_after_a_step():
    model = LanguageModel()
    tokens = torch.randint(40, (3, 7))
    fused(model, (tokens, tokens))
    out = model(tokens, tokens)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="were put off, and what they are computed from has changed"):
        out["logits"].sum()


class Head(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.head, self.between = nn.Linear(8, 12), between

    def forward(self, x, y):
        return F.cross_entropy(self.between(self.head(x)), y.flatten())


BETWEEN = {
    "nothing": (lambda z: z, True),
    "softcap": (lambda z: torch.tanh(z / 5.0) * 5.0, True),
    "other caps": (lambda z: torch.tanh(z / 5.0) * 4.0, False),
    "bias": (lambda z: z + torch.linspace(0, 1, 12).view(1, 12), True),
    "bias per row": (lambda z: z + torch.linspace(0, 1, 12 * 6).view(6, 12), False),
    "flatten": (lambda z: z.view(2, 3, 12).flatten(0, 1), True),
    "slice": (lambda z: z[:, :], True),
    "temperature": (lambda z: z / 5.0, False),
    "write": (lambda z: (z.__setitem__((slice(None), 0), 0.0), z)[1], False),
    "mask": (lambda z: z.masked_fill(z > 1, 0), False),
    "double": (lambda z: z.double(), False),
    "transposed": (lambda z: z.t().contiguous().t(), False),
}


@pytest.mark.parametrize("between, fusable", BETWEEN.values(), ids=BETWEEN)
def test_between_head_and_loss(between, fusable):
    torch.manual_seed(0)
    model, x, y = Head(between), torch.randn(6, 8), torch.randint(12, (6,))
    plain = copy.deepcopy(model)
    fused(model, (x, y))
    assert ("head" in rows(model)) == fusable
    install(model.head, head.HeadPlan())  # also where fuse would not
    for m in (model, plain):
        m(x, y).backward()
    torch.testing.assert_close(model(x, y), plain(x, y))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["model", "autocast", "autocast, logits.float()"])
def test_low_precision_heads(dtype, how):
    """The loss has the dtype and the precision that the unfused model gives it."""
    torch.manual_seed(0)
    model = Head((lambda z: z.float()) if how != "autocast" else lambda z: z)
    x, y = torch.randn(6, 8), torch.randint(12, (6,))
    if how == "model":
        model, x = model.to(dtype), x.to(dtype)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype, enabled=how != "model"):
        fused(model, (x, y))
        assert rows(model)["head"].fused
        got, expected = model(x, y), plain(x, y)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    got.backward()
    expected.backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-2, atol=3e-3)


# --- Calls that __torch_function__ does not see
class OwnLoss(torch.autograd.Function):
    """Cross-entropy as people write it themselves."""

    @staticmethod
    def forward(ctx, logits, labels):
        shares = logits.flatten(0, -2).softmax(-1)
        ctx.save_for_backward(shares, labels)
        ctx.shape = logits.shape
        return F.nll_loss(shares.log(), labels)

    @staticmethod
    def backward(ctx, grad):
        shares, labels = ctx.saved_tensors
        d_logits = (shares - F.one_hot(labels, shares.shape[-1])) * (grad / len(labels))
        return d_logits.reshape(ctx.shape), None


class PassesOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


OWN = {
    "logits": lambda z, y: OwnLoss.apply(z, y),
    "and another loss": lambda z, y: OwnLoss.apply(z, y) + F.cross_entropy(z, y),
    "read before": lambda z, y: z.sum() + OwnLoss.apply(z, y),
    "float, view": lambda z, y: OwnLoss.apply(z.float().view(2, 3, 12), y),
    "softcap": lambda z, y: OwnLoss.apply(torch.tanh(z / 5.0) * 5.0, y),
    "half a softcap": lambda z, y: OwnLoss.apply(torch.tanh(z / 5.0), y),
    "bias": lambda z, y: OwnLoss.apply(z + torch.linspace(0, 1, 12), y),
    "slice": lambda z, y: OwnLoss.apply(z[1:], y[1:]),
    "passed on": lambda z, y: F.cross_entropy(PassesOn.apply(z), y),
}


@pytest.mark.parametrize("loss", OWN.values(), ids=OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autograd_functions_of_logits_that_were_put_off(loss, dtype):
    torch.manual_seed(0)
    model, y = nn.Linear(8, 12), torch.randint(12, (6,))
    x = torch.randn(6, 8, requires_grad=True)
    plain = copy.deepcopy(model)
    install(model, head.HeadPlan())
    results = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(m(x), y)
        results.append([value, *torch.autograd.grad(value, [x, *m.parameters()])])
    tolerance = {"rtol": 2e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {}
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def test_autograd_functions_of_a_convolution_that_was_put_off():
    torch.manual_seed(0)
    model = nn.Conv1d(4, 6, 3)
    plain = copy.deepcopy(model)
    install(model, convolved.ConvPlan())
    for m in (model, plain):
        z = m(SOUND)
        (F.gelu(z).square().sum() + PassesOn.apply(z).sum()).backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_through_an_autograd_function_of_logits():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 12), torch.randn(6, 8, requires_grad=True)
    plain = copy.deepcopy(model)
    install(model, head.HeadPlan())
    results = []
    for m in (model, plain):
        (d_x,) = torch.autograd.grad(PassesOn.apply(m(x)).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(d_x.square().sum(), [x, m.weight]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_calls_below_autograd_on_logits_that_were_put_off():
    """They get the values, also those read before the weight changed; nothing may write to them."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 12), torch.randn(6, 8)
    install(model, head.HeadPlan())
    read, unread = model(x), model(x)
    expected = read + 0
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.neg(unread), -expected)
        with pytest.raises(RuntimeError, match="read it once before"):
            torch.neg_(unread)
    with torch.no_grad():
        model.weight.add_(1)
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.neg(read), -expected)
        with pytest.raises(RuntimeError, match="were put off, and what they are computed from has changed"):
            torch.neg(unread)


def test_backward_hooks_on_a_head_see_the_logits_gradient():
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 12), torch.randn(6, 8, requires_grad=True), torch.randint(12, (6,))
    plain, seen = copy.deepcopy(model), []
    install(model, head.HeadPlan())
    for m in (model, plain):
        m.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
        F.cross_entropy(m(x), y).backward()
    torch.testing.assert_close(*seen)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


def test_what_was_put_off_is_freed():
    """No cycle of references keeps the rows of a step until the garbage collector comes."""
    model, x = nn.Linear(8, 12), torch.randn(6, 8, requires_grad=True)
    install(model, head.HeadPlan())
    gc.disable()
    try:
        rows = x * 1
        gone, z = weakref.ref(rows), model(rows)
        F.cross_entropy(z.view(2, 3, 12).flatten(0, 1), torch.zeros(6, dtype=torch.int64)).backward()
        del rows, z
        assert gone() is None
    finally:
        gc.enable()
