"""Requests, rollouts and SIGKILLs at once, with two shards of two replicas: a short series of `make chaos`."""

from pathlib import Path

import pytest

from tests.benchmarks.chaos import series


@pytest.mark.slow
def test_no_answer_is_mixed_and_none_is_missing_while_hosts_and_controllers_die(tmp_path: Path) -> None:
    report = series(
        tmp_path, requests=1000, rollouts=1, kills=3, kill_every_s=2.0, shards=2, rows=200, concurrency=4,
        think_s=0.03, seed=1,
    )
    assert (report["mixed"], report["failed"], report["wrong_scores"]) == (0, 0, 0), report["first_failures"]
    recomputed = report["recomputed"]
    assert recomputed["checked"] == recomputed["distinguishable"] == report["requests"] >= 1000
    assert set(report["versions_seen"]) >= {"1", "2"}
    assert report["rollouts"] >= 1 and report["kills"] >= 3
    assert set(report["hostile"]) == {"silent", "unread", "many_fields", "junk", "idle_connections"}
    assert all(times >= 1 for times in report["hostile"].values()), report["hostile"]
