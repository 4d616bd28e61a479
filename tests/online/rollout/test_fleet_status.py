"""Whether what hosts hold fits together."""

import pytest

from online.rollout.fleet_status import CpuHost, FleetStatus, InvariantViolated
from pipelines.contracts.errors import InvalidConfig

CPU = CpuHost(loaded={1: "a", 2: "b"}, answering=frozenset({1}), preferred=1)


def test_the_invariant_compares_manifests_not_only_numbers() -> None:
    FleetStatus({"cpu": CPU}, {"ranker": {1: "a"}}).check()
    with pytest.raises(InvariantViolated, match="another manifest"):
        FleetStatus({"cpu": CPU}, {"ranker": {1: "other"}}).check()
    with pytest.raises(InvariantViolated, match="can answer version 1: expected it loaded on ranker bad"):
        FleetStatus({"cpu": CPU}, {"good": {1: "a"}, "bad": {2: "b"}}).check()


@pytest.mark.parametrize(
    ("shards", "fit"),
    [
        ([(0, 1), (0, 1)], True), ([(0, 2), (1, 2), (1, 2)], True),
        ([(0, 2)], False), ([(0, 2), (0, 1)], False), ([(0, 2), (1, 3)], False),
    ],
)
def test_every_shard_is_needed(shards, fit) -> None:
    hosts = {str(i): CpuHost({1: "a"}, frozenset({1}), 1, shard=s, shards=n) for i, (s, n) in enumerate(shards)}
    status = FleetStatus(hosts, {})
    if fit:
        status.check_shards()
    else:
        with pytest.raises(InvalidConfig, match="Name every CPU host"):
            status.check_shards()


def test_what_is_common_and_what_lies_anywhere() -> None:
    other = CpuHost(loaded={2: "b", 3: "c"}, answering=frozenset({2, 3}), preferred=3)
    status = FleetStatus({"a": CPU, "b": other}, {"r": {4: "d", 2: "x"}})
    assert (status.common, status.versions, status.manifests(2)) == (frozenset(), [1, 2, 3, 4], {"b", "x"})
