import json
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from redis.crc import key_slot

from pipelines.contracts import redis_rows
from pipelines.contracts.errors import (
    IntegrityError,
    InvalidConfig,
    InvalidTable,
    Unavailable,
    VersionConflict,
    VersionNotFound,
)
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.packed_rows import PackedLayout
from pipelines.contracts.redis_client import connect, without_password
from pipelines.contracts.redis_rows import RedisRows
from pipelines.contracts.spec import TableSpec
from tests.crash import run_child
from tests.redis_server import RedisServer, redis_cluster
from tests.waiting import until

MANIFEST = "ab" * 32
ROW_BYTES = 10
DEFAULT = bytes(range(ROW_BYTES))
EXTREMES = [-(2**63), -1, 0, 2**62 + 1, 2**63 - 1]
RULES = [IdRule(), IdRule("vocabulary+buckets", 50, 3), IdRule("hash", 300, 4)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    client = server.client()
    client.flushall()
    return client


@pytest.fixture
def store(client: redis.Redis, tmp_path: Path) -> RedisRows:
    return store_of(client, tmp_path)


def store_of(client: Any, spill: Path, *, lease_s: float = 5.0) -> RedisRows:
    return RedisRows(client, where="the server", spill=spill, lease_s=lease_s)


class Table:
    """Rows of a table under an id rule, and what a reader must answer."""

    def __init__(self, rows: int, *, rule: IdRule = RULES[0], seed: int = 0, name: str = "item.kge") -> None:
        rng = np.random.default_rng(seed)
        low = 0 if rule.has_buckets else -(2**63)
        self.vocabulary = np.unique(rng.integers(low, 2**63 - 1, 0 if rule.name == "hash" else rows, endpoint=True))
        self.ids = np.concatenate([rule.all_bucket_ids(), self.vocabulary])
        self.rows = rng.integers(0, 256, (len(self.ids), ROW_BYTES), dtype=np.uint8)
        self.rule = rule
        self.spec = TableSpec(
            name, 12, len(self.ids), "int4", rule.name, DEFAULT.hex(), rule.buckets, rule.seed
        )

    def batches(self, size: int = 64) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(self.ids), size):
            rows = [row.tobytes() for row in self.rows[start : start + size]]
            yield pa.record_batch(
                {"id": pa.array(self.ids[start : start + size]), "row": pa.array(rows, pa.binary(ROW_BYTES))}
            )

    def expected(self, asked: np.ndarray) -> list[bytes | None]:
        held = {int(key): row.tobytes() for key, row in zip(self.ids, self.rows, strict=True)}
        return [held.get(key) for key in self.rule.stored_ids(asked, vocabulary=self.vocabulary).tolist()]

    def write(self, store: RedisRows, version: int = 7, manifest: str = MANIFEST) -> None:
        store.write(spec=self.spec, version=version, manifest_sha256=manifest, batches=self.batches())

    def require_served(self, store: RedisRows, version: int = 7) -> None:
        """Raise unless every row, and many ids without one, are answered as they must be."""
        strangers = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 200)
        asked = np.concatenate([self.ids, EXTREMES, strangers, self.ids[:3]])
        np.random.default_rng(2).shuffle(asked)
        rows, found = store.open(version, self.spec.name).lookup(asked)
        expected = self.expected(asked)
        assert found.tolist() == [row is not None for row in expected]
        assert [row.tobytes() for row in rows] == [row or DEFAULT for row in expected]


class Clock:
    """Stands in for `time`: it passes when a test says so, here and in what the lock has left on the server."""

    def __init__(self, client: redis.Redis, lock: str = "{item.kge@7}lock") -> None:
        self.client, self.lock, self.now_s = client, lock, 0.0

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds
        if (left_ms := self.client.pttl(self.lock)) > 0:
            self.client.pexpire(self.lock, left_ms - round(seconds * 1000))  # at zero the server deletes it

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pass_by(seconds)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_every_id_reads_what_its_rule_says(store: RedisRows, rule: IdRule, rows: int) -> None:
    table = Table(rows, rule=rule)
    table.write(store)
    table.require_served(store)
    reader = store.check(7, "item.kge")
    assert (reader.spec, reader.version, reader.manifest_sha256) == (table.spec, 7, MANIFEST)


