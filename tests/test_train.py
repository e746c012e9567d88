"""The training loop, its two tasks and the demo's measuring, on small data made here."""

import csv
import io
import math
import mmap
import multiprocessing
import os

import pytest
import torch
from rich.console import Console
from test_data import idx_bytes

from pyfused import demo
from pyfused.data.idx import FILES
from pyfused.train import Digits, Movies, train, write_csv


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for two, and two on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits that differ in where they are bright, and users who rate the items of their own half."""
    folder = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    for count, (images, labels) in zip((120, 40), (list(FILES)[:2], list(FILES)[2:])):
        label = torch.randint(10, (count,), generator=g)
        pixels = torch.randint(60, (count, 28, 28), generator=g)
        for row, digit in enumerate(label.tolist()):
            pixels[row, 2 * digit + 3 : 2 * digit + 6] += 190
        (folder / images).write_bytes(idx_bytes(pixels))
        (folder / labels).write_bytes(idx_bytes(label))
    lines = []
    for user in range(24):
        liked = torch.randperm(20, generator=g)[:9] + 20 * (user % 2)
        lines += [f"{user}\t{item}\t4\t{when}\n" for when, item in enumerate(liked.tolist())]
    lines += [f"99\t{item}\t4\t0\n" for item in range(40)]  # every item is known
    (folder / "u.data").write_text("".join(lines))
    return folder


def run(task, fused, seed=0, **options):
    model = task.model(fused, seed)
    return list(train(task, model, seed=seed, **options)), model


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("make", [Digits, Movies])
def test_training_is_deterministic_and_the_seed_matters(folder, make, fused):
    options = {"epochs": 2, "batch_size": 30}
    (rows, model), (again, twin), (other, _) = (run(make(folder), fused, seed, **options) for seed in (5, 5, 6))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [row["loss"] for row in rows] != [row["loss"] for row in other]


@pytest.mark.parametrize("make", [Digits, Movies])
def test_fused_training_follows_eager(folder, make):
    """Same seed, same batches, same negatives: after a few steps the parameters differ by rounding alone."""
    (eager_rows, eager), (fused_rows, fused) = (run(make(folder), f, epochs=1, batch_size=40) for f in (False, True))
    assert eager_rows[0]["loss"] == pytest.approx(fused_rows[0]["loss"], rel=1e-4)
    start = dict(make(folder).model(False).named_parameters())
    for name, parameter in eager.named_parameters():
        moved = (parameter - start[name]).norm()
        assert moved > 0, f"{name} was not trained"
        assert (fused.get_parameter(name) - parameter).norm() <= 0.02 * moved, name


def test_the_tasks_are_learnt(folder):
    rows, _ = run(Digits(folder), fused=False, epochs=8, batch_size=20, lr=3e-3)
    assert rows[-1]["accuracy"] > 0.9 and rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    movies = Movies(folder)
    rows, _ = run(movies, fused=False, epochs=30, batch_size=32)
    assert rows[-1]["ndcg@10"] > 1.3 * movies.popularity()["ndcg@10"]


def test_rows_steps_and_learning_rate(folder):
    steps = []
    task = Digits(folder)
    rows = list(train(task, task.model(False), epochs=2, batch_size=50, lr=0.5e-3, on_step=steps.append))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["lr"] == pytest.approx(0.5e-3 * (1 - 0.98 * 3 / 6)) and rows[1]["lr"] == pytest.approx(0.5e-3 * 0.02)
    assert all(row["seconds"] > 0 for row in rows)


def test_the_batch_size_splits_every_example_once(folder):
    """The mean loss of an epoch weighs the short last batch by its size."""
    task, seen = Digits(folder), []

    def loss(model, rows, generator):
        seen.append(rows)
        return sum(p.sum() for p in model.parameters()) * 0 + float(len(rows))

    task.loss = loss
    (row,) = train(task, task.model(False), epochs=1, batch_size=50)
    assert [len(rows) for rows in seen] == [50, 50, 20]
    assert torch.cat(seen).sort().values.tolist() == list(range(120))
    assert row["loss"] == pytest.approx((50 * 50 + 50 * 50 + 20 * 20) / 120)


def test_ranking_by_hand(folder):
    """Ranks among unseen items only; ties get the middle rank; rank 10 (from 0) misses."""
    task = Movies(folder)
    scores = torch.zeros(task.num_users, task.num_items)
    for user, item in zip(task.test_rows.user.tolist(), task.test_rows.item.tolist()):
        unseen = [i for i in range(task.num_items) if not task.seen[user, i] and i != item]
        scores[user] = 100.0  # what the user has seen must not count, however high
        scores[user, unseen] = torch.arange(len(unseen), dtype=torch.float32).flip(0)
        scores[user, item] = len(unseen) - 1 - 2.5  # three are better: rank 3
    # User 99 has one unseen item, the held-out one: rank 0. The other 24 have it at rank 3.
    found = task.ranking(scores)
    assert found["hr@10"] == 1 and found["ndcg@10"] == pytest.approx((24 / math.log2(5) + 1) / 25)
    tied = task.ranking(torch.zeros_like(scores))  # 32 unseen items, all equal: rank 15.5, a miss
    assert tied == pytest.approx({"hr@10": 1 / 25, "ndcg@10": 1 / 25})


def test_negatives_the_user_has_seen_do_not_count(folder):
    """A user who has seen everything has no negatives left: the loss is that of one candidate, zero."""
    task = Movies(folder)
    user = task.train_rows.user
    rows = (user == user.max()).nonzero().squeeze(1)  # user 99
    task.seen[user.max()] = True
    for fused in (False, True):
        assert task.loss(task.model(fused), rows, torch.Generator().manual_seed(0)).item() == 0
    others = (user == 0).nonzero().squeeze(1)
    assert task.loss(task.model(False), others, torch.Generator().manual_seed(0)).item() > 0


def test_popularity_ranks_by_count(folder):
    task = Movies(folder)
    counts = task.train_rows.item.bincount(minlength=task.num_items).float()
    assert task.popularity() == task.ranking(counts.repeat(task.num_users, 1))
    assert task.popularity() != task.ranking(-counts.repeat(task.num_users, 1))


def test_write_csv(tmp_path):
    write_csv([{"a": 1, "b": 2.5}, {"a": 3, "b": None}], tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2.5"}, {"a": "3", "b": ""}]


# --- the demo's measuring ---


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_a_large_block_and_forgets_it():
    block = mmap.mmap(-1, 64 << 20)  # not malloc, which may keep what is freed
    block.write(b"x" * (64 << 20))
    demo.reset_peak_memory()
    with_block = demo.peak_memory()
    block.close()
    demo.reset_peak_memory()
    assert 60 << 20 < with_block - demo.peak_memory() < 80 << 20


def test_processes_take_turns_and_report(folder):
    """Two real training processes: rows of every epoch, parameters that follow each other, a peak of their own."""
    jobs = [demo.Job("cnn", contender, folder, 6, 0, 1) for contender in ("eager NHWC", "fused")]
    eager, fused = demo.compete(jobs, 2, Console(file=io.StringIO()))
    assert [row["epoch"] for row in eager.rows] == [1, 2, 3, 4, 5, 6]
    reference, _ = run(Digits(folder), False, epochs=6)
    assert [row["loss"] for row in eager.rows] == pytest.approx([row["loss"] for row in reference], rel=1e-3)
    row = demo.summary(fused, eager)
    assert 0 < row["early_difference"] < 5e-3 and demo.summary(eager, eager)["early_difference"] == 0
    assert row["speed_up"] == eager.epoch_seconds / fused.epoch_seconds
    assert 50 < row["peak_mib"] < 2000
    assert row["accuracy"] == fused.rows[-1]["accuracy"] and row["hr@10"] is None


def test_a_failing_process_is_an_error_with_its_reason(tmp_path):
    job = demo.Job("cnn", "eager", tmp_path, 1, 0, 1)  # no data there
    with pytest.raises(RuntimeError, match=r"(?s)cnn, eager: training failed:.*FileNotFoundError"):
        demo.compete([job], 1, Console(file=io.StringIO()))


def test_a_dead_process_is_an_error():
    near, far = multiprocessing.Pipe()
    far.close()
    with pytest.raises(RuntimeError, match="the training process died"):
        demo.take_turn(demo.Outcome(demo.Job("cnn", "fused", None, 1, 0, 1)), near, print)


def test_table_and_curves(folder, tmp_path):
    results = []
    for task, contenders in ((Digits(folder), demo.COLORS), (Movies(folder), ("eager", "fused"))):
        outcomes = []
        for number, contender in enumerate(contenders, 1):
            outcome = demo.Outcome(demo.Job(task.name, contender, None, 2, 0, 1), peak=number << 20)
            outcome.early = {"w": torch.tensor([0.25 * number])}
            quality = {metric: 0.9 for metric in task.metrics}
            outcome.rows = [{"epoch": e, "loss": 1 / e, "seconds": 6 / number, "lr": 1} | quality for e in (1, 2)]
            outcomes.append(outcome)
        results.append((task, outcomes))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(demo.table(results))
    lines = [line for line in console.export_text().splitlines() if "fused" in line and "PyTorch" not in line]
    assert len(lines) == 2
    assert all(word in lines[0] for word in ("0.9000", "2.00", "3.00x", " 3 ", "5.0e-01"))  # the third CNN run
    assert all(word in lines[1] for word in ("0.9000", "3.00", "2.00x", " 2 ", "2.5e-01"))
    demo.plot_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
