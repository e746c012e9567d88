"""The emulation of CUDA itself: each kind of bug is reported, a right kernel is not; and what needs the emulation."""

import contextlib
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import accuracy
import emulated
import pytest
import torch
from cases import CASES
from cuda_emulation import build

import pyfused
import pyfused.functional as PF

# In the order of the enum in cuda_emulation/planted.cu.
PLANTED = {
    "past_the_end": r"out of bounds: 4-byte read at planted\.cu:\d+ .* 4 bytes past the end of data",
    "misaligned": r"misaligned 16-byte read at common\.cuh",
    "unwritten_shared": r"uninitialised shared memory",
    "missing_barrier": r"race on shared memory|uninitialised shared memory",
    "divergent_barrier": r"barrier at planted\.cu:\d+ .*|divergent barrier",
    "early_exit": r"barrier at planted\.cu:\d+ reached by 63 of 64 threads; .* thread \(40, 0, 0\) had exited",
    "two_barriers": r"divergent barrier: threads of one block meet at planted\.cu:\d+ and at planted\.cu:\d+",
    "race_between_blocks": r"race on data",
    "lane_not_in_mask": r"lane \d+ is not in its own mask",
    "shared_index": r"array index out of bounds at planted\.cu",
    "missing_syncwarp": r"race on shared memory",
    "copy_not_waited_for": r"uninitialised shared memory",
    "unwritten_workspace": r"uninitialised workspace",
    "missing_fence": r"race on workspace",
    "overflow": r"signed overflow in \+ at planted\.cu",
}


def run_planted(bug: int, seed: int) -> None:
    module = emulated.cuda_module()
    module.set_seed(seed)
    module.planted(torch.ones(64), torch.empty(128, dtype=torch.float64), bug)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_reported(bug, seed):
    with pytest.raises(RuntimeError, match=PLANTED[bug]):
        run_planted(1 + list(PLANTED).index(bug), seed)


@pytest.mark.parametrize("seed", range(10))
def test_a_right_kernel_is_not_reported(seed):
    run_planted(0, seed)


