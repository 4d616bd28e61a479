"""The rows of versions in Redis: the same tables as segments, for those who outgrow one machine.

```
{item.kge@7}meta      the layout of a table that is whole: this key is what makes it readable
{item.kge@7}building  the layout of a table that is being written or deleted, or that a crash left
{item.kge@7}lock      held by whoever writes or deletes it; expires when that process is dead
{item.kge@7:…}…       its buckets (pipelines.contracts.packed_rows)
facet:tables          names of all of these, so that `collect` need not scan
```

Writing: lock, `building`, buckets, then in one step `meta` in and `building` out. Deleting: lock, `meta` renamed to
`building`, buckets, `building`. Wherever either stops, the table is whole or it is absent, and `building` says which
keys are left to delete. The keys are computed from the layout; nothing ever asks the server for a list of them.
"""

import hashlib
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.contracts.errors import FacetError, IntegrityError, VersionConflict, VersionNotFound
from pipelines.contracts.names import table_name, version_number
from pipelines.contracts.packed_rows import FORMAT, ID_BYTES, PackedLayout, find_rows, pack
from pipelines.contracts.redis_client import reaching
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_batches import checked_batches

__all__ = ["RedisRows", "RedisTable"]

logger = logging.getLogger(__name__)

INDEX = "facet:tables"
LEASE_S = 10.0
WRITE_BUCKETS, READ_BUCKETS, DELETE_BUCKETS = 512, 4096, 4096  # in one command, so that none holds the server up
PARTITION_BUCKETS = 65_536  # about a million rows: what is in memory at a time
PARTITIONS = 512  # at most: each is an open file

_COMMIT = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[2], ARGV[2])
redis.call('del', KEYS[3])
return 1
"""


class _Names(NamedTuple):
    meta: str
    building: str
    lock: str
    member: str

    @classmethod
    def of(cls, version: int, table: str) -> "_Names":
        name = f"{table}@{version}"
        return cls(f"{{{name}}}meta", f"{{{name}}}building", f"{{{name}}}lock", name)

    @classmethod
    def read(cls, member: bytes) -> "_Names":
        """Of a member of the index; raises ValueError if it is no table's."""
        table, _, version = member.decode().rpartition("@")
        return cls.of(version_number(version), table_name(table))


