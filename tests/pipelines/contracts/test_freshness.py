import logging
from dataclasses import replace
from datetime import date, timedelta

import pytest

from pipelines.contracts.errors import InvalidConfig, StalePretraining
from pipelines.contracts.freshness import FreshnessLimits, pretraining_age_days
from pipelines.contracts.windows import Window, Windows

TUNED = date(2011, 7, 1)


def windows(age_days: int) -> Windows:
    end = TUNED - timedelta(days=age_days)
    days = {"pretrain": (end - timedelta(days=30), end), "finetune": (TUNED, TUNED + timedelta(days=90))}
    days["validation"] = (days["finetune"][1], days["finetune"][1] + timedelta(days=9))
    days["test"] = (days["validation"][1], days["validation"][1] + timedelta(days=9))
    return Windows(**{name: Window(*bounds) for name, bounds in days.items()})


def test_the_age_is_the_gap_between_the_windows_and_not_their_lengths() -> None:
    assert [pretraining_age_days(windows(age)) for age in (0, 1, 200)] == [0, 1, 200]
    longer = replace(windows(5), pretrain=Window(date(2001, 1, 1), windows(5).pretrain.end))
    assert pretraining_age_days(longer) == 5


@pytest.mark.parametrize(
    ("age", "forced", "verdict"),
    [
        (0, False, "fine"), (90, False, "fine"), (91, False, "warned"), (180, False, "warned"),
        (181, False, "refused"), (181, True, "warned"), (90, True, "fine"),
    ],
)
def test_both_limits(caplog: pytest.LogCaptureFixture, age: int, forced: bool, verdict: str) -> None:
    limits = FreshnessLimits(forced=forced)
    with caplog.at_level(logging.WARNING):
        if verdict == "refused":
            with pytest.raises(StalePretraining, match="at most 180 days, got 181") as refusal:
                limits.check(windows(age), "version 7")
            said = str(refusal.value)
            assert "--force-stale" in said and not caplog.records
        else:
            limits.check(windows(age), "version 7")
            said = caplog.text
            assert bool(said) == (verdict == "warned")
    for finding in ("version 7", "2508.05700", "3 months", "-0.05 %", "6 months", "+0.00 %"):
        assert (finding in said) == (verdict != "fine")


def test_own_limits() -> None:
    FreshnessLimits(warn_days=0, refuse_days=0).check(windows(0), "it")
    with pytest.raises(StalePretraining):
        FreshnessLimits(warn_days=0, refuse_days=0).check(windows(1), "it")


@pytest.mark.parametrize("limits", [(-1, 5), (6, 5), (-2, -1)])
def test_limits_that_are_none(limits: tuple[int, int]) -> None:
    with pytest.raises(InvalidConfig, match="environment variables"):
        FreshnessLimits(*limits)
