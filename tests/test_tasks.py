"""The tasks: what they learn, how they split and judge; checked by hand on small data."""

import math

import pytest
import torch
from small_data import folder, one_thread  # noqa: F401  (fixtures)
from test_train import run, small_models, task_of  # noqa: F401

from pyfused.tasks import TASKS, make_task
from pyfused.tasks.ranking import InBatch, InBatchUnstored, SampledNegatives
from pyfused.tasks.ratings import Ratings, SquaredError


def test_the_tasks_are_learnt(folder):  # noqa: F811
    for name, options in (
        ("mnist-cnn", {"batch_size": 20, "lr": 3e-3}),
        ("small-cnn", {}),
        ("image-folder", {"lr": 3e-3}),
        ("photo-cnn", {}),
    ):
        rows, _ = run(task_of(name, folder), **{"epochs": 8, "batch_size": 6} | options)
        assert rows[-1]["accuracy"] > 0.9 and rows[-1]["loss"] < 0.3 * rows[0]["loss"], name
    for name in ("bpr", "two-tower"):
        task = task_of(name, folder)
        rows, _ = run(task, epochs=30, batch_size=32, lr=5e-3)
        assert rows[-1]["ndcg@10"] > 1.3 * task.baselines()["popularity"]["ndcg@10"], name
    for name in ("mf", "dot-concat"):
        task = task_of(name, folder)
        rows, _ = run(task, epochs=30, batch_size=32, lr=3e-2)
        assert rows[-1]["rmse"] < 0.8 * task.baselines()["mean rating"]["rmse"], name
    rows, _ = run(task_of("gpt", folder), epochs=8, batch_size=16, lr=3e-3)
    assert rows[-1]["bits per byte"] < 1.5


def test_ranking_by_hand(folder):  # noqa: F811
    """Ranks among unseen items only; ties get the middle rank; rank 10 (from 0) misses."""
    task = SampledNegatives(folder)
    scores = torch.zeros(task.num_users, task.num_items)
    user, item = task.test_rows.user, task.test_rows.item
    for row in range(task.num_users):
        unseen = [i for i in range(task.num_items) if not task.known[row, i] and i != item[user == row].item()]
        scores[row, unseen[:3]] = 2.0
        scores[row, task.known[row]] = 5.0
    scores[user, item] = 1.0
    scores[24] = 0.0  # user 99 has seen all but one
    found = task.ranking(lambda user: scores[user])
    assert found["hr@10"] == 1 and found["ndcg@10"] == pytest.approx((24 / math.log2(5) + 1) / 25)
    tied = task.ranking(lambda user: torch.zeros(len(user), task.num_items))  # 32 unseen, all equal: rank 15.5, a miss
    assert tied == pytest.approx({"hr@10": 1 / 25, "ndcg@10": 1 / 25})


def test_ndcg_of_several_test_films_by_hand(folder):  # noqa: F811
    """User 99 rated 40 items: 4 in the test, 4 in validation, which are not ranked. Users with 9: one each."""
    task = SampledNegatives(folder, split="random")
    own = task.test_rows.item[task.test_rows.user == 24]
    assert (len(own), (~task.known[24]).sum()) == (4, 4)
    first_two, scores = own[:2], torch.zeros(25, 40)
    assert task.ranking(lambda user: scores[user])["hr@10"] == 1 / 25  # of 32 equal ones rank 15.5; of user 99's 4: 1.5
    one = task.test_rows.user == 0
    scores[0, task.test_rows.item[one]] = 1.0  # rank 0
    assert task.ranking(lambda user: scores[user])["hr@10"] == 2 / 25
    scores[24] = -1.0
    scores[24, first_two] = torch.tensor([2.0, 1.0])  # ranks 0 and 1, then a tie of two: 2.5
    gain = 1 + 1 / math.log2(3) + 2 / math.log2(4.5)
    best = sum(1 / math.log2(rank + 2) for rank in range(4))
    assert task.ranking(lambda user: scores[user])["ndcg@10"] == pytest.approx((1 + gain / best) / 25)


@pytest.mark.parametrize("fused", [False, True])
def test_negatives_the_user_has_seen_do_not_count(folder, fused):  # noqa: F811
    """A user who has seen everything has no negatives left: the loss is that of one candidate, zero."""
    task = SampledNegatives(folder)
    user = task.train_rows.user
    rows = (user == user.max()).nonzero().squeeze(1)  # user 99
    task.seen[user.max()] = True
    step = task.step(task.model(), fused)
    g = torch.Generator().manual_seed(0)
    assert step(*task.batch(rows, slice(None), g)).item() == 0
    others = (user == 0).nonzero().squeeze(1)
    assert step(*task.batch(others, slice(None), g)).item() > 0


