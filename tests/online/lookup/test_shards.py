"""Which shard an id falls into, and batches cut and put together again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.lookup import shards
from online.lookup.shards import MAX_SHARDS, Shard, cut, shard_of, targets_by_shard
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.hashing import bucket_of, hash64

IDS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), max_size=60).map(
    lambda ids: np.array(ids, np.int64)
)
COUNTS = st.integers(1, 9) | st.sampled_from([64, 1000, MAX_SHARDS])


@given(IDS, COUNTS)
def test_the_formula_of_the_protocol(ids: np.ndarray, count: int) -> None:
    hashes = [int(hashed) for hashed in hash64(ids)]
    assert shard_of(ids, count).tolist() == [(hashed >> 32) * count >> 32 for hashed in hashes]
    assert shard_of(ids, count).dtype == np.int64
    np.testing.assert_array_equal(shard_of(ids, count), bucket_of(ids, buckets=count, seed=0))


def test_golden_shards() -> None:
    """Hosts and clients of any Facet must agree."""
    ids = np.array([0, 1, -1, 42, 2**62 + 1, 3141760557156334012])
    assert shard_of(ids, 2).tolist() == [0, 0, 1, 1, 0, 1]
    assert shard_of(ids, 4096).tolist() == [0, 1385, 2893, 2677, 677, 2833]


def test_shards_are_of_one_size() -> None:
    counts = np.bincount(shard_of(np.arange(100_000), 4), minlength=4)
    assert counts.sum() == 100_000 and (abs(counts - 25_000) < 1_000).all()


@given(IDS, COUNTS)
def test_a_batch_comes_back_in_order(ids: np.ndarray, count: int) -> None:
    parts, shards = cut(ids, count), shard_of(ids, count)
    whole = np.full((len(ids), 2), -1, np.int64)
    for shard in range(count):
        part = parts.of(shard)
        np.testing.assert_array_equal(part, ids[shards == shard])  # in the order of the batch
        assert Shard(shard, count).strays(part) == 0
        assert Shard(shard, count).strays(ids) == len(ids) - len(part)
        parts.put_back(shard, np.stack([part, part ^ 7], axis=1), whole)
    np.testing.assert_array_equal(whole, np.stack([ids, ids ^ 7], axis=1))


def test_ids_of_any_layout_are_cut() -> None:
    ids = np.arange(20)[::-2]
    np.testing.assert_array_equal(np.concatenate([cut(ids, 3).of(shard) for shard in range(3)]), ids[
        np.argsort(shard_of(ids, 3), kind="stable")
    ])
    assert Shard(0, 3).strays(np.frombuffer(ids.tobytes(), np.int64)) == np.count_nonzero(shard_of(ids, 3))


def test_targets_are_by_shard_in_whatever_order_they_are_named() -> None:
    assert targets_by_shard(["2/3=c:1", "0/3=a:1", "1/3=b:1", "0/3=a:2"]) == [["a:1", "a:2"], ["b:1"], ["c:1"]]
    assert targets_by_shard(["b:1", "a:1"]) == [["b:1", "a:1"]]
    for wrong, said in (
        ([], "none"), (["0/2=a:1"], "none for 1/2"), (["0/2=a:1", "a:2"], "one count"),
        (["a:1", "a:1"], "every address once"), (["0/2=a:1", "1/2=a:1"], "every address once"),
    ):
        with pytest.raises(InvalidConfig, match=said):
            targets_by_shard(wrong)


@given(st.integers(1, MAX_SHARDS).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count))))
def test_a_shard_is_what_it_prints(numbers: tuple[int, int]) -> None:
    assert Shard.parse(str(Shard(*numbers))) == Shard(*numbers)


@pytest.mark.parametrize(
    "text",
    ["", "0", "/", "0/", "/2", "2/2", "-1/2", "0/0", "0/-2", "1/2/3", "a/b", "0/4097", " 0/2", "0/2\n", "٠/٢", "1e0/2",
     "9999999999/99999999999"],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig, match="shard"):
        Shard.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_shard_or_is_refused(text: str) -> None:
    try:
        shard = Shard.parse(text)
    except InvalidConfig:
        return
    assert 0 <= shard.index < shard.count


def test_ids_off_the_wire_and_ids_that_were_made_are_one_type_to_the_kernels() -> None:
    """Else the first request of either kind compiles."""
    for asked in (np.array([1]), np.frombuffer(bytes(8), "<i8")):
        assert Shard(0, 2).strays(cut(asked, 2).of(0)) == Shard(1, 2).strays(cut(asked, 2).of(1)) == 0
        assert Shard(0, 2).strays(asked) + Shard(1, 2).strays(asked) == 1
    assert not any(signature[0].mutable for kernel in (shards._cut, shards._strays) for signature in kernel.signatures)


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
