"""Which of several servers is sent the next request."""

from collections.abc import Iterator
from random import Random

import pytest

from online.rpc.replicas import EJECTION_S, Replica, Replicas
from pipelines.contracts.errors import InvalidConfig

TARGETS = [f"127.0.0.1:{port}" for port in (1, 2, 3)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replicas(clock: Clock) -> Iterator[Replicas]:
    replicas = Replicas(TARGETS, lambda channel: channel.unary_unary("/a/b"), clock=clock, random=Random(0))
    yield replicas
    replicas.close()


def picked(replicas: Replicas, times: int, tried: tuple[Replica, ...] = ()) -> list[str]:
    return [replicas.pick(tried)[0].target for _ in range(times)]


def test_each_has_its_turn(replicas) -> None:
    assert sorted(picked(replicas, 3)) == sorted(picked(replicas, 3)) == TARGETS


def test_clients_begin_at_different_servers() -> None:
    def first(seed: int) -> str:
        replicas = Replicas(TARGETS, lambda channel: None, random=Random(seed))
        replicas.close()
        return replicas.pick(())[0].target

    assert {first(seed) for seed in range(20)} == {*TARGETS}


def test_an_ejected_one_is_passed_over_until_its_time_is_over(replicas, clock) -> None:
    first, second, third = (replicas.pick(())[0] for _ in range(3))
    replicas.eject(first)
    assert {*picked(replicas, 30)} == {second.target, third.target}
    assert {*picked(replicas, 30, (second,))} == {third.target}
    clock.now = 0.9 * EJECTION_S
    replicas.eject(third)
    assert {*picked(replicas, 30)} == {second.target}
    clock.now = EJECTION_S
    assert {*picked(replicas, 30)} == {first.target, second.target}
    clock.now = 1.9 * EJECTION_S
    assert sorted(picked(replicas, 3)) == TARGETS


def test_of_ejected_ones_the_one_that_was_ejected_first_is_asked(replicas, clock) -> None:
    first, second, third = (replicas.pick(())[0] for _ in range(3))
    for clock.now, replica in ((0.0, second), (0.1, third), (0.2, first)):
        replicas.eject(replica)
    assert {*picked(replicas, 30)} == {second.target}
    assert {*picked(replicas, 3, (second, third))} == {first.target}


def test_who_was_tried_is_asked_again_when_there_is_no_other(replicas) -> None:
    all_of_them = tuple(replicas.pick(())[0] for _ in range(3))
    assert sorted({*picked(replicas, 60, all_of_them)}) == TARGETS


def test_connections_of_a_server_are_used_in_turn() -> None:
    replicas = Replicas(["127.0.0.1:1"], lambda channel: channel, connections=3)
    methods = [replicas.pick(())[1] for _ in range(6)]
    replicas.close()
    assert len({*methods}) == 3 and methods[:3] == methods[3:]


@pytest.mark.parametrize(
    ("targets", "connections", "problem"),
    [([], 1, "at least one"), (["127.0.0.1:1"], 0, "connections"), (["nowhere"], 1, "host:port")],
)
def test_what_makes_no_client_is_refused(targets, connections, problem) -> None:
    with pytest.raises(InvalidConfig, match=problem):
        Replicas(targets, lambda channel: channel, connections=connections)