def test_an_empty_batch_of_ids(store: RedisRows) -> None:
    Table(20).write(store)
    rows, found = store.open(7, "item.kge").lookup(np.empty(0, np.int64))
    assert rows.shape == (0, ROW_BYTES) and found.shape == (0,)


def test_partitions_change_nothing(store: RedisRows, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(2_000)
    table.write(store)
    whole = {key: client.get(key) for key in client.scan_iter("{item.kge@7*") if b"/" in key}
    client.flushall()
    monkeypatch.setattr(redis_rows, "PARTITION_BUCKETS", 3)
    monkeypatch.setattr(redis_rows, "PARTITIONS", 10)
    table.write(store)
    table.require_served(store)
    assert {key: client.get(key) for key in client.scan_iter("{item.kge@7*") if b"/" in key} == whole


def test_the_lock_is_renewed_over_many_short_partitions(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes less than a fifth of the lease, all together take longer than the lease."""
    pack, lease_s, clock = redis_rows.pack, 600.0, Clock(client)

    def slow_pack(*args: Any, **kwargs: Any) -> list[bytes]:
        clock.pass_by(lease_s / 25)
        return pack(*args, **kwargs)

    monkeypatch.setattr(redis_rows, "time", clock)
    monkeypatch.setattr(redis_rows, "pack", slow_pack)
    monkeypatch.setattr(redis_rows, "PARTITION_BUCKETS", 3)
    table, store = Table(2_000), store_of(client, tmp_path, lease_s=lease_s)
    table.write(store)
    assert clock.now_s > lease_s
    table.require_served(store)


def test_the_lock_is_renewed_within_a_partition(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One partition of many commands, which together take longer than the lease."""
    lease_s, clock, mset = 600.0, Clock(client), client.mset

    def slow_mset(values: dict[bytes, bytes]) -> None:
        clock.pass_by(lease_s / 4)
        mset(values)

    monkeypatch.setattr(redis_rows, "time", clock)
    monkeypatch.setattr(redis_rows, "WRITE_BUCKETS", 8)
    monkeypatch.setattr(client, "mset", slow_mset)
    table, store = Table(1_000), store_of(client, tmp_path, lease_s=lease_s)
    table.write(store)
    assert clock.now_s > lease_s
    table.require_served(store)


def test_whoever_loses_the_lock_before_the_last_step_does_not_finish(
    store: RedisRows, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last renewal and its commit the lock ran out, and another writer came."""
    commit, lock = client.eval, "{item.kge@7}lock"

    def too_late(*arguments: Any) -> Any:
        client.set(lock, "another")
        return commit(*arguments)

    monkeypatch.setattr(client, "eval", too_late)
    with pytest.raises(VersionConflict, match="another that is at work"):
        Table(300).write(store)
    assert not store.holds(7, "item.kge") and client.get(lock) == b"another"
    assert client.exists("{item.kge@7}building") and bucket_keys(client)  # the other writer's


def test_large_lookups_are_split(store: RedisRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_rows, "READ_BUCKETS", 3)
    table = Table(500)
    table.write(store)
    table.require_served(store)


@pytest.mark.slow
def test_a_row_of_36_bytes_takes_at_most_60(client: redis.Redis, store: RedisRows) -> None:
    count, width = 1_000_000, 36
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 2**63 - 1, count))
    spec = TableSpec("item.kge", 64, len(ids), "int4", "vocabulary", "00" * width)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(ids), 65_536):
            some = ids[start : start + 65_536]
            rows = pa.py_buffer(rng.bytes(len(some) * width))
            column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(some), [None, rows])
            yield pa.record_batch({"id": pa.array(some), "row": column})

    before = client.info("memory")["used_memory"]
    store.write(spec=spec, version=1, manifest_sha256=MANIFEST, batches=batches())
    assert (client.info("memory")["used_memory"] - before) / len(ids) <= 60


def sealed(table: Table, key: bytes, content: bytes) -> bytes:
    """A whole value."""
    return PackedLayout.plan(table.spec, version=7, manifest_sha256=MANIFEST).seal([key], [content])[0]


def bucket_keys(client: redis.Redis) -> list[bytes]:
    return sorted(key for key in client.scan_iter() if b"}0" in key)


def test_a_bucket_that_the_server_lost_is_an_error(store: RedisRows, client: redis.Redis) -> None:
    table = Table(100)
    table.write(store)
    reader, (lost, *_) = store.open(7, "item.kge"), bucket_keys(client)
    client.delete(lost)
    with pytest.raises(IntegrityError, match=f"no key {lost.decode()}.*noeviction"):
        reader.lookup(table.ids)
    with pytest.raises(IntegrityError, match="no key"):
        store.check(7, "item.kge")


def test_altered_values_are_not_served(store: RedisRows, client: redis.Redis) -> None:
    table = Table(100)
    table.write(store)
    key = bucket_keys(client)[0]
    value = bytearray(client.get(key))
    value[9] ^= 1
    client.set(key, bytes(value))
    with pytest.raises(IntegrityError, match=f"others under key {key.decode()}"):
        store.open(7, "item.kge").lookup(table.ids)
    store.open(7, "item.kge", verify=False).lookup(table.ids)


def test_values_under_each_others_keys_are_not_served(store: RedisRows, client: redis.Redis) -> None:
    table = Table(100)
    table.write(store)
    first, second, *_ = sorted(bucket_keys(client), key=lambda key: key[-8:])
    for source, target in ((first, b"aside"), (second, first), (b"aside", second)):
        client.rename(source, target)
    for ask in (lambda: store.open(7, "item.kge").lookup(table.ids), lambda: store.check(7, "item.kge")):
        with pytest.raises(IntegrityError, match=f"others under key {first.decode()}"):
            ask()


@pytest.mark.parametrize("other", ["version", "manifest", "table"])
def test_values_of_another_table_are_not_served(store: RedisRows, client: redis.Redis, other: str) -> None:
    table = Table(100)
    table.write(store)
    theirs = {"version": {"version": 8}, "manifest": {"version": 8, "manifest": "cd" * 32}, "table": {}}[other]
    Table(100, seed=0, name="user.kge" if other == "table" else "item.kge").write(store, **theirs)
    own, others = ([key for key in bucket_keys(client) if (b"{item.kge@7:" in key) == ours] for ours in (True, False))
    assert len(own) == len(others) == 7
    for target, source in zip(own, others, strict=True):
        client.rename(source, target)
    with pytest.raises(IntegrityError, match="others under key"):
        store.open(7, "item.kge").lookup(table.ids)


def test_a_record_under_another_tables_key_is_neither_read_nor_deleted_by(
    store: RedisRows, client: redis.Redis
) -> None:
    table = Table(100)
    table.write(store)
    table.write(store, 8)
    for record in ("meta", "building"):
        client.copy("{item.kge@7}meta", f"{{item.kge@8}}{record}", replace=True)
    buckets = bucket_keys(client)
    with pytest.raises(IntegrityError, match=r"expected the layout of item\.kge@8, got that of item\.kge@7"):
        store.open(8, "item.kge")
    client.delete("{item.kge@8}meta")
    with pytest.raises(IntegrityError, match="not in its place"):
        store.drop(8, "item.kge", manifest_sha256=MANIFEST)
    assert bucket_keys(client) == buckets
    table.require_served(store)


def test_names_in_the_index_that_are_no_tables_stop_nobody(store: RedisRows, client: redis.Redis) -> None:
    names = ["item.kge@²", "item.kge@", "../x@7", "item.kge@07", b"\xff@7", "item.kge"]
    client.sadd("facet:tables", *names)
    Table(100).write(store)
    assert store.collect() == [] and client.scard("facet:tables") == len(names) + 1


def test_a_table_of_the_format_before_is_refused_and_can_be_dropped(store: RedisRows, client: redis.Redis) -> None:
    Table(100).write(store)
    layout = json.loads(client.get("{item.kge@7}meta"))
    client.set("{item.kge@7}meta", json.dumps({**layout, "format": 1}))
    with pytest.raises(IntegrityError, match="got format 1"):
        store.open(7, "item.kge")
    store.drop(7, "item.kge", manifest_sha256=MANIFEST)
    assert client.dbsize() == 0


def test_whole_values_that_are_not_the_ones_written_fail_the_check(store: RedisRows, client: redis.Redis) -> None:
    table = Table(100)
    table.write(store)
    first, *_ = bucket_keys(client)
    client.set(first, sealed(table, first, b""))
    with pytest.raises(IntegrityError, match="expected sha256"):
        store.check(7, "item.kge")


def test_a_row_of_a_hash_bucket_that_is_missing_is_an_error(store: RedisRows, client: redis.Redis) -> None:
    table = Table(0, rule=RULES[2])
    table.write(store)
    for key in bucket_keys(client):
        client.set(key, sealed(table, key, b""))
    with pytest.raises(IntegrityError, match="a row for every hash bucket"):
        store.open(7, "item.kge").lookup(np.array([5]))


def test_a_table_that_is_not_there(store: RedisRows) -> None:
    assert not store.holds(7, "item.kge")
    with pytest.raises(VersionNotFound, match=r"no table item\.kge of version 7 at the server.*feast materialize"):
        store.open(7, "item.kge")


def test_a_table_that_is_retired_while_it_is_read(store: RedisRows) -> None:
    table = Table(100)
    table.write(store)
    reader = store.open(7, "item.kge")
    store.drop(7, "item.kge", manifest_sha256=MANIFEST)
    with pytest.raises(VersionNotFound, match="version 7"):
        reader.lookup(table.ids)


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    table = Table(100)
    with RedisServer() as server:
        store = store_of(server.client(), tmp_path)
        table.write(store)
        reader = store.open(7, "item.kge")
        os.kill(server.pid, signal.SIGKILL)
        for ask in (partial(reader.lookup, table.ids), partial(store.open, 7, "item.kge"), partial(table.write, store)):
            with pytest.raises(Unavailable, match="Redis at the server"):
                ask()
        with pytest.raises(Unavailable, match=f"unix://{server.socket_path}"):
            connect(server.url)


def test_a_server_that_is_full(tmp_path: Path) -> None:
    with RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        client = server.client()
        store = store_of(client, tmp_path)
        with pytest.raises(Unavailable, match="OutOfMemory"):
            Table(100_000).write(store)
        assert client.dbsize() == 0


@pytest.mark.parametrize("url", ["redis:/nowhere:x", "segment", "http://127.0.0.1", ""])
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(InvalidConfig, match="'segments' or a URL"):
        connect(url)


PASSWORDS = [
    "qqplain", *(f"qqleft{character}qqright" for character in "/?#@:"), "6317/6329", "6317?6329", "6317#6329",
    "qqleft?qqright@qqend",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("form", ["redis://{}@127.0.0.1:1/0", "unix://{}@/run/s", "nothing://{}@h", "{}@h"])
def test_no_part_of_a_password_is_shown(password: str, form: str) -> None:
    shown = without_password(form.format(f"user:{password}"))
    assert not set(re.split("[/?#@:]", password)) & set(re.split("[/?#@:]", shown)) and "***" in shown


@pytest.mark.parametrize("password", PASSWORDS)
def test_no_error_of_the_client_shows_a_password(password: str) -> None:
    url = f"redis://user:{password}@127.0.0.1:1/0?socket_connect_timeout=0.5"
    with pytest.raises((InvalidConfig, Unavailable)) as refusal:
        connect(url)
    told = "".join(traceback.format_exception(refusal.value))
    for piece in re.split("[/?#@:]", password):
        assert not re.search(rf"\b{piece}\b", told), told


def test_a_place_without_a_password_is_shown() -> None:
    assert without_password("redis://host:6379/3?protocol=2") == "redis://host:6379/3"
    assert without_password("unix:///run/redis.sock?db=0") == "unix:///run/redis.sock"


def test_a_bad_table_leaves_nothing(store: RedisRows, client: redis.Redis) -> None:
    table = Table(100)
    with pytest.raises(InvalidTable, match="100 rows, got 64"):
        store.write(spec=table.spec, version=7, manifest_sha256=MANIFEST, batches=[next(table.batches())])
    assert client.dbsize() == 0


def test_a_table_is_never_written_over(store: RedisRows) -> None:
    table = Table(100)
    table.write(store)
    for manifest in (MANIFEST, "cd" * 32):
        with pytest.raises(VersionConflict, match="got a whole one"):
            Table(100, seed=1).write(store, manifest=manifest)
    table.require_served(store)


def test_of_two_writers_one_wins_and_the_other_is_told(
    tmp_path: Path, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes while the second waits; meanwhile the first has its turns to renew."""
    table, told, turns = Table(300), threading.Event(), threading.Semaphore(0)
    first, second = (store_of(client, tmp_path, lease_s=600.0) for _ in range(2))

    class SharedClock(Clock):
        def sleep(self, seconds: float) -> None:
            self.pass_by(seconds)
            assert self.now_s < 6_000, "ten leases later it still waits"
            for _ in range(3):  # a turn that began before, one that renews, and its end
                assert turns.acquire(timeout=120)

    monkeypatch.setattr(redis_rows, "time", SharedClock(client))

    def slow_batches() -> Iterator[pa.RecordBatch]:
        yield from table.batches()
        while not told.wait(0.001):
            while turns.acquire(blocking=False):  # only turns that somebody waits for count
                pass
            turns.release()
            yield pa.record_batch({"id": pa.array([], pa.int64()), "row": pa.array([], pa.binary(ROW_BYTES))})

    winner = threading.Thread(
        target=first.write,
        kwargs={"spec": table.spec, "version": 7, "manifest_sha256": MANIFEST, "batches": slow_batches()},
    )
    winner.start()
    try:
        until(lambda: client.exists("{item.kge@7}building"), seconds=120)
        with pytest.raises(VersionConflict, match="another that is at work"):
            table.write(second)
        assert not second.holds(7, "item.kge") and second.collect() == []
    finally:
        told.set()
        winner.join(120)
    assert not winner.is_alive()
    table.require_served(second)


def test_a_writer_that_stood_still_too_long_does_not_finish(store: RedisRows, client: redis.Redis) -> None:
    table = Table(300)

    def batches() -> Iterator[pa.RecordBatch]:
        yield from table.batches()
        client.set("{item.kge@7}lock", "another")  # as if the lock had run out and another writer had come

    with pytest.raises(VersionConflict, match="the table's lock"):
        store.write(spec=table.spec, version=7, manifest_sha256=MANIFEST, batches=batches())
    assert not store.holds(7, "item.kge")
    assert client.exists("{item.kge@7}building")  # the other writer's


def test_whoever_lost_the_lock_deletes_no_further(
    store: RedisRows, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Table(300).write(store)
    buckets, unlink = len(bucket_keys(client)), client.unlink
    monkeypatch.setattr(redis_rows, "DELETE_BUCKETS", 1)

    clock = Clock(client)

    def unlink_slowly(*keys: bytes) -> None:
        clock.pass_by(200)
        client.set("{item.kge@7}lock", "another")
        unlink(*keys)

    monkeypatch.setattr(redis_rows, "time", clock)
    monkeypatch.setattr(client, "unlink", unlink_slowly)
    with pytest.raises(VersionConflict, match="the table's lock"):
        store_of(client, tmp_path, lease_s=600).drop(7, "item.kge", manifest_sha256=MANIFEST)
    assert len(bucket_keys(client)) == buckets - 1


def test_records_that_are_not_understood_are_named(store: RedisRows, client: redis.Redis) -> None:
    client.set("{item.kge@7}meta", "{}")
    for ask in (store.open, partial(store.drop, manifest_sha256=MANIFEST)):
        with pytest.raises(IntegrityError, match=r"key \{item\.kge@7\}meta at the server cannot be understood"):
            ask(7, "item.kge")


def test_materializing_one_table_collects_what_is_left_of_others(store: RedisRows, client: redis.Redis) -> None:
    Table(300).write(store)
    client.rename("{item.kge@7}meta", "{item.kge@7}building")  # as a drop leaves it that was killed
    Table(30, name="user.kge").write(store)
    assert {key.partition(b"@")[0] for key in client.scan_iter("{*")} == {b"{user.kge"}


def commands(client: redis.Redis) -> set[str]:
    return {name.removeprefix("cmdstat_").partition("|")[0] for name in client.info("commandstats")}


def test_dropping_a_version_touches_no_other_and_scans_nothing(store: RedisRows, client: redis.Redis) -> None:
    tables = {version: Table(2_000, seed=version) for version in (1, 2, 12)}
    for version, table in tables.items():
        table.write(store, version)
    one, kept = tables.pop(1), Table(500, name="user.kge")
    kept.write(store, 1)
    before = client.dbsize()
    client.config_resetstat()
    store.drop(1, "item.kge", manifest_sha256=MANIFEST)
    assert commands(client) & {"scan", "keys", "randomkey", "flushdb", "sort"} == set()
    assert "unlink" in commands(client)
    assert before - client.dbsize() == -(-len(one.ids) // 16) + 1  # its buckets and its meta
    for version, table in tables.items():
        table.require_served(store, version)
    kept.require_served(store, 1)
    for version in tables:
        store.drop(version, "item.kge", manifest_sha256=MANIFEST)
    store.drop(1, "user.kge", manifest_sha256=MANIFEST)
    assert client.dbsize() == 0


def test_what_is_of_another_manifest_is_not_dropped(store: RedisRows, caplog: pytest.LogCaptureFixture) -> None:
    table = Table(100)
    table.write(store)
    store.drop(7, "item.kge", manifest_sha256="cd" * 32)
    assert "kept" in caplog.text
    table.require_served(store)


def act_and_die(url: str, spill: Path, action: str, at_command: int) -> None:
    """Write or drop version 7, killed by SIGKILL instead of sending its command number `at_command`."""
    sent = count(1)
    send = redis.connection.AbstractConnection.send_packed_command

    def send_or_die(connection: Any, *arguments: Any, **named: Any) -> None:
        if next(sent) == at_command:
            os.kill(os.getpid(), signal.SIGKILL)
        send(connection, *arguments, **named)

    store = store_of(redis.from_url(url), spill, lease_s=0.5)
    store.holds(1, "item.kge")  # connected
    redis.connection.AbstractConnection.send_packed_command = send_or_die
    if action == "write":
        Table(30, seed=7).write(store)
    else:
        store.drop(7, "item.kge", manifest_sha256=MANIFEST)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["write", "drop"])
def test_killed_before_any_command(server: RedisServer, client: redis.Redis, tmp_path: Path, action: str) -> None:
    """Whatever the instant: the table is whole or absent, other versions answer, and retry and collection succeed."""
    store = store_of(client, tmp_path, lease_s=0.5)
    other, table = Table(30, seed=1), Table(30, seed=7)
    other.write(store, 6)
    alone = client.dbsize()
    for at_command in count(1):
        if action == "drop":
            table.write(store)
        outcome = run_child(act_and_die, server.url, tmp_path, action, at_command, root=tmp_path)
        assert not outcome.error
        if not outcome.killed:
            break
        other.require_served(store, 6)
        if store.holds(7, "item.kge"):
            table.require_served(store)
        elif at_command % 2:
            until(lambda: (store.collect(), client.dbsize() == alone)[1], seconds=120)  # its lock runs out
        else:
            table.write(store)
            table.require_served(store)
        store.drop(7, "item.kge", manifest_sha256=MANIFEST)
        assert client.dbsize() == alone
    assert at_command > 8, "too few commands: the child cannot have done its work"
    assert store.holds(7, "item.kge") == (action == "write")


@pytest.mark.slow
def test_a_cluster(tmp_path: Path) -> None:
    """Every node gets its share, and the table is written, read, checked and dropped as on one server."""
    table = Table(20_000)
    with redis_cluster(nodes=3) as servers:
        client = connect(servers[0].tcp_url)
        assert isinstance(client, redis.RedisCluster)
        store = store_of(client, tmp_path)
        table.write(store)
        sizes = [server.client().dbsize() for server in servers]
        assert min(sizes) > 0.9 * sum(sizes) / 3
        table.require_served(store)
        store.check(7, "item.kge")
        with pytest.raises(VersionConflict):
            table.write(store)
        for server in servers:
            for key in server.client().scan_iter():
                assert key_slot(key) * 3 // 16_384 == servers.index(server)
        store.drop(7, "item.kge", manifest_sha256=MANIFEST)
        assert sum(server.client().dbsize() for server in servers) == 0
        client.close()