def test_every_seeded_bug_still_applies():
    """mutations/ against the sources of today; whether each is caught is for mutate.py to run, an hour."""
    run = subprocess.run([sys.executable, build.HERE / "mutate.py", "--list"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def cuda():
    with emulated.cuda_on_cpu(), pyfused.use_backend("cuda"):
        yield


# --- Waiting for the device, which on a GPU would cost every step and forbid CUDA graphs
WAITING = {
    *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default),
    *(torch.ops.aten.index.Tensor, torch.ops.aten.lift_fresh.default),  # by a mask; torch.tensor(...)
    *(
        torch.ops.aten.repeat_interleave.Tensor,
        torch.ops.aten._unique2.default,
        torch.ops.aten.unique_consecutive.default,
    ),
    "copy_ of a number",
}


ALLOCATING = {
    *(torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)
}
# Whether the upstream gradient is 1, see _LinearCrossEntropy.backward.
ASKED_ON_CPU = {"linear_cross_entropy": {torch.ops.aten._local_scalar_dense.default}}


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """What is called in the block, and within our ops: their kernels' adapters run with the watch on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        if function is torch.ops.aten.copy_.default and not isinstance(args[1], torch.Tensor):
            self.seen.add("copy_ of a number")
        if function.namespace == "pyfused":
            with self:
                return pyfused.dispatch.pick(function.__name__.split(".")[0], args)(*args)
        return function(*args, **(kwargs or {}))


WATCHED = [c for i, c in enumerate(c for c in CASES if c.grad) if i % 2 == 0 or "empty" in c.id]


@pytest.mark.parametrize("case", WATCHED, ids=lambda c: c.id)
def test_nothing_waits_for_the_device(cuda, case):
    if "cuda" not in pyfused.dispatch.TABLE[case.op] or emulated.too_large(case):
        pytest.skip("no CUDA kernel, or too large to emulate")
    arguments = case.arguments(torch.float32)
    if arguments.get("sparse"):
        pytest.skip("the shape of a sparse gradient depends on the values")
    with Watch() as forward:
        outputs = accuracy.outputs_of(accuracy.public(case.op), arguments)
    wanted, ones = [arguments[name] for name in case.grad], [torch.ones_like(o) for o in outputs]
    with Watch() as backward:
        torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
    assert forward.seen & ALLOCATING, "the adapters are not watched"
    assert not forward.seen & WAITING
    assert not backward.seen & (WAITING - ASKED_ON_CPU.get(case.op, set()))


@pytest.mark.parametrize("forward, backward", [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("case", [c for c in CASES if c.grad][1::3], ids=lambda c: c.id)
def test_forward_and_backward_pair_with_the_cpu_backend(case, forward, backward):
    """What forward saves belongs to the op: the two backends write the same."""
    if "cuda" not in pyfused.dispatch.TABLE[case.op] or emulated.too_large(case):
        pytest.skip("no CUDA kernel, or too large to emulate")
    arguments = case.arguments(torch.float32)
    wanted = [arguments[name] for name in case.grad]
    with emulated.cuda_on_cpu():
        with pyfused.use_backend(forward):
            outputs = accuracy.outputs_of(accuracy.public(case.op), arguments)
        g = torch.Generator().manual_seed(1)  # as gradients_of does
        upstream = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outputs]
        with pyfused.use_backend(backward):
            got = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)

    for name, x, t, e, r in zip(case.grad, got, *accuracy.eager_gradients(case, torch.float32), strict=True):
        x = torch.zeros_like(e) if x is None else x
        accuracy.check(x, t, e, r, case.slack_for(torch.float32), f"{case.id} gradient of {name}")


# --- cross_entropy beyond the case table


LAYOUTS = [(6, 5), (6, 50), (3, 5000), (2, 5, 4), (2, 70, 4)]


def problem(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    return x, torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)


@pytest.mark.parametrize("bad", [-1, -101, 10**9, 2**40])
@pytest.mark.parametrize("shape", LAYOUTS)
def test_label_out_of_range(cuda, shape, bad):
    """Its row's loss is NaN and its gradient 0, the other rows are right, and the next call raises."""
    x, target = problem(shape)
    row = target.numel() // 2
    expected = PF.cross_entropy(x, target, reduction="none")
    target.view(-1)[row] = bad
    loss, lse = PF.cross_entropy(x, target, reduction="none", return_lse=True)
    assert loss.view(-1)[row].isnan() and lse.isfinite().all()
    others = torch.arange(target.numel()) != row
    assert torch.equal(loss.view(-1)[others], expected.view(-1)[others])
    with pytest.raises(
        IndexError, match=rf"target {bad} is out of bounds: target\[{row}\] must lie in \[0, {shape[1]}\)"
    ):
        pyfused.check_errors()
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    by_row = grad.movedim(1, -1).reshape(-1, shape[1])
    assert by_row.isfinite().all() and torch.equal(by_row.any(1), others)


def test_the_next_call_raises_without_being_asked(cuda):
    x, target = problem((6, 50))
    target[2] = 50
    PF.cross_entropy(x, target)
    target[2] = 0
    with pytest.raises(IndexError, match="target 50"):
        PF.cross_entropy(x, target)
    assert PF.cross_entropy(x, target).isfinite()


@pytest.mark.parametrize("shape", [(3000, 10), (40, 1000), (3, 5000), (2, 21, 20, 20), (2, 70, 12, 12), (5000, 3)])
def test_same_bits_in_any_order_of_threads(cuda, shape):
    x, target = problem(shape)
    seen = []
    for seed in range(3):
        emulated.cuda_module().set_seed(seed)
        loss = PF.cross_entropy(x, target)
        seen.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(cuda, shape, dtype):
    x, target = problem(shape, dtype)
    (expected,) = torch.autograd.grad(PF.cross_entropy(x, target), x)
    logits = x * 1
    PF.cross_entropy(logits, target, inplace=True).backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_rounded_and_not_truncated(cuda, dtype):
    """Truncation loses a third of a unit in the last place on average, rounding nothing."""
    x, target = problem((40, 50), dtype)
    (got,) = torch.autograd.grad(PF.cross_entropy(x, target), x)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(PF.cross_entropy(exact, target), exact)
    bias = (got.double().abs() - truth.abs()).sum() / truth.abs().sum()
    assert abs(bias) < 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_any_distance_from_16_bytes(cuda, offset, dtype):
    """Peeling: the same numbers wherever they lie."""
    x, target = problem((5, 67), dtype)
    memory = torch.zeros(5 * 75 + 8, dtype=dtype)
    moved = memory.as_strided((5, 67), (75, 1), offset).copy_(x.detach()).requires_grad_()
    loss, expected = PF.cross_entropy(moved, target), PF.cross_entropy(x, target)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, moved)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x)[0])


