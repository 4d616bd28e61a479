"""Servers that can answer the same question: how they are named, and in which order they are asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.lookup.shards import targets_by_shard
from online.rpc.replicas import Replicas
from pipelines.contracts.errors import InvalidConfig


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["a:1"], [["a:1"]]),
        (["a:1", "b:1"], [["a:1", "b:1"]]),
        (["0/1=a:1", "b:1"], [["a:1", "b:1"]]),
        (["1/2=b:1", "0/2=a:1", "1/2=c:1"], [["a:1"], ["b:1", "c:1"]]),
    ],
)
def test_replicas_by_shard(targets: list[str], expected: list[list[str]]) -> None:
    assert targets_by_shard(targets) == expected


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ([], "none"),
        (["0/2=a:1"], "none for 1/2"),
        (["0/3=a:1", "2/3=b:1"], "none for 1/3"),
        (["0/2=a:1", "1/2=b:1", "0/3=c:1"], "of one count"),
        (["0/2=a:1", "1/2=b:1", "c:1"], "of one count"),
        (["0/2=a:1", "1/2=a:1"], "every address once"),
        (["a:1", "a:1"], "every address once"),
        (["2/2=a:1"], "index/count"),
        (["=a:1"], "index/count"),
        (["x=a:1"], "index/count"),
    ],
)
def test_what_makes_no_whole_tier_is_refused(targets: list[str], problem: str) -> None:
    with pytest.raises(InvalidConfig, match=problem):
        targets_by_shard(targets)


@given(st.lists(st.text(max_size=10) | st.from_regex(r"[0-3]/[1-3]=[a-c]:[0-9]", fullmatch=True), max_size=5))
def test_any_targets_are_a_tier_or_are_refused(targets: list[str]) -> None:
    try:
        shards = targets_by_shard(targets)
    except InvalidConfig:
        return
    assert all(shards) and sum(map(len, shards)) == len(targets)


@pytest.fixture
def replicas():
    replicas = Replicas([f"127.0.0.1:{port}" for port in (1, 2, 3)], lambda channel: channel.unary_unary("/a/b"))
    yield replicas
    replicas.close()


def asked(replicas: Replicas, times: int, passed_over=()) -> list[str]:
    return [replicas.next(passed_over)[0].target for _ in range(times)]


def test_each_has_its_turn(replicas) -> None:
    assert sorted(asked(replicas, 3)) == sorted(asked(replicas, 3)) == [f"127.0.0.1:{port}" for port in (1, 2, 3)]


def test_who_could_not_be_reached_rests_while_there_are_others(replicas) -> None:
    first, second, third = (replicas.next(())[0] for _ in range(3))
    first.rests_until = float("inf")
    assert set(asked(replicas, 30)) == {second.target, third.target}
    assert set(asked(replicas, 30, [second])) == {third.target}
    second.rests_until = third.rests_until = 1e300  # all rest: who does so the shortest
    assert set(asked(replicas, 30)) <= {second.target, third.target}
    assert set(asked(replicas, 3, [second, third])) == {first.target}


def test_who_was_just_asked_is_asked_again_when_there_is_no_other(replicas) -> None:
    everybody = [replicas.next(())[0] for _ in range(3)]
    assert len(asked(replicas, 3, everybody)) == 3
