from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.windows import Window, Windows

GOOD = {
    "pretrain": ["2010-12-01", "2011-04-01"],
    "finetune": ["2011-04-01", "2011-07-01"],
    "validation": ["2011-07-01", "2011-09-05"],
    "test": ["2011-09-05", "2011-10-10"],
}


def test_days_become_moments_in_utc() -> None:
    window = Windows.from_dict(GOOD).finetune
    assert window.start_time == datetime(2011, 4, 1, tzinfo=UTC) and window.end_time == datetime(2011, 7, 1, tzinfo=UTC)


def test_days_as_yaml_reads_them() -> None:
    as_dates = {name: [date.fromisoformat(day) for day in days] for name, days in GOOD.items()}
    assert Windows.from_dict(as_dates) == Windows.from_dict(GOOD)


@given(st.lists(st.integers(0, 3000), min_size=8, max_size=8))
def test_exactly_ordered_windows_without_overlap_are_accepted(days: list[int]) -> None:
    start = date(2010, 1, 1)
    bounds = [start + timedelta(days=day) for day in days]
    windows = [Window(*bounds[i : i + 2]) for i in range(0, 8, 2)]
    valid = all(w.start < w.end for w in windows) and all(a.end <= b.start for a, b in pairwise(windows))
    if valid:
        assert Windows.from_dict(Windows(*windows).to_dict()) == Windows(*windows)
    else:
        with pytest.raises(InvalidConfig):
            Windows(*windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ["2011-09-05", "2011-09-05"]}, "'test' is empty"),
        ({"test": ["2011-10-05", "2011-09-05"]}, "'test' is empty"),
        ({"finetune": ["2011-03-31", "2011-07-01"]}, "'finetune' leaks the future into 'pretrain'"),
        ({"test": ["2010-01-01", "2010-02-01"]}, "'test' leaks the future into 'validation'"),
        ({"test": ["2011-09-05"]}, "'test' cannot be read"),
        ({"test": ["tomorrow", "2011-09-05"]}, "'test' cannot be read"),
        ({"test": None}, "'test' cannot be read"),
        ({"extra": ["2011-09-05", "2011-10-10"]}, "windows are incomplete"),
    ],
)
def test_bad_windows_are_named(change: dict, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        Windows.from_dict({**GOOD, **change})


@pytest.mark.parametrize("raw", [{}, None, [], {"pretrain": ["2010-12-01", "2011-04-01"]}])
def test_what_is_not_four_windows(raw: object) -> None:
    with pytest.raises(InvalidConfig, match="windows are incomplete"):
        Windows.from_dict(raw)
