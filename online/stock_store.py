"""The stock online store that ordinary views live in."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

from feast import FeatureView
from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from feast.utils import make_tzaware

from pipelines.contracts.locks import locked
from pipelines.contracts.workspace import Workspace

__all__ = ["StockStore", "Written"]

Written = tuple[EntityKey, dict[str, Value], datetime, datetime | None]  # entity, features, event and creation time
Progress = Callable[[int], Any] | None

_KEYS_PER_READ = 1_000  # SQLite takes so many parameters in one statement, and not every one takes many more


class StockStore:
    """A stock store and the configuration it understands: ours, with its own section as `online_store`.

    Stores that are asynchronous themselves (Redis, DynamoDB) are called as they are. The others (SQLite, MySQL) share
    one connection between threads, where two writes at a time lose rows: those are called by one thread at a time.

    Most of them write whatever comes last. Here a row is written only if none of a later second is there, so that
    materializing an older time range again leaves newer values as they are. With a store that is not asynchronous this
    also holds between the processes of a machine that write at the same time.
    """

    def __init__(self, config: RepoConfig, *, workspace: Workspace) -> None:
        self._config = RepoConfig(
            project=config.project,
            provider=config.provider,
            registry=config.registry_config,
            online_store=config.online_store.context_store,
            offline_store=config.offline_config,
            entity_key_serialization_version=config.entity_key_serialization_version,
            repo_path=config.repo_path,
        )
        self._store = get_online_store_from_config(self._config.online_store)
        supported = self._store.async_supported
        self._asynchronous = supported.read and supported.write
        self._one_at_a_time = threading.Lock()
        self._writers = workspace.root / "feast" / "context.lock"
        # of its own: waiting for a turn must not take the event loop's threads from the embedding views
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="context-store")

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of Feast's `OnlineStore` interface that takes the configuration first."""
        with self._turn():
            return getattr(self._store, method)(self._config, *arguments, **named)

    async def call_async(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The same without blocking the event loop; `method` is the synchronous one's name."""
        if self._asynchronous:
            return await getattr(self._store, f"{method}_async")(self._config, *arguments, **named)
        return await self._in_thread(partial(self.call, method, *arguments, **named))

    def write(self, table: FeatureView, rows: Sequence[Written], progress: Progress) -> None:
        """Write the rows of a view that are not older than what the store has of the same entity."""
        with self._turn(), self._only_writer():
            stored: list[datetime | None] = []
            for keys in _chunks(rows):
                stored += [time for time, _ in self._store.online_read(self._config, table, keys)]
            kept = _not_older(rows, stored)
            if kept:
                self._store.online_write_batch(self._config, table, kept, progress)
        _count_skipped(len(rows) - len(kept), progress)

    async def write_async(self, table: FeatureView, rows: Sequence[Written], progress: Progress) -> None:
        """The same without blocking the event loop."""
        if not self._asynchronous:
            return await self._in_thread(partial(self.write, table, rows, progress))
        stored: list[datetime | None] = []
        for keys in _chunks(rows):
            stored += [time for time, _ in await self._store.online_read_async(self._config, table, keys)]
        kept = _not_older(rows, stored)
        if kept:
            await self._store.online_write_batch_async(self._config, table, kept, progress)
        _count_skipped(len(rows) - len(kept), progress)

    async def initialize(self) -> None:
        await self._store.initialize(self._config)

    async def close(self) -> None:
        self._thread.shutdown(wait=False)
        await self._store.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._asynchronous:
            yield
        else:
            with self._one_at_a_time:
                yield

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Keep other processes of this machine from writing between our reading and our writing."""
        if self._asynchronous:
            yield
        else:
            self._writers.parent.mkdir(parents=True, exist_ok=True)
            self._writers.touch()
            with locked(self._writers, wait=True):
                yield

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _chunks(rows: Sequence[Written]) -> Iterator[list[EntityKey]]:
    for start in range(0, len(rows), _KEYS_PER_READ):
        yield [key for key, *_ in rows[start : start + _KEYS_PER_READ]]


def _not_older(rows: Sequence[Written], stored: Sequence[datetime | None]) -> list[Written]:
    """The rows that are not older than the stored one of the same entity, nor than one that precedes them here.

    Compared in whole seconds (UTC), which is what SQLite keeps of a time.
    """
    newest: dict[bytes, int] = {}
    kept = []
    for row, before in zip(rows, stored, strict=True):
        key, _, time, _ = row
        name = key.SerializeToString(deterministic=True)
        second = _second(time)
        if before is not None:
            newest.setdefault(name, _second(before))
        if second >= newest.get(name, second):
            newest[name] = second
            kept.append(row)
    return kept


def _second(time: datetime) -> int:
    return int(make_tzaware(time).timestamp())


def _count_skipped(count: int, progress: Progress) -> None:
    if count and progress:
        progress(count)
