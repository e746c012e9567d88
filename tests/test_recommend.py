"""Exact top-k in blocks, and recommendations from a checkpoint."""

import pytest
import torch
from small_data import folder, one_thread  # noqa: F401  (fixtures)
from test_train import run, task_of

from pyfused.recommend import recommend, top_k


def problem(users, items, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    exclude = torch.stack(
        [torch.randint(users, (3 * users,), generator=g), torch.randint(items, (3 * users,), generator=g)]
    )
    return *(torch.randn(shape, generator=g) for shape in ((users, dim), (items, dim), (items,))), exclude


@pytest.mark.parametrize("block", [1, 7, 50, 64])
@pytest.mark.parametrize("k", [1, 6, 50, 60])
def test_top_k_is_that_of_the_full_matrix(block, k):
    """Blocks that divide the items, that do not, that hold fewer than k; k up to and beyond the number of items."""
    users, items, bias, exclude = problem(9, 50)
    for some_bias, left_out in ((bias, exclude), (None, None)):
        scores = users @ items.T + (0 if some_bias is None else some_bias)
        if left_out is not None:
            scores[left_out[0], left_out[1]] = -torch.inf
        found, ids = top_k(users, items, k, some_bias, left_out, block)
        expected = scores.topk(min(k, 50), 1).values
        torch.testing.assert_close(found[:, :50], expected)
        assert found.shape == ids.shape == (9, k) and (ids[found == -torch.inf] == -1).all()
        for row in range(9):
            real = ids[row][ids[row] >= 0]
            assert len(real.unique()) == len(real) == (scores[row] > -torch.inf).sum().clamp(max=k)
            torch.testing.assert_close(scores[row, real], found[row, : len(real)])


def test_top_k_stores_no_full_matrix(monkeypatch):
    largest = 0
    multiply = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        product = multiply(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    users, items, _, _ = problem(3, 1000)
    top_k(users, items, 5, block=64)
    assert largest == 3 * 64


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(*problem(2, 3)[:2], 0)


@pytest.mark.parametrize("name", ["bpr", "two-tower", "mf", "dot-concat"])
def test_recommendations_are_the_models_best_unseen_items(folder, tmp_path, name):  # noqa: F811
    task, file = task_of(name, folder), tmp_path / "run.pt"
    _, model = run(task, epochs=3, lr=2e-2, file=file)
    user, row = 7, (task.ratings.user_ids == 7).nonzero().item()
    everything = torch.arange(40)
    if name == "dot-concat":
        scores = model.score(torch.full((40,), row), everything)
    else:
        users, items, bias = model.factors()
        scores = users[row] @ items.T + bias
    rated = set(task.ratings.item[task.ratings.user == row].tolist())
    order = [item for item in scores.argsort(descending=True).tolist() if item not in rated]
    assert [item for item, _ in recommend(file, user, 5)] == task.ratings.item_ids[order[:5]].tolist()
    with_seen = recommend(file, user, 100, seen=True)
    assert [item for item, _ in with_seen] == task.ratings.item_ids[scores.argsort(descending=True)].tolist()
    assert [score for _, score in with_seen] == pytest.approx(scores.sort(descending=True).values.tolist(), rel=1e-4)
    assert recommend(file, 99, 5) == []  # has rated everything


def test_bad_users_and_checkpoints(folder, tmp_path):  # noqa: F811
    run(task_of("bpr", folder), epochs=1, file=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="user 1234 is not among the 25 users"):
        recommend(tmp_path / "run.pt", 1234, 5)
    run(task_of("small-cnn", folder), epochs=1, file=tmp_path / "cnn.pt")
    with pytest.raises(ValueError, match="of small-cnn, which recommends nothing"):
        recommend(tmp_path / "cnn.pt", 1, 5)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        recommend(tmp_path / "none.pt", 1, 5)
