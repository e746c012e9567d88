"""`pytest bench`: the harness itself, and pytest-benchmark entries of the quick cases on one thread.

PYFUSED_BENCH=full: all cases, torch.compile too, on all threads.

Nothing here asserts a time.
"""

from __future__ import annotations

import csv
import os

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from . import cases, harness, machine, memory, report, summary
from .__main__ import app
from .cases import FULL, QUICK, select
from .convolutions import Conv, ConvAct
from .workloads import CrossEntropy, EmbeddingDot, LinearCrossEntropy

CPU = torch.device("cpu")
EVERYTHING = os.environ.get("PYFUSED_BENCH") == "full"


@pytest.fixture(autouse=True)
def one_thread():
    """Where nothing is to be measured, threads that spin while other programs hold their cores only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if EVERYTHING else 1)
    yield
    torch.set_num_threads(before)


def entries():
    for case in FULL if EVERYTHING else QUICK:
        for direction in case.directions:
            for name in case.tiny().contenders(direction, CPU):
                if EVERYTHING or "compile" not in name:
                    yield pytest.param(case, direction, name, id=f"{case.title(direction)} {name}".replace(" ", "-"))


@pytest.mark.benchmark(max_time=1.0 if EVERYTHING else 0.05, min_rounds=3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("case, direction, name", list(entries()))
def test_benchmark(benchmark, case, direction, name):
    torch.manual_seed(0)
    benchmark.group = case.title(direction)
    benchmark.extra_info |= case.cost(direction)._asdict()
    contender = case.contenders(direction, CPU)[name]()
    benchmark(contender.run)


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.title("").replace(" ", "-"))
def test_contenders_agree(case, direction):
    torch.manual_seed(0)
    builders = case.contenders(direction, CPU)
    results = {name: build().result() for name, build in builders.items() if "compile" not in name}
    assert "eager" in results and "pyfused" in results
    harness.check_agreement(results, case.gradient_tolerance)


@pytest.fixture
def order(monkeypatch):
    """The calls that `interleave` times, with a clock by which "slow" takes 600 ms and everybody else 300."""
    calls = []

    def timed_calls(run, count, device):
        calls.extend([run] * count)
        return [600.0 if run == "slow" else 300.0] * count

    monkeypatch.setattr(harness.machine, "timed_calls", timed_calls)
    return calls


def test_interleaving_gives_every_contender_its_turn_in_every_round(order):
    timings = harness.interleave({name: name for name in "abc"}, CPU, seconds=0.5, rounds=4)
    timed = "".join(order[-12:])  # at so little time a turn is one call
    rounds = [timed[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds) and len(set(rounds)) > 1
    assert all(timing == harness.Timing(300, 300, 300, calls=4) for timing in timings.values())


def test_a_contender_that_needs_more_than_its_time_for_one_call_has_three_turns(order):
    timings = harness.interleave({"slow": "slow", "fast": "fast"}, CPU, seconds=0.5, rounds=7)
    assert timings["slow"].calls == 3 and timings["fast"].calls == 7
    turns = "".join(order[3:]).replace("slow", "s").replace("fast", "f")  # after the estimates
    assert sorted(turns[:2]) == sorted(turns[-2:]) == ["f", "s"] and sorted(turns[2:-2]) == list("fffffs")


def test_a_longer_budget_means_more_calls():
    short, long = (harness.interleave({"a": lambda: torch.ones(1000).sum()}, CPU, seconds=s) for s in (1e-9, 0.05))
    assert long["a"].calls > short["a"].calls


def test_disagreement_is_caught():
    good = [torch.ones(3), torch.arange(4.0)]
    harness.check_agreement({"eager": good, "same": [t.clone() for t in good]})
    nan = torch.tensor([0.0, 1.0, 2.0, float("nan")])
    for wrong in (
        [torch.ones(3) * 1.01, good[1]],
        [good[0], -good[1]],
        [good[0], nan],
        [good[0], good[1][:3]],
        good[:1],
    ):
        with pytest.raises(harness.Disagreement, match="wrong"):
            harness.check_agreement({"eager": good, "wrong": wrong})


def test_kinks_widen_the_tolerance_of_gradients_only():
    eager, other = [torch.ones(3)] * 2, [torch.ones(3), torch.ones(3) * 1.005]
    harness.check_agreement({"eager": eager, "other": other}, gradient_tolerance=1e-2)
    with pytest.raises(harness.Disagreement, match="gradient 1"):
        harness.check_agreement({"eager": eager, "other": other})
    with pytest.raises(harness.Disagreement, match="output"):
        harness.check_agreement({"eager": eager, "other": other[::-1]}, gradient_tolerance=1e-2)


def test_a_gradient_that_is_zero_but_for_rounding_is_held_against_the_others():
    eager = [torch.ones(3), torch.ones(3), torch.full((3,), 1e-8)]
    other = [*eager[:2], -eager[2]]
    harness.check_agreement({"eager": eager, "other": other}, gradient_tolerance=1e-2)
    with pytest.raises(harness.Disagreement, match="gradient 2"):
        harness.check_agreement({"eager": eager, "other": other})
    with pytest.raises(harness.Disagreement, match="gradient 2"):
        harness.check_agreement(
            {"eager": eager, "other": [*eager[:2], torch.full((3,), 1e-3)]}, gradient_tolerance=1e-2
        )


def test_sparse_gradients_are_compared_coalesced():
    def sparse(rows, values):
        values = torch.tensor(values)[:, None]
        return [torch.sparse_coo_tensor([rows], values, (5, 1), check_invariants=True)]

    twice = sparse([3, 3, 1], [1.0, 2.0, 4.0])
    harness.check_agreement({"eager": twice, "coalesced": sparse([1, 3], [4.0, 3.0])})
    harness.check_agreement({"eager": twice, "dense": [twice[0].to_dense()]})
    for wrong in (sparse([1, 3], [4.0, 2.0]), sparse([1, 2], [4.0, 3.0])):
        with pytest.raises(harness.Disagreement):
            harness.check_agreement({"eager": twice, "wrong": wrong})


class WrongKernel(CrossEntropy):
    def contenders(self, direction, device):
        builders = super().contenders(direction, device)
        logits = torch.randn(self.shape, device=device, requires_grad=True)
        target = torch.zeros(self.shape[0], dtype=torch.long, device=device)
        builders["pyfused"] = lambda: harness.step(F.cross_entropy, [(logits, target)], [logits], direction)
        return builders


def test_a_wrong_contender_has_no_time():
    with pytest.raises(harness.Disagreement, match="pyfused differs from eager: output"):
        harness.run_case(WrongKernel(shape=(8, 16), why=""), "training", CPU, with_compile=False, seconds=1e-3)


class BrokenRival(CrossEntropy):
    broken = "rival"

    def contenders(self, direction, device):
        def fail():
            raise RuntimeError("no compiler")

        return super().contenders(direction, device) | {self.broken: fail}


class BrokenOurs(BrokenRival):
    broken = "pyfused"


def test_a_rival_that_cannot_run_is_left_out_and_said_so():
    said = []
    arguments = {"with_compile": False, "seconds": 1e-3, "announce": said.append}
    rows = harness.run_case(BrokenRival(shape=(8, 16), why=""), "forward", CPU, **arguments)
    assert [row["contender"] for row in rows] == ["eager", "pyfused"]
    assert len(said) == 1 and "rival left out: RuntimeError: no compiler" in said[0]
    with pytest.raises(RuntimeError, match="no compiler"):
        harness.run_case(BrokenOurs(shape=(8, 16), why=""), "forward", CPU, **arguments)


def test_a_failing_case_does_not_take_the_others_with_it(monkeypatch):
    good, wrong, broken = (kind(shape=(8, 16), why="") for kind in (CrossEntropy, WrongKernel, BrokenOurs))
    monkeypatch.setattr(cases, "select", lambda *_: [wrong, broken, good])
    with pytest.raises(harness.Incomplete, match=r"(?s)pyfused differs from eager.*no compiler") as failure:
        harness.compare(directions=["forward"])
    assert [row["contender"] for row in failure.value.rows] == ["eager", "pyfused"]


def test_step_walks_through_its_batches_and_always_judges_the_first():
    seen = []
    batches = [(torch.tensor(float(i), requires_grad=True),) for i in range(3)]
    contender = harness.step(lambda x: seen.append(x.item()) or 2 * x, batches, [batches[0][0]], "forward")
    for _ in range(4):
        contender.run()
    contender.result()
    assert seen == [0, 1, 2, 0, 0]


def test_upstream_gradient_has_the_same_values_in_every_memory_format():
    plain = torch.empty(2, 3, 4, 4)
    last = plain.to(memory_format=torch.channels_last)
    a, b = harness._upstream_like(plain), harness._upstream_like(last)
    assert torch.equal(a, b) and b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", FULL + QUICK, ids=lambda case: case.title("").replace(" ", "-"))
def test_cost_models(case):
    assert case.why
    forward, training = case.cost("forward"), case.cost("training")
    assert 0 < forward.bytes < training.bytes
    assert 0 < forward.flops < training.flops


def test_cost_models_by_hand():
    conv = Conv(shape=(2, 3, 6, 6), out=4, why="")  # output 2 x 4 x 4 x 4
    assert conv.cost("forward") == (4 * (216 + 108 + 4 + 128), 2 * 128 * 27)
    assert conv.cost("training").bytes == 4 * (456 + 216 + 128 + 216 + 4 + 216 + 128)
    pooled = Conv(shape=(2, 3, 6, 6), out=4, pool=True, first=True, why="")  # output 2 x 4 x 2 x 2
    assert pooled.cost("training") == (4 * (216 + 108 + 4 + 32 + 216 + 32 + 216 + 4) + 64, 2 * 2 * 128 * 27)
    assert CrossEntropy(shape=(8, 10), why="").cost("training").bytes == 3 * 320 + 2 * 64
    assert LinearCrossEntropy(rows=2, features=3, classes=5, why="").cost("training").flops == 3 * 2 * 2 * 3 * 5
    act = ConvAct(
        shape=(2, 3, 8), out=4, activation="gelu", residual=True, why=""
    )  # weight 4 x 3 x 3, output 2 x 4 x 6
    assert act.cost("forward") == (4 * (48 + 36 + 4 + 48 + 48), 2 * 12 * 36)
    assert act.cost("training").bytes == 4 * (184 + 2 * 48 + 48 + 2 * (48 + 36) + 4 + 48)
    dot = EmbeddingDot(batch=4, table_rows=9, dim=2, why="")
    assert dot.cost("forward") == (4 * (16 + 16 + 4), 16)
    assert dot.cost("training").bytes == 2 * 144 + 2 * 9 * 8


def test_selection():
    assert {case.op for case in select(True, ["cross_entropy"])} == {"cross_entropy"}
    assert all(case.dtype == torch.float64 for case in select(True, dtype=torch.float64))
    assert len({case.title("") for case in FULL}) == len(FULL)
    assert {case.op for case in QUICK} == {case.op for case in FULL}
    with pytest.raises(ValueError, match="unknown op conv3d: choose from conv2d_relu"):
        select(True, ["conv3d"])
    assert [case.name for case in select(False, ["fused_model"], text="resnet18")] == ["resnet18 8x3x224x224"]
    with pytest.raises(ValueError, match="no case is called 'resnet19'"):
        select(False, text="resnet19")


def test_compare_gives_rows_that_become_csv_and_plots(tmp_path):
    rows = harness.compare(True, ["cross_entropy", "linear_cross_entropy"], directions=["forward"])
    assert all(list(row) == harness.COLUMNS for row in rows)
    assert {row["contender"] for row in rows} == {"eager", "torch chunked", "pyfused"}
    assert all(row["vs_eager"] == 1 for row in rows if row["contender"] == "eager")
    assert all(row["share"] > 0 and row["threads"] == torch.get_num_threads() for row in rows)
    path = tmp_path / "new" / "cpu.csv"
    report.write_csv(rows, path)
    report.write_csv([{**row, "p50_ms": 7.0} for row in rows], path)
    newest = report.latest(path, rows[0])
    assert len(newest) == len(rows) and {row["p50_ms"] for row in newest} == {7.0}
    for other in ({"hardware": "another machine"}, {"threads": 64}, {"malloc": "another"}):
        assert report.latest(path, rows[0] | other) == []
    with path.open(newline="") as file:
        stored = list(csv.DictReader(file))
    assert len(stored) == 2 * len(rows) and list(stored[0]) == harness.COLUMNS
    assert float(stored[0]["p50_ms"]) == pytest.approx(rows[0]["p50_ms"], rel=1e-4)
    for plot in (report.plot_speedups, report.plot_roofline):
        plot(newest, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    assert report.tables(rows).renderables
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        report.write_csv(rows, path)


def run_of(direction="training", op="conv2d_relu", **ms):
    """Rows of one run of one case, with these medians."""
    common = {name: "" for name in harness.COLUMNS} | {"op": op, "case": "8x3", "dtype": "float32", "share": 0.5}
    common |= {"direction": direction, "extra_mib": None}
    return [common | {"contender": name.replace("_", " "), "p50_ms": value} for name, value in ms.items()]


def test_summary_sets_the_last_runs_beside_each_other():
    runs = [
        run_of(eager=100.0, compile=100.0, pyfused=1.0),  # an old run, which two later ones replace
        run_of(eager=8.0, eager_NHWC=3.9, compile=5.0, compile_NHWC=3.0, pyfused=10.0, pyfused_NHWC=4.0),
        run_of("forward", eager=2.0, pyfused=1.0),
        run_of(eager=9.0, eager_NHWC=4.1, compile=6.0, compile_NHWC=2.8, pyfused=10.0, pyfused_NHWC=4.0),
    ]
    training, forward = summary.races([row for run in runs for row in run], 2)
    assert training.ours == "pyfused NHWC" and training.ms("eager") == 8.5
    assert training.ratios("eager") == [2.0, 2.25]
    assert training.ratios(*summary.COMPILED) == [0.75, 0.7]
    assert forward.ratios("eager") == [2.0] and forward.ratios(*summary.COMPILED) == []
    lost = {text.split(": ")[1] for _, text in training.lost()}
    # NHWC draws level with eager NHWC; in NCHW ours is slower than eager, though nobody would choose it.
    assert lost == {"pyfused NHWC 0.75x, 0.70x as fast as compile NHWC", "pyfused 0.80x, 0.90x as fast as eager"}
    assert list(forward.lost()) == []
    assert summary.spread([training, forward]).endswith("by 12% (median case) to 12% (worst).")
    line = summary.markdown([training]).splitlines()[2]
    assert line == "| conv2d_relu 8x3, training | 4 ms | 2.1x NCHW, 1.0x channels_last | **0.72x** |"


def test_summary_says_which_losses_are_not_in_every_run():
    runs = run_of(eager=9.0, pyfused=10.0) + run_of(eager=10.5, pyfused=10.0)
    (race,) = summary.races(runs, 2)
    ((ratio, text),) = race.lost()
    assert ratio == pytest.approx(0.975) and text.endswith("pyfused 0.90x, 1.05x as fast as eager  (not in every run)")


def test_summary_of_the_committed_rows():
    setting = ["--threads", "2", "--malloc", "default"]  # that of the README's table
    result = CliRunner().invoke(summary.app, setting)
    assert result.exit_code == 0 and "comparisons lost" in result.output and "linear_cross_entropy" in result.output
    result = CliRunner().invoke(summary.app, ["--markdown", *setting])
    assert result.output.startswith("| what | pyfused |") and result.output.count("\n| ") > 20


class Hungry(CrossEntropy):
    """Each call holds 64 MiB, all of it touched, and returns 16."""

    def contenders(self, direction, device):
        def run():
            result = torch.ones(16 * 2**18)
            torch.ones(64 * 2**18)
            return [result]

        return {"eager": lambda: harness.Contender(run, run)}


def test_peak_memory_is_what_a_call_holds_besides_inputs_and_results():
    extra = memory.peak_extra(Hungry(shape=(2, 2), why=""), "training", "eager", CPU) / 2**20
    assert 60 < extra < 72


def test_memory_is_in_the_rows_of_training_steps():
    rows = harness.compare(True, ["linear_cross_entropy"], directions=["training"], memory=True)
    extra = {row["contender"]: row["extra_mib"] for row in rows}
    assert extra.keys() == {"eager", "torch chunked", "pyfused"}
    assert extra["eager"] > 8  # its logits alone


def test_command_line(tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["cross_entropy", "--quick", "--direction", "forward", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "cpu.csv",
        *(f"{plot}-cpu-1-threads-{machine.malloc_mode()}-malloc.png" for plot in ("speedup", "roofline")),
    }
    assert "pyfused" in result.output and "8192x10" in result.output
    result = runner.invoke(app, ["conv3d", "--quick"])
    assert result.exit_code == 1 and "unknown op conv3d" in result.output


def test_ceilings_are_measured_once_per_thread_count_and_size():
    first = machine.copy_rate(3 << 20, CPU)
    assert first > 0 and machine.copy_rate((3 << 20) + 1, CPU) == first
    assert machine.matmul_rate(torch.float32, CPU) > 0
