"""The stock online store that ordinary views live in."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.repo_config import RepoConfig

__all__ = ["StockStore"]


class StockStore:
    """A stock store and the configuration it understands: ours, with its own section as `online_store`.

    Stores that are asynchronous themselves (Redis, DynamoDB) are called as they are. The others (SQLite, MySQL) share
    one connection between threads, where two writes at a time lose rows: those are called by one thread at a time.
    """

    def __init__(self, config: RepoConfig) -> None:
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
        self._turn: AbstractContextManager = nullcontext() if self._asynchronous else threading.Lock()
        # of its own: waiting for a turn must not take the event loop's threads from the embedding views
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="context-store")

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of Feast's `OnlineStore` interface that takes the configuration first."""
        with self._turn:
            return getattr(self._store, method)(self._config, *arguments, **named)

    async def call_async(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The same without blocking the event loop; `method` is the synchronous one's name."""
        if self._asynchronous:
            return await getattr(self._store, f"{method}_async")(self._config, *arguments, **named)
        call: Callable[[], Any] = partial(self.call, method, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def initialize(self) -> None:
        await self._store.initialize(self._config)

    async def close(self) -> None:
        self._thread.shutdown(wait=False)
        await self._store.close()
