import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from pipelines.contracts import packed_rows
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.packed_rows import SHARDS, PackedLayout, find_rows, pack, unpack
from pipelines.contracts.spec import TableSpec

ROW_BYTES = 10
ANY_ID = st.integers(-(2**63), 2**63 - 1)
ANY_ROW = st.binary(min_size=ROW_BYTES, max_size=ROW_BYTES)


def layout(rows: int, *, table: str = "item.kge", version: int = 7, manifest: str = "1f0c9a3b55") -> PackedLayout:
    spec = TableSpec(table, 12, rows, "int4", "vocabulary", "00" * ROW_BYTES)
    return PackedLayout.plan(spec, version=version, manifest_sha256=manifest)


def records(table: dict[int, bytes]) -> np.ndarray:
    """uint8 (N, 8 + ROW_BYTES), ids and rows in the order of the dictionary."""
    joined = b"".join(key.to_bytes(8, "little", signed=True) + row for key, row in table.items())
    return np.frombuffer(joined, np.uint8).reshape(-1, 8 + ROW_BYTES)


@given(st.dictionaries(ANY_ID, ANY_ROW, max_size=60), st.integers(1, 9), st.data())
def test_what_is_packed_is_unpacked(table: dict[int, bytes], count: int, data: st.DataObject) -> None:
    sizes = st.lists(st.integers(0, count - 1), min_size=len(table), max_size=len(table))
    buckets = np.array(data.draw(sizes), np.int64)
    plan, keys = layout(1), [b"%d" % bucket for bucket in range(count)]
    values = plan.seal(keys, pack(records(table), buckets, count=count))
    assert len(values) == count and all(values) and plan.are_whole(keys, values)
    for bucket, value in enumerate(values):
        ids, rows = unpack(value, row_bytes=ROW_BYTES)
        expected = [(key, row) for (key, row), at in zip(table.items(), buckets, strict=True) if at == bucket]
        assert list(zip(ids.tolist(), map(bytes, rows), strict=True)) == expected


@pytest.mark.parametrize("count", [65_536, 65_537])
def test_a_partition_has_as_many_buckets_as_16_bits_count_or_more(count: int) -> None:
    rows = np.array([[9] * 10, [7] * 10, [8] * 10], np.uint8)
    contents = pack(rows, np.array([count - 1, 0, 1]), count=count)
    assert len(contents) == count
    assert [contents[bucket] for bucket in (0, 1, 2, count - 1)] == [b"\7" * 10, b"\10" * 10, b"", b"\t" * 10]


@settings(deadline=None)  # the first call compiles
@given(st.dictionaries(ANY_ID, ANY_ROW, max_size=60), st.lists(ANY_ID, max_size=20))
def test_finding_is_a_dictionary(table: dict[int, bytes], strangers: list[int]) -> None:
    plan = layout(len(table))
    packed = pack(records(table), plan.bucket_of(np.array([*table], np.int64)), count=plan.buckets)
    values = plan.seal(plan.keys(np.arange(plan.buckets)), packed)
    asked = np.array([*strangers, *reversed(table), *table], np.int64)
    rows, found = find_rows(values, asked, plan.bucket_of(asked), row_bytes=ROW_BYTES)
    answer = [row.tobytes() if known else None for row, known in zip(rows, found, strict=True)]
    assert answer == [table.get(key) for key in asked.tolist()]


@given(ANY_ROW, st.data())
def test_one_changed_bit_is_noticed(row: bytes, data: st.DataObject) -> None:
    plan, keys = layout(1), [b"key"]
    (value,) = plan.seal(keys, pack(records({5: row}), np.array([0]), count=1))
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    assert plan.are_whole(keys, [value]) and not plan.are_whole(2 * keys, [value, bytes(changed)])


@given(st.lists(st.binary(max_size=40), min_size=2, max_size=2))
def test_a_value_is_whole_under_its_own_key_of_its_own_manifest_only(contents: list[bytes]) -> None:
    plan, other = layout(40), layout(40, manifest="1f0c9a3b66")  # whose keys are the same: they begin alike
    first, second, _ = plan.keys(np.arange(3))
    values = plan.seal([first, second], contents)
    assert plan.are_whole([first, second], values) and other.keys(np.arange(1)) == [first]
    assert not plan.are_whole([second], values[:1]) and not plan.are_whole([first], values[1:])
    assert not other.are_whole([first], values[:1])


@pytest.mark.parametrize("value", [b"", b"\0", b"\0" * 3])
def test_a_value_too_short_for_its_checksum_is_not_whole(value: bytes) -> None:
    assert not layout(1).are_whole([b"key"], [value])


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 1_000, 450_000])
def test_runs_are_all_buckets_in_order_and_each_in_one_slot(rows: int) -> None:
    plan = layout(rows)
    runs = list(plan.runs(0, plan.buckets, most=100))
    assert np.concatenate(runs).tolist() == list(range(plan.buckets))
    assert max(map(len, runs)) <= 100
    assert all(len({key_slot(key) for key in plan.keys(run)}) == 1 for run in runs)


@pytest.mark.parametrize("version", [1, 12_345])
def test_shards_are_spread_evenly_over_the_slots_of_a_cluster(version: int) -> None:
    plan = layout(16 * SHARDS * 3, version=version)
    slots = [key_slot(key) for key in plan.keys(np.arange(plan.buckets))]
    assert [slot * SHARDS // 16_384 for slot in slots] == [bucket // 3 for bucket in range(plan.buckets)]


def test_keys_belong_to_one_bucket_of_one_table_of_one_version_of_one_manifest() -> None:
    layouts = [
        layout(5_000), layout(5_000, version=8), layout(5_000, table="item.contrastive"),
        layout(5_000, manifest="2f0c9a3b55"),
    ]
    keys = {key for plan in layouts for key in plan.keys(np.arange(plan.buckets))}
    assert len(keys) == sum(plan.buckets for plan in layouts)


def test_buckets_hold_sixteen_rows_on_average_and_never_many() -> None:
    plan = layout(200_000)
    sizes = np.bincount(plan.bucket_of(np.arange(200_000)), minlength=plan.buckets)
    assert sizes.mean() == 16 and sizes.max() < 64


def test_a_layout_is_read_back() -> None:
    plan = layout(1_000).sealed("ab" * 32)
    assert PackedLayout.from_json(plan.to_json().encode(), where="here") == plan


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3}, {"table": {"name": "item"}}, {"buckets": None, "format": None}, {"table": None},
        {"buckets": 2**40}, {"buckets": 0}, {"version": "7"}, {"version": -7}, {"sha256": 5}, {"more": 1},
    ],
    ids=str,
)
def test_a_record_that_is_no_layout(change: dict) -> None:
    text = json.dumps({**json.loads(layout(1_000).to_json()), **change})
    with pytest.raises(IntegrityError, match="here cannot be understood"):
        PackedLayout.from_json(text.encode(), where="here")
    with pytest.raises(IntegrityError, match="here cannot be understood"):
        PackedLayout.from_json(b"\xff", where="here")


def test_ids_off_the_wire_and_ids_that_were_made_are_one_type_to_the_kernel() -> None:
    """Else the first request of either kind compiles."""
    for asked in (np.array([1]), np.frombuffer(bytes(8), "<i8")):
        find_rows([bytes(4)], asked, np.zeros(1, np.int64), row_bytes=8)
    assert not any(signature[2].mutable for signature in packed_rows._find.signatures)
