"""The training loop, on small data made here: determinism, modes, resuming, precision, several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_data import folder, one_thread  # noqa: F401  (fixtures)

from pyfused import checkpoint, set_conv_algorithm
from pyfused.tasks import TASKS, make_task
from pyfused.tasks.photos import DeepPhotos, Photos
from pyfused.tasks.text import Text
from pyfused.train import Options, train, write_csv

FAST = ["small-cnn", "mnist-cnn", "image-folder", "photo-cnn", "dot-concat", "mf", "bpr", "two-tower", "gpt"]


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(Photos, "size_of_image", 24)
    monkeypatch.setattr(DeepPhotos, "size_of_image", 32)
    monkeypatch.setattr(Text, "context", 16)
    monkeypatch.setattr(Text, "dim", 32)


def task_of(name, folder, **settings):  # noqa: F811
    return make_task(name, folder / "text" if name == "gpt" else folder, **settings)


def run(task, seed=0, file=None, resume=False, on_step=lambda steps: None, **options):
    model = task.model(seed)
    given = {"epochs": 2, "batch_size": 30, "mode": "eager", "seed": seed} | options
    how = Options.of(task, **given)
    return list(train(task, model, how, file=file, resume=resume, on_step=on_step)), model


def same(a, b):
    return all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("name", FAST)
def test_training_is_deterministic_and_the_seed_matters(folder, fused_wins, name, mode):  # noqa: F811
    assert set(FAST) == set(TASKS)
    (rows, model), (again, twin), (other, _) = (run(task_of(name, folder), seed, mode=mode) for seed in (5, 5, 6))
    assert without_seconds(rows) == without_seconds(again) and same(model, twin)
    assert [row["loss"] for row in rows] != [row["loss"] for row in other]


@pytest.fixture
def any_algorithm():
    yield
    set_conv_algorithm("auto")


@pytest.mark.parametrize("name", FAST)
def test_fused_training_follows_eager(folder, fused_wins, any_algorithm, name):  # noqa: F811
    """Same seed, same batches, same negatives: after a few steps the parameters differ by rounding alone.

    photo-cnn's deep maps are sparse: by Winograd some weights' gradients are 1e-8 where eager's are 0, and Adam makes
    whole steps of them. (mnist-cnn's and image-folder's are not.)"""
    set_conv_algorithm("direct" if name == "photo-cnn" else "auto")
    (eager_rows, eager), (fused_rows, fused) = (
        run(task_of(name, folder), epochs=1, batch_size=40, mode=mode) for mode in ("eager", "fused")
    )
    assert eager_rows[0]["loss"] == pytest.approx(fused_rows[0]["loss"], rel=1e-4)
    start = dict(task_of(name, folder).model().named_parameters())
    for key, parameter in eager.named_parameters():
        moved, off = parameter - start[key], fused.get_parameter(key) - parameter
        assert moved.norm() > 0, f"{key} was not trained"
        assert off.norm() <= 0.02 * moved.norm(), key


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("name", FAST)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(folder, fused_wins, tmp_path, name, mode):  # noqa: F811
    options = {"epochs": 3, "batch_size": 30, "mode": mode}
    task, file = task_of(name, folder), tmp_path / "run.pt"
    whole, model = run(task, **options)
    steps_per_epoch = -(-task.size // 30)

    def stop(steps):
        if steps == 2 * steps_per_epoch + 1:  # within the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, file=file, on_step=stop, **options)
    torch.rand(3)  # the state of the global generator must not matter
    rows, resumed = run(task_of(name, folder), file=file, resume=True, **options)
    assert without_seconds(rows) == without_seconds(whole) and same(model, resumed)
    loaded, state = checkpoint.load_model(file)
    assert same(loaded, model) and state["rows"] == rows
    assert [path.name for path in tmp_path.iterdir() if path.name != "pyfused"] == ["run.pt"]


def test_dropout_and_precision_are_resumed_too(folder, tmp_path):  # noqa: F811
    class Dropping(TASKS["dot-concat"]):
        def arguments(self):
            return super().arguments() | {"dropout": 0.5}

    options = {"epochs": 2, "precision": "bfloat16", "file": tmp_path / "run.pt"}
    whole, model = run(Dropping(folder), **options)
    state = torch.load(tmp_path / "run.pt", weights_only=True)

    def stop(steps):
        if steps == -(-Dropping(folder).size // 30) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Dropping(folder), on_step=stop, **options)
    _, resumed = run(Dropping(folder), resume=True, **options)
    assert same(model, resumed)
    without, _ = run(TASKS["dot-concat"](folder), epochs=2, precision="bfloat16")
    assert without[-1]["loss"] != whole[-1]["loss"] and state["options"]["precision"] == "bfloat16"


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"epochs": 3}, {"seed": 1}, {"mode": "fused"}])
def test_resuming_another_run_is_refused(folder, fused_wins, tmp_path, change):  # noqa: F811
    file = tmp_path / "run.pt"
    run(task_of("mf", folder), epochs=1, file=file)
    with pytest.raises(ValueError, match=f"of another run: it has {next(iter(change))} "):
        run(task_of("mf", folder), **{"epochs": 1, "file": file, "resume": True} | change)
    with pytest.raises(ValueError, match=r"fold 0 \(now 1\)"):
        run(task_of("mf", folder, fold=1), epochs=1, file=file, resume=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        run(task_of("mf", folder), file=tmp_path / "none.pt", resume=True)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_a_value_error(tmp_path, content):
    if content is None:
        torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pt")
    else:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is no checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    checkpoint.save({"format": checkpoint.FORMAT, "n": 1}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"format": checkpoint.FORMAT, "n": lambda: 2}, tmp_path / "x.pt")
    assert checkpoint.load(tmp_path / "x.pt")["n"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_is_resumed(folder, tmp_path):  # noqa: F811
    """SIGKILL, at the moment when a checkpoint is written and not yet renamed."""
    code = """if True:
        import os, signal, sys, torch
        from pathlib import Path
        from pyfused.tasks import make_task
        from pyfused.train import Options, train
        torch.set_num_threads(1)
        task = make_task("mf", Path(sys.argv[1]))
        rename = os.replace
        def replace(source, target):
            if Path(target).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = replace
        for _ in train(task, task.model(), Options.of(task, epochs=3, mode="eager"), file=Path(sys.argv[2])): pass
    """
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "run.pt")], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and len(checkpoint.load(tmp_path / "run.pt")["rows"]) == 1
    options = {"epochs": 3, "batch_size": TASKS["mf"].batch_size}
    rows, model = run(task_of("mf", folder), file=tmp_path / "run.pt", resume=True, **options)
    whole, twin = run(task_of("mf", folder), **options)
    assert without_seconds(rows) == without_seconds(whole) and same(model, twin)


def test_rows_steps_and_learning_rate(folder):  # noqa: F811
    steps = []
    rows, _ = run(task_of("mnist-cnn", folder), batch_size=50, lr=0.5e-3, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["lr"] == pytest.approx(0.5e-3 * (1 - 0.98 * 3 / 6)) and rows[1]["lr"] == pytest.approx(0.5e-3 * 0.02)
    assert all(row["seconds"] > 0 for row in rows)


def test_the_batch_size_splits_every_example_once(folder):  # noqa: F811
    """The mean loss of an epoch weighs the short last batch by its size."""
    task, seen = task_of("mnist-cnn", folder), []

    class Step(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images, labels):
            return sum(p.sum() for p in self.model.parameters()) * 0 + float(len(labels))

    def batch(rows, own, generator):
        seen.append(rows[own])
        return torch.zeros(len(rows), 1, 28, 28), rows

    task.step, task.batch = lambda model, fused: Step(model), batch
    (row,), _ = run(task, epochs=1, batch_size=50)
    assert [len(rows) for rows in seen] == [50, 50, 20]
    assert torch.cat(seen).sort().values.tolist() == list(range(120))
    assert row["loss"] == pytest.approx((50 * 50 + 50 * 50 + 20 * 20) / 120)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_the_same_roughly(folder, precision):  # noqa: F811
    exact, model = run(task_of("mnist-cnn", folder), epochs=1)
    rows, reduced = run(task_of("mnist-cnn", folder), epochs=1, precision=precision)
    assert rows[0]["loss"] != exact[0]["loss"] and rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in reduced.parameters()) and not same(model, reduced)


def test_compiled_training_follows_eager(folder):  # noqa: F811
    (eager, _), (compiled, _) = (run(task_of("mf", folder), epochs=1, mode=mode) for mode in ("eager", "compile"))
    assert compiled[0]["loss"] == pytest.approx(eager[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["mf", "bpr"])
def test_steps_in_the_backward_follow_sparse_adam(folder, name, tmp_path):  # noqa: F811
    """One batch an epoch, so that every row is touched in every step, where SparseAdam is Adam."""

    class Plain(TASKS[name]):
        weight_decay, penalty = 0.0, 0.0

    options = {"epochs": 6, "batch_size": 1000}
    expected, _ = run(Plain(folder), **options)
    rows, model = run(task_of(name, folder), step_in_backward=True, file=tmp_path / "run.pt", **options)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert all(p.grad is None for p in model.parameters()) and rows[-1]["loss"] < rows[0]["loss"]
    state = checkpoint.load(tmp_path / "run.pt")["optimizer"]["state"]
    assert state[0]["step"] == 6 and state[0]["exp_avg"].shape == model.user.weight.shape


def test_steps_in_the_backward_are_resumed(folder, tmp_path):  # noqa: F811
    options = {"epochs": 3, "step_in_backward": True, "file": tmp_path / "run.pt"}
    whole, model = run(task_of("bpr", folder), **options)

    def stop(steps):
        if steps == 2 * -(-task_of("bpr", folder).size // 30) + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task_of("bpr", folder), on_step=stop, **options)
    rows, resumed = run(task_of("bpr", folder), resume=True, **options)
    assert without_seconds(rows) == without_seconds(whole) and same(model, resumed)


def test_steps_in_the_backward_are_refused_where_there_are_none(folder):  # noqa: F811
    for name, options in (("two-tower", {}), ("small-cnn", {}), ("mf", {"precision": "float16"})):
        with pytest.raises(ValueError, match="step_in_backward is for mf and bpr"):
            run(task_of(name, folder), step_in_backward=True, **options)


def test_workers_make_the_same_batches(folder):  # noqa: F811
    for name in ("image-folder", "bpr"):
        settings = {"augment": True} if name == "image-folder" else {}
        alone, model = run(task_of(name, folder, **settings), epochs=1)
        rows, twin = run(task_of(name, folder, **settings), epochs=1, workers=2)
        assert without_seconds(rows) == without_seconds(alone) and same(model, twin)


TWO_PROCESSES = """if True:
    import gc, json, sys, torch, torch.distributed as dist
    from pathlib import Path
    import test_train
    from pyfused.tasks.photos import DeepPhotos, Photos
    from pyfused.tasks.ratings import RatingClasses
    from pyfused.tasks.text import Text
    from pyfused.train import rank
    torch.set_num_threads(1)
    Photos.size_of_image, DeepPhotos.size_of_image, Text.context, Text.dim = 24, 32, 16, 32
    RatingClasses.dropout = 0.0
    dist.init_process_group("gloo")
    found, folder, out = {}, Path(sys.argv[1]), Path(sys.argv[2])
    for name, mode in [(name, "eager") for name in test_train.FAST] + [("mnist-cnn", "fused"), ("bpr", "fused")]:
        file = out / f"{name}-{mode}.{rank()}.pt"
        rows, model = test_train.run(test_train.task_of(name, folder), batch_size=15, file=file, mode=mode)
        totals = torch.stack([p.detach().double().abs().sum() for p in model.parameters()])
        other = totals.clone()
        dist.broadcast(other, 0)
        assert torch.equal(totals, other), f"{name}: the processes have different parameters"
        found[f"{name}-{mode}"] = rows
    if rank() == 0:
        (out / "rows.json").write_text(json.dumps(found))
    gc.collect()  # as pyfused.command does
    dist.destroy_process_group()
