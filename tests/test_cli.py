"""The command line, as a newcomer would use it."""

import csv
import os
import re
import subprocess
import sys

import emulated
import pytest
import torch
from small_data import folder, one_thread  # noqa: F401  (fixtures)
from typer.testing import CliRunner

import pyfused.__main__ as cli
from pyfused import _binary, checkpoint, dispatch, functional
from pyfused import check as conformance
from pyfused.demo import EPOCHS, time_kernels
from pyfused.models import MnistCNN
from pyfused.tasks import TASKS
from pyfused.tasks.ranking import SPLITS
from pyfused.train import MODES, PRECISIONS


def invoke(*arguments, status=0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)


@pytest.mark.parametrize("command", ["info", "check", "bench", "train", "recommend", "demo"])
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
    assert done.returncode == 0 and "demo" in done.stdout


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


def test_check_multiplies_float32_as_float32(few_checks, monkeypatch):
    """On a GPU, where TF32, PyTorch's default for convolutions, is no defect."""
    conv = torch.backends.cudnn.conv
    value = {"ieee": 2.0, "tf32": 1.0}
    monkeypatch.setattr(conformance, "results", lambda *args: [torch.tensor(value[conv.fp32_precision])])
    with emulated.float32_as(conv, "tf32"):
        findings = [finding for found in conformance.run_checks() for finding in found]
        assert conv.fp32_precision == "tf32"
    assert findings and all(finding.error == 1 for finding in findings)  # the truth, in float64, is made as set


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


@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_train_and_resume(folder, fused_wins, tmp_path, mode):  # noqa: F811
    options = ["--data", folder, "--mode", mode, "--epochs", 2, "--batch-size", 60, "--out", tmp_path]
    text = invoke("train", "mnist-cnn", *options)
    assert "epoch 2" in text and "accuracy" in text
    stem = tmp_path / f"mnist-cnn-{mode}"
    with stem.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    model, state = checkpoint.load_model(stem.with_suffix(".pt"))
    torch.manual_seed(0)
    assert not torch.equal(model.features[0].weight, MnistCNN().features[0].weight)  # trained, from seed 0
    text = invoke("train", "mnist-cnn", *options, "--resume")
    assert "epoch 1" in text and "epoch 2" in text  # the rows it has
    assert checkpoint.load(stem.with_suffix(".pt"))["rows"] == state["rows"]
    assert "of another run: it has lr" in invoke("train", "mnist-cnn", *options, "--resume", "--lr", 1, status=1)


def test_train_bpr_shows_popularity_and_recommend_reads_its_checkpoint(folder, tmp_path):  # noqa: F811
    text = invoke("train", "bpr", "--data", folder, "--epochs", 1, "--mode", "eager", "--out", tmp_path)
    assert "popularity: hr@10" in text and "ndcg@10" in text
    text = invoke("recommend", tmp_path / "bpr-eager.pt", "--user", 7, "--top", 3)
    rows = re.findall(r"^│ (\d) +│ (\d+) +│ +-?\d+\.\d+", text, re.MULTILINE)
    assert [rank for rank, _ in rows] == ["1", "2", "3"]
    assert "user 1234 is not among" in invoke("recommend", tmp_path / "bpr-eager.pt", "--user", 1234, status=1)


def test_train_compare(folder, tmp_path):  # noqa: F811
    text = invoke(*("train", "mf", "--data", folder, "--epochs", 2, "--threads", 1, "--compare", "--out", tmp_path))
    for word in ("eager", "compile", "fused", "mean rating", "speed-up", "rmse"):
        assert word in text
    with (tmp_path / "train-mf.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["epoch"]) for row in rows] == [
        (c, e) for c in ("eager", "compile", "fused") for e in "12"
    ]
    assert (tmp_path / "train-mf.png").exists()


def test_train_under_torchrun(folder, tmp_path):  # noqa: F811
    """Two processes: one prints, one writes; the losses are those of one process with twice the batch."""
    options = ["--data", folder, "--mode", "eager", "--epochs", 2, "--threads", 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "pyfused", "train", "mf", *options, "--batch-size", 32]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [*map(str, command), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 2") == 1
    invoke("train", "mf", *options, "--batch-size", 64, "--out", tmp_path / "one")
    two, one = (checkpoint.load(tmp_path / name / "mf-eager.pt")["rows"] for name in ("two", "one"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)


@pytest.mark.parametrize("command", [["train", "mnist-cnn"], ["train", "bpr"], ["train", "image-folder"], ["demo"]])
def test_missing_data_is_a_message_and_no_traceback(tmp_path, command):
    result = CliRunner().invoke(cli.app, [*command, "--data", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "error:" in result.output and "looked for" in result.output


def test_bad_options_are_refused(folder, tmp_path):  # noqa: F811
    assert "epochs" in invoke("train", "mnist-cnn", "--data", folder, "--epochs", 0, status=2)
    assert "mnist-cnn" in invoke("train", "transformer", status=2)
    assert "mf has no option split" in invoke("train", "mf", "--data", folder, "--split", "random", status=1)
    assert "--resume needs --out" in invoke("train", "mf", "--data", folder, "--resume", status=1)
    assert "there is no checkpoint" in invoke("train", "mf", "--data", folder, "--resume", "--out", tmp_path, status=1)


def test_the_models_of_the_command_line_are_the_tasks():
    assert [model.value for model in cli.Model] == list(TASKS)
    assert [mode.value for mode in cli.Mode] == list(MODES)
    assert [precision.value for precision in cli.Precision] == list(PRECISIONS)
    assert [split.value for split in cli.Split] == list(SPLITS)


def test_without_the_benchmark_the_command_line_says_where_it_is(tmp_path, monkeypatch):
    """In a checkout pyfused.bench is not importable."""
    for name in ("pyfused.bench", "pyfused.bench.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "python -m bench" in invoke("bench", status=1)
    time_kernels(tmp_path, 1, cli.console)
    assert not list(tmp_path.iterdir())


def test_demo(folder, tmp_path, monkeypatch):  # noqa: F811
    """The recommender's half of the demo; the op timings are the benchmark's, and tested there."""
    timed = []
    monkeypatch.setattr("pyfused.demo.time_kernels", lambda out, threads, console: timed.append(out))
    monkeypatch.delitem(EPOCHS, "mnist-cnn")  # each process costs seconds; test_compare.py has the network's
    text = invoke("demo", "--data", folder, "--out", tmp_path, "--epochs", 4, "--threads", 1)
    assert timed == [tmp_path]
    for word in ("bpr", "popularity", "eager", "fused"):
        assert word in text
    with (tmp_path / "bpr-summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["contender"]) for row in rows] == [("bpr", "eager"), ("bpr", "fused")]
    assert rows[1]["early_difference"] == ""  # 4 steps are fewer than 10
    assert {path.name for path in tmp_path.iterdir()} == {"bpr.csv", "bpr-summary.csv", "curves.png"}