def test_one_negative_is_bpr(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(SampledNegatives, "negatives", 1)
    task = SampledNegatives(folder)
    model = task.model()
    user, items, masked = task.batch(torch.arange(30), slice(None), torch.Generator().manual_seed(0))
    positive, negative = model(user, items).unbind(1)
    expected = torch.where(masked[:, 1], 0, -torch.nn.functional.logsigmoid(positive - negative)).mean()
    torch.testing.assert_close(task.step(model, False)(user, items, masked), expected)


@pytest.mark.parametrize("known_negatives", [False, True])
def test_the_in_batch_softmax_by_hand(folder, known_negatives):  # noqa: F811
    """Also fused, and of a part of the batch: pair by pair, with -log q, without what is no negative."""
    task = InBatch(folder, known_negatives=known_negatives)
    model = task.model()
    torch.nn.init.normal_(model.item_bias.weight)
    rows = torch.arange(40)
    user, item, own, log_q, masked = task.batch(rows, slice(None), None)
    assert len(item.unique()) < 40  # there are accidental hits
    rated = set(zip(task.train_rows.user.tolist(), task.train_rows.item.tolist()))
    users, items, bias = model.factors()
    losses = []
    for b in range(40):
        others = [c for c in range(40) if c != b and item[c] != item[b]]
        if not known_negatives:
            others = [c for c in others if (user[b].item(), item[c].item()) not in rated]
        columns = [b, *others]
        scores = users[user[b]] @ items[item[columns]].T + bias[item[columns]] - log_q[columns]
        losses.append(scores.logsumexp(0) - scores[0])
    for fused in (False, True):
        step = task.step(model, fused)
        assert isinstance(step, InBatchUnstored) == (fused and known_negatives)
        torch.testing.assert_close(step(user, item, own, log_q, masked), torch.stack(losses).mean())
        part = task.batch(rows, slice(5, 12), None)
        torch.testing.assert_close(step(*part), torch.stack(losses[5:12]).mean())
    frequency = task.train_rows.item.bincount(minlength=40) / task.size
    torch.testing.assert_close(log_q, task.log_q_power * frequency[item].log())


def test_parts_of_a_batch_make_the_whole(folder):  # noqa: F811
    """What is random must not depend on who owns what."""
    for name in TASKS:
        task = task_of(name, folder, **({"augment": True} if name in ("image-folder", "photo-cnn") else {}))
        rows, parts = torch.arange(10), (slice(0, 4), slice(4, 10))
        whole = task[rows, slice(None), 3]
        pieces = [task[rows, part, 3] for part in parts]
        for number, value in enumerate(whole):
            if name == "two-tower" and number in (1, 3):  # every process needs all items
                assert all(torch.equal(piece[number], value) for piece in pieces)
            else:
                assert torch.equal(torch.cat([piece[number] for piece in pieces]), value), name


def test_popularity_ranks_by_count(folder):  # noqa: F811
    task = SampledNegatives(folder)
    counts = task.train_rows.item.bincount(minlength=task.num_items).float()
    found = task.baselines()["popularity"]
    assert found == task.ranking(lambda user: counts.repeat(len(user), 1))
    assert found != task.ranking(lambda user: -counts.repeat(len(user), 1))


def test_the_folds_of_the_ratings_are_a_partition(folder):  # noqa: F811
    parts = [Ratings(folder, fold=k) for k in range(5)]
    pairs = [set(zip(p.test_rows.user.tolist(), p.test_rows.item.tolist())) for p in parts]
    assert len(set.union(*pairs)) == sum(map(len, pairs)) == len(parts[0].ratings)
    for part, own in zip(parts, pairs):
        assert own.isdisjoint(zip(part.train_rows.user.tolist(), part.train_rows.item.tolist()))
    with pytest.raises(ValueError, match="fold must be 0 to 4, got 5"):
        Ratings(folder, fold=5)


def test_rmse_by_hand_and_guesses_are_clipped(folder):  # noqa: F811
    task = Ratings(folder)

    class Constant(torch.nn.Linear):
        def forward(self, user, item):
            return torch.full((len(user),), 7.0)

    off = (5 - task.test_rows.rating).square().mean().sqrt().item()
    assert task.evaluate(Constant(1, 1))["rmse"] == pytest.approx(off)


def test_squared_error_by_hand(folder):  # noqa: F811
    task = Ratings(folder)
    model, (user, item, rating) = task.model(), task.batch(torch.arange(9), slice(None), None)
    p, q = model.user.weight[user], model.item.weight[item]
    error = (model.mean + (p * q).sum(1) - rating).square().mean()  # biases are zero at first
    expected = error + 0.3 * (p.square().sum(1) + q.square().sum(1)).mean()
    torch.testing.assert_close(SquaredError(model, 0.3)(user, item, rating), expected)


def test_settings_a_task_has_not_are_refused(folder):  # noqa: F811
    with pytest.raises(ValueError, match="mnist-cnn has no option fold"):
        make_task("mnist-cnn", folder, fold=1, split=None)
    with pytest.raises(ValueError, match="split must be last or random, got 'first'"):
        make_task("bpr", folder, split="first")


def test_text_windows_and_missing_files(folder, tmp_path):  # noqa: F811
    task = task_of("gpt", folder)
    tokens, following = task.batch(torch.tensor([0, 1]), slice(None), None)
    text = (folder / "text").read_bytes()
    assert bytes(tokens[0]) == text[:16] and bytes(following[0]) == text[1:17] and bytes(tokens[1]) == text[16:32]
    with pytest.raises(FileNotFoundError, match="no text file"):
        make_task("gpt", tmp_path)
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ValueError, match="3 bytes, too few"):
        make_task("gpt", tmp_path / "short")
