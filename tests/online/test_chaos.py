"""Requests, rollouts and SIGKILLs at once, with two shards of two replicas: a short series of `make chaos`."""

import threading
from pathlib import Path

import pytest

from tests.benchmarks.chaos import series
from tests.waiting import PROGRAM_S, joined, until


@pytest.mark.slow
def test_no_answer_is_mixed_and_none_is_missing_while_hosts_and_controllers_die(tmp_path: Path) -> None:
    stop = threading.Event()

    def stop_after_what_was_asked() -> None:
        until((tmp_path / "enough").exists, PROGRAM_S)
        stop.set()

    stopping = threading.Thread(target=stop_after_what_was_asked, daemon=True)
    stopping.start()
    report = series(
        tmp_path, requests=1_000_000, rollouts=1, kills=4, kill_every_s=2.0, shards=2, rows=200, concurrency=8,
        seed=1, stop=stop,
    )
    joined(stopping)
    assert (report["mixed"], report["failed"], report["wrong_scores"]) == (0, 0, 0), report["first_failures"]
    recomputed = report["recomputed"]
    assert recomputed["checked"] == recomputed["distinguishable"] == report["requests"] > 0
    assert report["conditions"]["ended_early"]
    assert set(report["versions_seen"]) >= {"1", "2"}
    assert report["rollouts"] >= 1 and report["kills"] >= 4
    assert set(report["hostile"]) == {"silent", "unread", "many_fields", "junk", "idle_connections"}
    assert all(times >= 1 for times in report["hostile"].values()), report["hostile"]
