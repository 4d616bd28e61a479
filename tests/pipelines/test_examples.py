"""Examples: visits, labels that are known, and nothing of the future."""

from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest

from pipelines.contracts.windows import Window, Windows
from pipelines.examples import FOLDS, examples, examples_schema
from pipelines.tasks import Followed, Sampled
from tests.logs import canonical, day, random_events

TASKS = {
    "view": Sampled(kinds=("view",), negatives=2, on_sale_days=10),
    "buy_7d": Followed(trigger=("view",), outcome=("buy",), days=7),
}


def window(start: int, end: int) -> Window:
    return Window(date(2021, 1, 1) + timedelta(start), date(2021, 1, 1) + timedelta(end))


WINDOWS = Windows(window(0, 30), window(30, 60), window(60, 80), window(80, 100))


LOG_END = day(120)


def made(events, *, log_end=LOG_END, tasks=TASKS, seed: int = 0) -> pd.DataFrame:
    table = examples(canonical(events), windows=WINDOWS, tasks=tasks, log_end=log_end, seed=seed)
    assert table.schema == examples_schema(list(tasks))
    return table.to_pandas()


@pytest.fixture(scope="module")
def events():
    return random_events(3, events=4000, kinds=("view", "view", "buy"))


@pytest.fixture(scope="module")
def rows(events) -> pd.DataFrame:
    return made(events)


def as_frame(events) -> pd.DataFrame:
    frame = pd.DataFrame(events, columns=["user", "item", "kind", "time"])
    frame["day"] = frame["time"].dt.floor("D")
    return frame


def test_positives_are_the_items_of_the_visits(events, rows) -> None:
    frame = as_frame(events).query("kind == 'view'")
    for fold in FOLDS:
        w = getattr(WINDOWS, fold)
        inside = frame[(frame.time >= w.start_time) & (frame.time < w.end_time)]
        expected = set(zip(inside.user, inside.item, inside.day, strict=True))
        positive = rows[(rows.fold == fold) & (rows["view"] == 1)]
        got = list(zip(positive.user, positive.item, positive.event_timestamp.dt.floor("D"), strict=True))
        assert set(got) == expected and len(got) == len(expected)


def test_a_visit_has_one_time_and_that_is_its_first_event(events, rows) -> None:
    frame = as_frame(events).query("kind == 'view'")
    first = frame.groupby(["user", "day"]).time.min()
    keys = pd.MultiIndex.from_arrays([rows.user, rows.event_timestamp.dt.floor("D")])
    assert (first.reindex(keys).to_numpy() == rows.event_timestamp.to_numpy()).all()


def test_an_example_occurs_once(rows) -> None:
    assert not rows.duplicated(["user", "item", "event_timestamp"]).any()


def test_negatives_were_on_sale_and_not_seen_on_that_visit(events, rows) -> None:
    frame = as_frame(events).query("kind == 'view'")
    seen = set(zip(frame.user, frame.item, frame.day, strict=True))
    sold = set(zip(frame.item, frame.day, strict=True))
    negative = rows[rows["view"] == 0]
    assert len(negative) == 2 * len(rows[rows["view"] == 1])
    for row in negative.itertuples():
        today = row.event_timestamp.floor("D")
        assert (row.user, row.item, today) not in seen
        assert any((row.item, today - timedelta(days=ago)) in sold for ago in range(11))


def test_followed_labels_are_what_happened_and_null_while_open(events, rows) -> None:
    bought = as_frame(events).query("kind == 'buy'")
    known_until = {"finetune": WINDOWS.validation.start_time, "validation": WINDOWS.test.start_time, "test": day(120)}
    days = {pair: group.day.to_list() for pair, group in bought.groupby(["user", "item"])}
    known = 0
    for row in rows.itertuples():
        today = row.event_timestamp.floor("D")
        if row.view == 0 or today + timedelta(days=8) > known_until[row.fold]:
            assert np.isnan(row.buy_7d)
        else:
            later = [d for d in days.get((row.user, row.item), []) if timedelta(0) < d - today <= timedelta(days=7)]
            assert row.buy_7d == float(bool(later))
            known += 1
    assert known > 500 and 0 < rows.buy_7d.mean() < 1


def test_the_border_of_the_outcomes_period() -> None:
    seen = [(1, 1, "view", day(31)), (1, 1, "buy", day(31.9)), (2, 1, "view", day(31)), (2, 1, "buy", day(32)),
            (3, 1, "view", day(31)), (3, 1, "buy", day(38.99)), (4, 1, "view", day(31)), (4, 1, "buy", day(39)),
            (5, 1, "view", day(52.5)), (6, 1, "view", day(51.5)), (6, 1, "buy", day(53)), (7, 2, "view", day(30))]
    labels = made(seen).query("view == 1").set_index("user").buy_7d
    # The same day is no later day; day 7 is in, day 8 is out; 52 + 8 = 60 is when validation starts, 53 is too late.
    assert labels[[1, 2, 3, 4, 6]].to_list() == [0, 1, 1, 0, 1] and labels[5] == 0
    assert np.isnan(made([(5, 1, "view", day(53)), (1, 2, "view", day(31))]).set_index("user").buy_7d[5]).all()


def test_outcomes_after_the_next_fold_began_change_nothing(events, rows) -> None:
    """What happens from validation on leaves the fine-tuning examples as they were, negatives included."""
    past = [event for event in events if event[3] < WINDOWS.validation.start_time]
    cut = made(past, log_end=past[-1][3])
    columns = ["user", "item", "event_timestamp", "view", "buy_7d"]
    finetune = rows[rows.fold == "finetune"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(cut[cut.fold == "finetune"][columns].reset_index(drop=True), finetune)


def test_test_labels_are_null_if_the_log_ended_before_their_period(events) -> None:
    labels = made(events, log_end=day(90)).query("fold == 'test' and view == 1")
    known = labels.buy_7d.notna()
    assert (known == (labels.event_timestamp.dt.floor("D") + timedelta(days=8) <= day(90))).all() and known.any()


def test_a_trigger_that_is_only_some_of_the_kinds() -> None:
    tasks = {"seen": Sampled(kinds=("view", "buy")), "buy_7d": TASKS["buy_7d"]}
    got = made([(1, 1, "view", day(31)), (1, 2, "buy", day(31)), (1, 1, "buy", day(33))], tasks=tasks)
    labels = got.query("seen == 1").sort_values(["event_timestamp", "item"])
    assert labels.item.to_list() == [1, 2, 1]
    assert labels.buy_7d.isna().to_list() == [False, True, True] and labels.buy_7d.iloc[0] == 1


def test_the_order_of_events_does_not_matter(events, rows) -> None:
    shuffled = [events[i] for i in np.random.default_rng(0).permutation(len(events))]
    pd.testing.assert_frame_equal(made(shuffled), rows)


def test_a_share_of_the_visits_is_whole_users(events, rows) -> None:
    some = made(events, tasks={"view": Sampled(kinds=("view",), negatives=2, on_sale_days=10, visits=0.5)})
    positive, all_positive = some.query("view == 1"), rows.query("view == 1")
    assert 0.2 < positive.user.nunique() / all_positive.user.nunique() < 0.8
    kept = all_positive[all_positive.user.isin(positive.user)]
    assert len(kept) == len(positive)
