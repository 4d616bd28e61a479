"""Negatives were on sale, were not taken, follow popularity, and come out the same whatever the order of rows."""

import numpy as np
import pytest

from pipelines import negatives
from pipelines.negatives import draw_negatives
from pipelines.tasks import Sampled

TASK = Sampled(kinds=("buy",), negatives=3, on_sale_days=5)


def log(seed: int = 0, *, visits: int = 200, items: int = 50, days: int = 40):
    """visit, day and item of positives, and the sales they add up to."""
    random = np.random.default_rng(seed)
    size = random.integers(1, 6, visits)
    visit = np.repeat(np.arange(visits), size)
    day = np.repeat(np.sort(random.integers(0, days, visits)), size)
    item = np.concatenate([random.choice(items, n, replace=False) for n in size]).astype(np.int64)
    cells, count = np.unique(day * items + item, return_counts=True)
    return visit, day, item, (cells // items, cells % items, count)


def test_each_was_on_sale_not_taken_and_drawn_once() -> None:
    visit, day, item, sales = log()
    drawn_visit, drawn_item = draw_negatives(visit, day, item, sales=sales, task=TASK, seed=0)
    day_of = dict(zip(visit.tolist(), day.tolist(), strict=True))
    sold = set(zip(sales[0].tolist(), sales[1].tolist(), strict=True))
    taken = set(zip(visit.tolist(), item.tolist(), strict=True))
    drawn = list(zip(drawn_visit.tolist(), drawn_item.tolist(), strict=True))
    assert len(drawn) == len(set(drawn)) > 0
    assert not taken & set(drawn)
    assert all(any((day_of[v] - ago, i) in sold for ago in range(TASK.on_sale_days + 1)) for v, i in drawn)


def test_k_per_positive_where_so_many_are_on_sale_and_else_all() -> None:
    visit, day, item, sales = log()
    drawn_visit, _ = draw_negatives(visit, day, item, sales=sales, task=TASK, seed=0)
    for v in np.unique(visit):
        today = day[visit == v][0]
        on_sale = np.unique(sales[1][(sales[0] <= today) & (sales[0] >= today - TASK.on_sale_days)])
        positives = (visit == v).sum()
        assert (drawn_visit == v).sum() == min(positives * TASK.negatives, len(on_sale) - positives)


def test_the_order_of_rows_does_not_matter_but_the_seed_does() -> None:
    visit, day, item, sales = log()
    shuffle = np.random.default_rng(1).permutation(len(visit))
    shuffle_sales = np.random.default_rng(2).permutation(len(sales[0]))
    first = draw_negatives(visit, day, item, sales=sales, task=TASK, seed=0)
    again = draw_negatives(
        visit[shuffle], day[shuffle], item[shuffle], sales=tuple(c[shuffle_sales] for c in sales), task=TASK, seed=0
    )
    other = draw_negatives(visit, day, item, sales=sales, task=TASK, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_later_sales_change_no_earlier_draw() -> None:
    visit, day, item, sales = log()
    before, past = day < 20, sales[0] < 20
    whole_visit, whole_item = draw_negatives(visit, day, item, sales=sales, task=TASK, seed=0)
    cut_visit, cut_item = draw_negatives(
        visit[before], day[before], item[before], sales=tuple(c[past] for c in sales), task=TASK, seed=0
    )
    early = np.isin(whole_visit, visit[before])
    assert np.array_equal(whole_visit[early], cut_visit) and np.array_equal(whole_item[early], cut_item)


def test_two_days_alike_are_drawn_apart() -> None:
    visit, day = np.repeat([0, 1], 20), np.repeat([10, 11], 20)
    item, kept = np.tile(np.arange(20), 2), np.tile(np.arange(200), 2)
    sales = (np.repeat([10, 11], 200), kept, np.ones(400, np.int64))
    task = Sampled(kinds=("buy",), negatives=2, on_sale_days=0)
    drawn_visit, drawn_item = draw_negatives(visit, day, item, sales=sales, task=task, seed=0)
    first, second = (drawn_item[drawn_visit == number] for number in (0, 1))
    assert len(first) == len(second) == 40 and not np.array_equal(first, second)


@pytest.mark.parametrize("rounds", [negatives.REJECTION_ROUNDS, 0], ids=["by rejection", "by races"])
@pytest.mark.parametrize(("power", "expected"), [(1.0, [0.6, 0.3, 0.1]), (0.0, [1 / 3] * 3)])
def test_popularity_to_the_power(
    power: float, expected: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negatives, "REJECTION_ROUNDS", rounds)
    task = Sampled(kinds=("buy",), negatives=1, popularity_power=power)
    visits = 20_000 if rounds else 4_000  # a race is run for one visit at a time
    visit, day, item = np.arange(visits), np.zeros(visits, np.int64), np.full(visits, 9)
    sales = (np.zeros(4, np.int64), np.array([1, 2, 3, 9]), np.array([60, 30, 10, 5]))
    _, drawn = draw_negatives(visit, day, item, sales=sales, task=task, seed=0)
    share = np.bincount(drawn, minlength=4)[1:4] / visits
    assert np.allclose(share, expected, atol=2 / np.sqrt(visits))  # four standard deviations


def test_a_rare_item_is_found_when_nearly_all_is_wanted() -> None:
    """Rejection alone would hardly find it: it is drawn once in 10^9."""
    task = Sampled(kinds=("buy",), negatives=2)
    sales = (np.zeros(3, np.int64), np.array([1, 2, 3]), np.array([10**9, 10**9, 1]))
    visits, items = draw_negatives(np.array([0]), np.array([0]), np.array([1]), sales=sales, task=task, seed=0)
    assert visits.tolist() == [0, 0] and items.tolist() == [2, 3]


def test_no_positives_no_negatives() -> None:
    none = np.empty(0, np.int64)
    visits, items = draw_negatives(none, none, none, sales=(none, none, none), task=TASK, seed=0)
    assert len(visits) == len(items) == 0