def test_offsets_beyond_32_bits(cuda):
    """Two rows 2^31 elements apart; the 4 GiB in between are never touched and so take no memory."""
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 50), (2**31, 1))
    x.copy_(torch.randn(2, 50))
    target = torch.tensor([3, 7])
    torch.testing.assert_close(PF.cross_entropy(x, target), PF.cross_entropy(x.contiguous(), target))


@pytest.mark.parametrize("shape", LAYOUTS)
def test_ignored_rows_keep_statistics(cuda, shape):
    """Though their logits are not read; any backend's backward may use them. The odds against no label are infinite."""
    x, target = problem(shape)
    target.fill_(-100)
    stats = torch.ops.pyfused.cross_entropy(x.detach(), target, None, False, 2, -100, 0.0, 0.0, 0.0)[2]
    assert stats[:2].isfinite().all() and stats[2].eq(torch.inf).all()


# --- embedding_dot and in_batch_cross_entropy beyond the case table
@pytest.mark.parametrize("bad", [-1, -2, 9, 2**40])
@pytest.mark.parametrize("argument", ["user", "item"])
@pytest.mark.parametrize("sparse", [False, True])
def test_id_out_of_range(cuda, argument, bad, sparse):
    """Its scores are NaN, no gradient comes from them, the others are right, and the next call raises."""
    tables = [torch.randn(9, 8).requires_grad_(), torch.randn(9, 8).requires_grad_()]
    biases = [torch.randn(9).requires_grad_(), torch.randn(9).requires_grad_()]
    given = {"user": torch.arange(6), "item": torch.arange(30).view(6, 5) % 9}
    given[argument].view(-1)[3] = bad
    scores = PF.embedding_dot(*given.values(), *tables, *biases, sparse=sparse)
    with pytest.raises(IndexError, match=rf"{argument} {bad} is out of bounds: {argument}\[3\] must lie in \[0, 9\)"):
        pyfused.check_errors()
    wrong = torch.zeros(6, 5, dtype=torch.bool)
    wrong.view(-1)[slice(15, 20) if argument == "user" else 3] = True
    assert torch.equal(scores.isnan(), wrong)
    upstream = torch.randn(6, 5)
    got = torch.autograd.grad(scores, tables + biases, upstream)
    good = {name: ids.where((ids >= 0) & (ids < 9), 0) for name, ids in given.items()}
    with pyfused.use_backend("reference"):
        expected = torch.autograd.grad(
            PF.embedding_dot(*good.values(), *tables, *biases), tables + biases, upstream.masked_fill(wrong, 0)
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(accuracy.densify(a), b)


@pytest.mark.parametrize("argument", [0, 1])
def test_in_batch_id_out_of_range(cuda, argument):
    ids = [torch.arange(6), torch.arange(6)]
    ids[argument][2] = 2**40
    with pytest.raises(IndexError, match=rf"{('user', 'item')[argument]} {2**40} .*\[2\]"):
        PF.in_batch_cross_entropy(*ids, torch.randn(9, 8), torch.randn(9, 8))  # of several kernels: raised between two


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_batch_chunks(cuda, monkeypatch, reduction):
    """Smaller ones than a GPU's, so that a small batch has several, the last one shorter."""
    adapter = pyfused.backends.cuda.in_batch_cross_entropy
    ids = [torch.randint(9, (100,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    tables = [torch.randn(9, 8).requires_grad_() for _ in range(2)]
    results = []
    for rows in (100, 33):
        monkeypatch.setattr(adapter, "_chunk", lambda table, batch: table.new_empty(rows, batch))  # noqa: B023
        loss = PF.in_batch_cross_entropy(*ids, *tables, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss.sum(), tables)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dim", [4, 24, 33, 130])
@pytest.mark.parametrize("terms", [1, 16, 17, 1024, 1025, 6000])
def test_hot_ids_in_both_stages(cuda, dim, terms):
    """Runs that begin and end within a group, a block and several blocks, exactly: sums of small integers."""
    g = torch.Generator().manual_seed(0)
    user = torch.cat([torch.full((terms,), 3), torch.randint(8, (50,), generator=g), torch.full((terms // 3,), 5)])
    user = user[torch.randperm(len(user), generator=g)]
    item = torch.randint(7, user.shape, generator=g)
    tables = [torch.randint(-4, 5, (n, dim), generator=g).float().requires_grad_() for n in (8, 7)]
    bias = torch.zeros(8, requires_grad=True)
    upstream = torch.randint(-4, 5, user.shape, generator=g).float()
    seen = []
    for seed in (1, 2):
        emulated.cuda_module().set_seed(seed)
        seen.append(torch.autograd.grad(PF.embedding_dot(user, item, *tables, bias), [*tables, bias], upstream))
    with pyfused.use_backend("reference"):
        seen.append(torch.autograd.grad(PF.embedding_dot(user, item, *tables, bias), [*tables, bias], upstream))
    for a, b, expected in zip(*seen, strict=True):
        assert torch.equal(a, b) and torch.equal(a, expected)


# --- embedding_dot with an optimizer
RULES = {"sgd": (0, 1), "adagrad": (1, 2), "rowwise_adagrad": (1, 2), "adam": (2, 4)}  # state tensors, numbers


def trained(rule, user, item, tables, grad, padding=(-1, -1)):
    """Copies of the tables and their state after one step; each table has numbers of its own."""
    tables, (states, numbers) = [copy.deepcopy(t) for t in tables], RULES[rule]
    state = [torch.zeros(t.shape[:1] if rule == "rowwise_adagrad" else t.shape) for t in tables for _ in range(states)]
    settings = [x / (1 + i) for i in range(len(tables)) for x in (0.5, 0.25, 0.125, 1.0)[:numbers]]
    given = (grad, user, item, *tables, state, list(padding), [True] * 4, rule, settings)
    torch.ops.pyfused.embedding_dot_update(*given)
    return [*tables, *state]


@pytest.mark.parametrize("dim", [4, 33, 264])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_has_the_same_bits_in_any_order_of_threads(cuda, rule, dim):
    """Runs within a group, a block and several blocks; the reference's step on the same numbers."""
    g = torch.Generator().manual_seed(0)
    user, item = torch.randint(8, (1500,), generator=g), torch.randint(7, (1500,), generator=g)
    user[:1100] = 3
    tables = [torch.randint(-4, 5, s, generator=g).float() for s in ((8, dim), (7, dim), (8,), (7,))]
    grad = torch.randint(-4, 5, user.shape, generator=g).float()
    seen = []
    for seed in (1, 2):
        emulated.cuda_module().set_seed(seed)
        with Watch() as watch:
            seen.append(trained(rule, user, item, tables, grad, padding=(2, 5)))
        assert not watch.seen & WAITING
    with pyfused.use_backend("reference"):
        expected = trained(rule, user, item, tables, grad, padding=(2, 5))
    for a, b, c in zip(*seen, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gaps", [0, 1])
def test_a_step_on_rows_that_are_not_16_byte_blocks(cuda, rule, gaps):
    """In one of the two tables, and numbers of a bias that are not adjacent."""
    tables = [torch.randn(9, 16), torch.randn(9, 16), torch.randn(9, 2)[:, 1], torch.randn(9, 1)]
    tables[gaps] = torch.randn(9, 17)[:, :16]
    given = (torch.arange(12) % 5, torch.arange(12) % 7, tables, torch.randn(12))
    got = trained(rule, *given)
    with pyfused.use_backend("reference"):
        expected = trained(rule, *given)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_out_ids_out_of_range(cuda, rule):
    tables = [torch.randn(9, 8), torch.randn(9, 8), torch.randn(9), torch.randn(9)]
    user, item, grad = torch.arange(6), torch.arange(6).flip(0) + 2, torch.randn(6)
    user[1], item[4] = 9, -1
    good = torch.tensor([True, False, True, True, False, True])
    got = trained(rule, user, item, tables, grad)
    with pyfused.use_backend("reference"):
        expected = trained(rule, user[good], item[good], tables, grad[good])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    with contextlib.suppress(IndexError):
        pyfused.check_errors()


# --- First layers beyond the case table
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", ["conv2d_relu", "conv2d_relu_max_pool2d"])
def test_direct_sums_in_any_order_of_threads(cuda, monkeypatch, op, layout):
    """Tiles in both directions, of which the weight gradient's few blocks take several; sums of integers, exactly."""
    monkeypatch.setattr(pyfused.backends.cuda.conv2d_direct, "_PARTS", 3)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 2, 19, 75), generator=g).float().to(memory_format=layout)
    given = [torch.randint(-2, 3, s, generator=g).float().requires_grad_() for s in ((9, 2, 3, 3), (9,))]

    def run():
        out = getattr(PF, op)(x, *given)
        upstream = torch.randint(-2, 3, out.shape, generator=torch.Generator().manual_seed(1)).float()
        return out, *torch.autograd.grad(out, given, upstream)

    seen = []
    for seed in (1, 2):
        emulated.cuda_module().set_seed(seed)
        seen.append(run())
    with pyfused.use_backend("reference"):
        seen.append(run())
    for a, b, expected in zip(*seen, strict=True):
        assert torch.equal(a, b) and torch.equal(a, expected)


@pytest.mark.parametrize("c_in", [2, 6])
def test_pooled_gradients_at_any_address(cuda, c_in):
    """Channels in whole 16-byte blocks, the upstream gradient next to a multiple of 16 bytes; overlapping windows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, c_in, 9, 10), generator=g).float().to(memory_format=torch.channels_last)
    given = [x.requires_grad_(), torch.randint(-2, 3, (8, c_in, 3, 3), generator=g).float().requires_grad_()]
    out = PF.conv2d_relu_max_pool2d(*given, pool_size=3, pool_stride=2)
    upstream = torch.randint(-2, 3, out.shape, generator=g).float().to(memory_format=torch.channels_last)
    moved = torch.empty(out.numel() + 1).as_strided(upstream.shape, upstream.stride(), 1).copy_(upstream)
    got = torch.autograd.grad(out, given, moved, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(out, given, upstream), strict=True):
        assert torch.equal(a, b)


def test_images_further_apart_than_32_bits(cuda):
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 1, 6, 7), (2**31, 42, 7, 1))
    x.copy_(torch.randn(2, 1, 6, 7))
    w = torch.randn(5, 1, 3, 3, dtype=torch.float16, requires_grad=True)
    seen = []
    for given in (x, x.contiguous()):
        out = PF.conv2d_relu(given, w)
        seen.append((out, *torch.autograd.grad(out, w, torch.ones_like(out))))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


def under_sanitizers(*command: str) -> subprocess.CompletedProcess:
    """`python *command` with the compilers' own checks of the kernels instead of the emulation's."""
    if reason := build.why_not():
        pytest.skip(reason)
    # The package under test, which the current folder's might not be: a checkout has no compiled module.
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(pyfused.__file__).parents[1])])
    environment = {**os.environ, **build.sanitizer_environment(), "PYTHONPATH": path}
    environment["PYFUSED_EMULATION"] = str(build.build("asan"))
    given = {"env": environment, "cwd": tempfile.gettempdir(), "capture_output": True, "text": True, "timeout": 900}
    return subprocess.run([sys.executable, *command], **given)


@pytest.mark.parametrize(
    "bug, said", [("past_the_end", "AddressSanitizer: heap-buffer-overflow"), ("overflow", "signed integer overflow")]
)
def test_sanitizers_notice(bug, said):
    script = f"import test_cuda_emulation as t; t.run_planted(1 + list(t.PLANTED).index({bug!r}), 1); print('ran')"
    run = under_sanitizers("-c", script)
    assert said in run.stderr and "ran" not in run.stdout, run.stderr[-3000:]


def test_case_table_under_sanitizers():
    script = """
import emulated, pyfused, cases, accuracy, test_optim
with emulated.cuda_on_cpu(), pyfused.use_backend("cuda"):
    table = pyfused.dispatch.TABLE
    for case in cases.CASES:
        if "cuda" in table[case.op] and not emulated.too_large(case):
            for dtype in case.dtypes[::2]:
                accuracy.gradients_of(accuracy.public(case.op), case.arguments(dtype), case.grad)
    for optimizer, _, options in test_optim.RULES.values():
        for shape in ("padding per user", "wide tail"):
            setting = test_optim.Setting(test_optim.torch.float32, **test_optim.SHAPES[shape])
            setting.train(optimizer, options, fused=True)
print("all cases ran")
"""
    run = under_sanitizers("-c", script)
    assert "all cases ran" in run.stdout, run.stderr[-3000:]


MORE = [
    ("cuda_conv2d_implicit_gemm", "not gpu"),
    ("cuda_in_batch_cross_entropy", "not gpu and (splits or 16 or 255 or special or 32_bits)"),
    ("cuda_emulation", "(hot_ids or out_of_range or distance) and not sanitizers"),  # else this test runs itself
]


@pytest.mark.parametrize("file, which", MORE)
def test_more_under_sanitizers(file, which):
    """Tiles, splits, unaligned addresses, long runs, ids out of range."""
    tests = Path(__file__).parent / f"test_{file}.py"
    # -s: a sanitizer ends the process, and what it says must not end in pytest's hands.
    run = under_sanitizers("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", which, str(tests))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