class RedisTable:
    """Batched reader of one table of one version; as safe to share between threads as the client is.

    Every value carries a checksum, which each lookup compares; a bucket that the server lost is an error, never a
    default row.
    """

    at_hand = False

    def __init__(self, client: Any, layout: PackedLayout, *, where: str, verify: bool = True) -> None:
        self.spec, self.version, self.manifest_sha256 = layout.spec, layout.version, layout.manifest_sha256
        self._client, self._layout, self._where, self._verify = client, layout, where, verify
        self._rule = layout.spec.rule
        self._default = np.frombuffer(layout.spec.default_row_bytes, np.uint8)
        # one command for any keys, or on a cluster one for each shard, side by side
        self._get = getattr(client, "mget_nonatomic", client.mget)

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch of ids; an unknown id gets the table's default row.

        Args:
            ids: int64, shape (B,); any order, repeats allowed.

        Returns:
            rows: uint8, shape (B, row_bytes).
            found: bool, shape (B,); True wherever the id rule gives the id a row, its own or a bucket's.

        Raises:
            IntegrityError: the server lost a bucket that is asked for, or has other bytes than were written.
            VersionNotFound: the table was retired meanwhile.
            Unavailable: the server does not answer.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        in_buckets = self._rule.stored_ids(ids, vocabulary=ids[:0])
        if self._rule.name == "hash":
            rows, found = self._read(in_buckets)
        elif self._rule.has_buckets:
            rows, found = self._read(np.where(ids < 0, in_buckets, ids))
            strangers = ~found
            if strangers.any():
                rows[strangers], found[strangers] = self._read(in_buckets[strangers])
        else:
            rows, found = self._read(ids)
        if self._rule.has_buckets and not found.all():
            raise self._damaged("a row for every hash bucket of ids", f"none for id {ids[~found][0]}")
        rows[~found] = self._default
        return rows, found

    def verify(self) -> None:
        """Read the whole table back; raises `IntegrityError` unless it is, byte for byte, what was written."""
        digest = hashlib.sha256()
        for run in self._layout.runs(0, self._layout.buckets, most=WRITE_BUCKETS):
            digest.update(b"".join(self._values(run)))
        if digest.hexdigest() != self._layout.sha256:
            raise self._damaged(f"sha256 {self._layout.sha256}", digest.hexdigest())

    def _read(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ids as the table has them: int64 (B,) -> uint8 (B, row_bytes), bool (B,)."""
        buckets, places = np.unique(self._layout.bucket_of(stored), return_inverse=True)
        values: list[bytes] = []
        for start in range(0, len(buckets), READ_BUCKETS):
            values += self._values(buckets[start : start + READ_BUCKETS])
        return find_rows(values, stored, places, row_bytes=self.spec.row_bytes)

    def _values(self, buckets: np.ndarray) -> list[bytes]:
        keys = self._layout.keys(buckets)
        with reaching(self._where):
            values = self._get(keys)
            if None in values:
                if not self._client.exists(_Names.of(self.version, self.spec.name).meta):
                    raise _not_there(self._where, self.version, self.spec.name)
                raise self._damaged("all of its buckets", f"no key {keys[values.index(None)].decode()}")
        if self._verify and not self._layout.are_whole(keys, values):
            pairs = zip(keys, values, strict=True)
            bad = next(key for key, value in pairs if not self._layout.are_whole([key], [value]))
            raise self._damaged("the bytes that were written", f"others under key {bad.decode()}")
        return values

    def _damaged(self, expected: str, got: str) -> IntegrityError:
        return IntegrityError(
            f"table {self.spec.name} of version {self.version} at {self._where}", expected=expected, got=got,
            remedy="Set the server's maxmemory-policy to noeviction, drop the table and materialize it again.",
        )


class RedisRows:
    """All tables in one server or cluster: `pipelines.contracts.row_store.RowStore`.

    Args:
        client: `redis.Redis` or `redis.RedisCluster`, answering with bytes.
        where: names the server in errors.
        spill: directory whose disk takes a table's rows (once) while they are put in order.
        lease_s: how long a writer may stand still before another takes it for dead.
    """

    def __init__(self, client: Any, *, where: str, spill: Path, lease_s: float = LEASE_S) -> None:
        self._client, self._where, self._spill, self._lease_s = client, where, spill, lease_s

    def describe(self, version: int, table: str) -> str:
        return f"table {table} of version {version} at {self._where}"

    def holds(self, version: int, table: str) -> bool:
        """Whether the table is there, whole."""
        with reaching(self._where):
            return bool(self._client.exists(_Names.of(version, table).meta))

    def open(
        self, version: int, table: str, *, verify: bool = True, part: tuple[int, int] | None = None
    ) -> RedisTable:
        """A reader; with `verify` each lookup compares the checksums of what it reads. Raises `VersionNotFound`."""
        names = _Names.of(version, table)
        with reaching(self._where):
            text = self._client.get(names.meta)
        if text is None:
            raise _not_there(self._where, version, table)
        layout = self._layout(names, names.meta, text)
        if layout.format != FORMAT:
            raise IntegrityError(
                self.describe(version, table), expected=f"format {FORMAT}, whose values are bound to their keys",
                got=f"format {layout.format}", remedy="Run `feast teardown`, then materialize again.",
            )
        return RedisTable(self._client, layout, where=self._where, verify=verify)

    def check(self, version: int, table: str) -> RedisTable:
        """A reader, after all of the table was read back and compared with what was written."""
        reader = self.open(version, table)
        reader.verify()
        return reader

    def write(
        self, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch],
        parent: object = None,
    ) -> None:
        """Stream record batches (`id` int64 ascending, `row` fixed-size binary) into a new table, all of its own.

        Memory is a few times a partition of about a million rows. The table can be read when all of it is there.

        Raises:
            InvalidTable: as `checked_batches`.
            VersionConflict: the table is there already, or another process is writing it.
            Unavailable: the server does not answer, or is full.
        """
        names, layout = _Names.of(version, spec.name), PackedLayout.plan(
            spec, version=version, manifest_sha256=manifest_sha256
        )
        self.collect()
        with reaching(self._where), self._locked(version, spec.name) as lock:
            if self._client.exists(names.meta):
                raise VersionConflict(
                    self.describe(version, spec.name), expected="none yet", got="a whole one",
                    remedy="Materialize again to have it confirmed, or drop it first.",
                )
            self._delete_remains(names, lock)
            self._client.sadd(INDEX, names.member)
            self._client.set(names.building, layout.to_json())
            try:
                digest = self._write_buckets(layout, batches, lock)
                meta = layout.sealed(digest).to_json()
                lock.reacquire()
                if not self._client.eval(
                    _COMMIT, 3, names.lock, names.meta, names.building, lock.local.token, meta
                ):
                    raise self._other_writer(version, spec.name)
            except BaseException:
                with suppress(FacetError), reaching(self._where):
                    if lock.owned():  # else it is the other writer's by now
                        self._delete_remains(names, lock)
                raise

    def drop(self, version: int, table: str, *, manifest_sha256: str) -> None:
        """Delete a table, if it is there and of this manifest; not readable from the first moment on."""
        names = _Names.of(version, table)
        with reaching(self._where), self._locked(version, table) as lock:
            text = self._client.get(names.meta)
            if text is not None:
                found = self._layout(names, names.meta, text).manifest_sha256
                if found != manifest_sha256:
                    logger.warning("%s is of manifest %s: kept", self.describe(version, table), found)
                    return
                self._client.rename(names.meta, names.building)
            self._delete_remains(names, lock)

    def collect(self) -> list[str]:
        """Delete what writers left that did not finish; what a living one is writing stays.

        A writer counts as dead a lease after it was last heard of.

        Returns:
            Names `table@version` of what was deleted.
        """
        collected = []
        with reaching(self._where):
            for member in sorted(self._client.smembers(INDEX)):
                try:
                    names = _Names.read(member)
                except ValueError as error:
                    logger.warning("%s of %s is not understood: %s", member, INDEX, error)
                    continue
                lock = self._lock(names)
                if self._client.exists(names.meta) or not lock.acquire(blocking=False):
                    continue
                try:
                    if not self._client.exists(names.meta):
                        self._delete_remains(names, lock)
                        collected.append(names.member)
                finally:
                    lock.release()
        return collected

    def _write_buckets(self, layout: PackedLayout, batches: Iterable[pa.RecordBatch], lock: Any) -> str:
        """Write all values; returns the SHA-256 over them."""
        digest = hashlib.sha256()
        checked = checked_batches(self._renewing(lock, batches), layout.spec)
        for first, values in self._renewing(lock, _partitions(layout, checked, self._spill)):
            for run in self._renewing(lock, layout.runs(first, first + len(values), most=WRITE_BUCKETS)):
                keys = layout.keys(run)
                sealed = layout.seal(keys, values[run[0] - first : run[-1] + 1 - first])
                digest.update(b"".join(sealed))
                self._client.mset(dict(zip(keys, sealed, strict=True)))
        return digest.hexdigest()

    def _delete_remains(self, names: _Names, lock: Any) -> None:
        """Delete the buckets that `building` speaks of, then `building` itself."""
        text = self._client.get(names.building)
        if text is not None:
            layout = self._layout(names, names.building, text)
            for run in self._renewing(lock, layout.runs(0, layout.buckets, most=DELETE_BUCKETS)):
                self._client.unlink(*layout.keys(run))
            self._client.delete(names.building)
        self._client.srem(INDEX, names.member)

    def _layout(self, names: _Names, key: str, text: bytes) -> PackedLayout:
        """The record under a key of these names; raises `IntegrityError` for another table's, as after a RENAME."""
        where = f"key {key} at {self._where}"
        layout = PackedLayout.from_json(text, where=where)
        if (found := _Names.of(layout.version, layout.spec.name).member) != names.member:
            raise IntegrityError(
                f"{where} is not in its place", expected=f"the layout of {names.member}", got=f"that of {found}",
                remedy="Delete the key and materialize the version again.",
            )
        return layout

    def _lock(self, names: _Names) -> Any:
        return self._client.lock(names.lock, timeout=self._lease_s, thread_local=False)

    @contextmanager
    def _locked(self, version: int, table: str) -> Iterator[Any]:
        """Hold the table's lock. A dead holder's runs out; a living one is told by its renewing it."""
        names = _Names.of(version, table)
        lock, left_ms = self._lock(names), math.inf
        while not lock.acquire(blocking=False):
            before_ms, left_ms = left_ms, self._client.pttl(names.lock)
            if left_ms > before_ms:
                raise self._other_writer(version, table)
            time.sleep(self._lease_s / 50)
        try:
            yield lock
        finally:
            with suppress(FacetError), reaching(self._where):
                lock.release()

    def _renewing(self, lock: Any, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with the lock renewed in between whenever a fifth of the lease has passed."""
        renewed = time.monotonic()
        for item in items:
            if time.monotonic() - renewed > self._lease_s / 5:
                lock.reacquire()
                renewed = time.monotonic()
            yield item

    def _other_writer(self, version: int, table: str) -> VersionConflict:
        return VersionConflict(
            self.describe(version, table), expected="one writer", got="another that is at work",
            remedy="Wait for it to finish, then materialize again to have its work confirmed.",
        )


def _partitions(
    layout: PackedLayout, batches: Iterable[tuple[np.ndarray, np.ndarray]], spill: Path
) -> Iterator[tuple[int, list[bytes]]]:
    """Records of all buckets, as (first bucket, those of it and of what follows), from batches in order of id.

    The rows wait in files without names, one for each partition, which the system takes back however the process ends.
    """
    width = layout.record_bytes
    span = PARTITION_BUCKETS * -(-layout.buckets // (PARTITION_BUCKETS * PARTITIONS))
    firsts = range(0, layout.buckets, span)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=spill)) for _ in firsts]
        for ids, rows in batches:
            partition = (layout.bucket_of(ids) // span).astype(np.uint16)
            order = np.argsort(partition, kind="stable")
            records = np.empty((len(ids), width), np.uint8)
            records[:, :ID_BYTES] = ids[order].astype("<i8").view(np.uint8).reshape(-1, ID_BYTES)
            records[:, ID_BYTES:] = rows[order]
            ends = np.cumsum(np.bincount(partition, minlength=len(files)))
            for file, part in zip(files, np.split(records, ends[:-1]), strict=True):
                file.write(part.data)
        for first, file in zip(firsts, files, strict=True):
            file.seek(0)
            records = np.frombuffer(file.read(), np.uint8).reshape(-1, width)
            file.close()  # its space is free from here on
            ids = np.ascontiguousarray(records[:, :ID_BYTES]).view("<i8").reshape(-1)
            count = min(span, layout.buckets - first)
            yield first, pack(records, layout.bucket_of(ids) - first, count=count)


def _not_there(where: str, version: int, table: str) -> VersionNotFound:
    return VersionNotFound(
        f"no table {table} of version {version} at {where}", expected="a materialized table", got="nothing there",
        remedy="Run `feast materialize` over the version's time.",
    )
