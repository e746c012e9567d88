"""The command line, as a newcomer would use it."""

import csv
import re
import subprocess
import sys

import pytest
import torch
from test_train import folder, one_thread  # noqa: F401  (fixtures: small data, one thread)
from typer.testing import CliRunner

import pyfused.__main__ as cli
from pyfused import _binary, dispatch, functional
from pyfused import check as conformance
from pyfused.models import MnistCNN
from pyfused.train import TASKS


def invoke(*arguments, status=0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)


@pytest.mark.parametrize("command", ["info", "check", "bench", "train", "demo"])
def test_help(command):
    assert command in invoke("--help")
    if command == "bench":
        pytest.importorskip("pyfused.bench", reason="pyfused.bench exists once the package is installed")
    text = invoke(command, "--help")
    assert "Usage" in text and len(text.splitlines()) > 5


def test_no_arguments_print_help():
    assert "demo" in invoke(status=2)


def test_python_m_pyfused_is_the_same():
    done = subprocess.run([sys.executable, "-m", "pyfused", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "recommender" not in done.stderr and "demo" in done.stdout


def test_importing_pyfused_stays_light():
    code = "import sys, pyfused; print([m for m in ('matplotlib', 'rich', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_info():
    text = invoke("info")
    assert torch.__version__ in text and cli.__version__ in text
    for backend, reason in dispatch.available_backends().items():
        assert (reason or backend) in text
    for op in {check.op for check in conformance.CHECKS}:
        (row,) = [line for line in text.splitlines() if f" {op} " in line]
        assert "f32 f64 bf16 f16" in row
    if _binary._C:
        assert _binary._C.isa() in text


def test_check_covers_every_op_and_passes():
    text = invoke("check")
    for op in set(dispatch.ops()) & set(functional.__all__):
        assert op in text, f"no check for {op}"
    for label, _, _ in conformance.targets():
        assert label in text
    assert "all results are as exact" in text


@pytest.fixture
def few_checks(monkeypatch):
    """Two ops are enough to see how a defect is reported."""
    some = [check for check in conformance.CHECKS if check.op in ("cross_entropy", "embedding_dot")]
    monkeypatch.setattr(conformance, "CHECKS", some)


def test_check_restores_the_instruction_set(few_checks):
    if not _binary._C:
        pytest.skip(_binary.why_not)
    before = _binary._C.isa()
    list(conformance.run_checks())
    assert _binary._C.isa() == before


@pytest.mark.parametrize(
    "defect", [lambda y: y + 1e-3, lambda y: y * float("nan"), lambda y: 1 / 0], ids=["off", "nan", "raises"]
)
def test_check_finds_a_defect(few_checks, monkeypatch, defect):
    right = conformance.functional.cross_entropy
    monkeypatch.setattr(
        conformance.functional, "cross_entropy", lambda *args, **options: defect(right(*args, **options))
    )
    text = invoke("check", status=1)
    assert re.search(r"wrong: cross_entropy, reference, f32", text) and re.search(r"cross_entropy, cpu.* f64", text)
    assert "wrong: embedding_dot" not in text and "as exact as" not in text


def test_check_finds_a_wrong_gradient(few_checks, monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    right = conformance.functional.embedding_dot
    monkeypatch.setattr(conformance.functional, "embedding_dot", lambda *args: Doubled.apply(right(*args)))
    assert "wrong: embedding_dot" in invoke("check", status=1)


@pytest.mark.parametrize("mode", ["--eager", "--fused"])
def test_train(folder, tmp_path, mode):  # noqa: F811
    text = invoke("train", "cnn", "--data", folder, mode, "--epochs", 2, "--batch-size", 60, "--out", tmp_path)
    assert "epoch 2" in text and "accuracy" in text
    stem = tmp_path / f"cnn{mode.replace('--', '-')}"
    with stem.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    state = torch.load(stem.with_suffix(".pt"), weights_only=True)
    MnistCNN().load_state_dict(state)
    torch.manual_seed(0)
    assert not torch.equal(state["conv1.weight"], MnistCNN().conv1.weight)  # trained, from seed 0


def test_train_recommender_shows_popularity(folder):  # noqa: F811
    text = invoke("train", "recommender", "--data", folder, "--epochs", 1)
    assert "popularity: hr@10" in text and "ndcg@10" in text


@pytest.mark.parametrize("command", [["train", "cnn"], ["train", "recommender"], ["demo"]])
def test_missing_data_is_a_message_and_no_traceback(tmp_path, command):
    result = CliRunner().invoke(cli.app, [*command, "--data", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "error:" in result.output and "looked for" in result.output


def test_bad_options_are_refused(folder):  # noqa: F811
    assert "epochs" in invoke("train", "cnn", "--data", folder, "--epochs", 0, status=2)
    assert "cnn" in invoke("train", "transformer", status=2)


def test_demo(folder, tmp_path, monkeypatch):  # noqa: F811
    """The recommender's half of the demo; the op timings are the benchmark's, and tested there."""
    timed = []
    monkeypatch.setattr("pyfused.demo.time_kernels", lambda out, threads, console: timed.append(out))
    monkeypatch.delitem(TASKS, "cnn")  # each process costs seconds; test_train.py has the convolutional network's
    text = invoke("demo", "--data", folder, "--out", tmp_path, "--epochs", 4, "--threads", 1)
    assert timed == [tmp_path]
    for word in ("MovieLens", "popularity", "eager", "fused"):
        assert word in text
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["contender"]) for row in rows] == [("recommender", "eager"), ("recommender", "fused")]
    assert rows[1]["early_difference"] == ""  # 4 steps are fewer than 10
    assert {path.name for path in tmp_path.iterdir()} == {"recommender.csv", "summary.csv", "curves.png"}