"""


def test_two_processes_are_one_with_twice_the_batch(folder, tmp_path, monkeypatch):  # noqa: F811
    """All tasks, data that does not split evenly: the losses of every epoch, and one checkpoint, of process 0.

    Without dropout, for which every process draws its own numbers."""
    monkeypatch.setattr("pyfused.tasks.ratings.RatingClasses.dropout", 0.0)
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path]), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(script), str(folder), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {name.rpartition("-")[0] for name in found} == set(FAST)
    for name, rows in found.items():
        expected, _ = run(task_of(name.rpartition("-")[0], folder), batch_size=30)
        for row, alone in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4), name
            assert row["lr"] == alone["lr"]
    assert {path.name for path in tmp_path.glob("*.pt")} == {f"{name}.0.pt" for name in found}


def test_write_csv(tmp_path):
    write_csv([{"a": 1, "b": 2.5}, {"a": 3, "b": None}], tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2.5"}, {"a": "3", "b": ""}]


def test_options_are_the_tasks_but_for_what_is_given(folder):  # noqa: F811
    task = task_of("bpr", folder)
    how = Options.of(task, epochs=None, lr=1.0)
    assert (how.epochs, how.batch_size, how.lr) == (task.epochs, task.batch_size, 1.0)
    assert replace(how, lr=task.lr) == Options.of(task)
