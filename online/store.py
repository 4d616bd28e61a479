"""The online store behind `get_online_features`: embedding rows from segments or Redis, the rest from a stock store."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureService, FeatureView
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.metrics import track_feature_statuses
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import _get_table_entity_values
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ConfigDict, Field

from online.feast_request import EntityRows, RequestRefused, ids_of, refuse_search, refuse_write, require_ids
from online.stock_store import StockStore, Written
from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.quiet_exit import release_duckdb_at_exit
from pipelines.contracts.row_store import SEGMENTS, RowReader, row_store
from pipelines.contracts.workspace import Workspace

__all__ = ["FacetOnlineStore", "FacetOnlineStoreConfig", "RequestRefused"]

logger = logging.getLogger(__name__)
release_duckdb_at_exit()  # here, because every process that opens the feature repository imports this module
# Feast says so wherever the setting is used with a registry file; it does have an effect there, and the one wanted.
logging.getLogger("feast.repo_config").addFilter(
    lambda record: "`serve_features_while_materializing` is enabled but" not in record.getMessage()
)

Read = tuple[datetime | None, dict[str, Value] | None]
Groups = list[tuple[FeatureView, list[str]]]  # what Feast calls grouped_refs: views and the features wanted of each

ABSENT: Read = (None, None)
NO_VALUE, NO_TIME = Value(), Timestamp()


class FacetOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store:` of `feature_store.yaml`; relative paths are relative to the feature repository.

    Attributes:
        workspace: where versions and segments lie.
        rows: where rows of embedding views lie: `segments`, or the URL of a Redis server or cluster, such as
            redis://127.0.0.1:6379/0 or unix:///run/redis.sock. `feast materialize` writes them there.
        context_store: configuration of the online store for ordinary views, as Feast documents it.
        verify: hash a segment when it is first read; in Redis, compare the checksum of every value that is read.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # URLs may hold passwords

    type: Literal["online.store.FacetOnlineStore"] = "online.store.FacetOnlineStore"
    workspace: str = "../var"
    rows: str = Field(default=SEGMENTS, repr=False)
    context_store: dict[str, Any] = Field(default={"type": "sqlite", "path": "../var/feast/context.db"}, repr=False)
    verify: bool = True


class FacetOnlineStore(OnlineStore):
    """Routes a view by its tags.

    ```
    embedding view (pipelines.contracts.embedding_view)   `rows`: segments/<version>/<table>/, mapped once, or Redis
    ordinary view                                         `context_store`, unchanged
    ```
    """

    def __init__(self) -> None:
        self._readers: dict[EmbeddingView, Future[RowReader]] = {}
        self._stock: StockStore | None = None
        self._lock = threading.Lock()
        self._openers = ThreadPoolExecutor(thread_name_prefix="open-rows")

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        return SupportedAsyncMethods(read=True, write=True)

    async def initialize(self, config: RepoConfig) -> None:
        await self._ordinary(config).initialize()

    async def close(self) -> None:
        """Let go of every table and of the stock store; a later read opens them again."""
        with self._lock:
            stock, self._stock = self._stock, None
            self._readers.clear()
        if stock is not None:
            await stock.close()

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: EntityRows,
        registry: BaseRegistry,
        project: str,
        *naming: bool,
        **named: bool,
    ) -> OnlineResponse:
        """Feast's own, once it is certain that ids are integers; raises `RequestRefused` for one that is not."""
        require_ids(entity_rows, features=features, registry=registry, project=project)
        return super().get_online_features(config, features, entity_rows, registry, project, *naming, **named)

    async def get_online_features_async(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: EntityRows,
        registry: BaseRegistry,
        project: str,
        *naming: bool,
        **named: bool,
    ) -> OnlineResponse:
        require_ids(entity_rows, features=features, registry=registry, project=project)
        return await super().get_online_features_async(
            config, features, entity_rows, registry, project, *naming, **named
        )

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Read]:
        """One answer per key, in order; `(None, None)`, which Feast reports as NOT_FOUND, for an id without a row."""
        view = EmbeddingView.from_tags(table.tags)
        if view is None:
            return self._ordinary(config).call("online_read", table, entity_keys, requested_features)
        ids = ids_of(table.name, [key.entity_values[0] for key in entity_keys])
        rows, found = self._reader(config, view).result().lookup(ids)
        return [
            (view.as_of, {EmbeddingView.FEATURE: value}) if known else ABSENT
            for value, known in zip(_values(rows, found), found.tolist(), strict=True)
        ]

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Read]:
        view = EmbeddingView.from_tags(table.tags)
        if view is None:
            return await self._ordinary(config).call_async("online_read", table, entity_keys, requested_features)
        await self._opened(config, view)
        return await asyncio.to_thread(self.online_read, config, table, entity_keys, requested_features)

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: Groups,
        join_key_values: dict[str, list[Value]],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: GetOnlineFeaturesResponse,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """The reading part of `get_online_features`, which Feast lets a store do its own way.

        Feast's way makes a key of every id, sorts the keys to find repeated ones, and converts one time per row. Here
        the ids of a request are looked up as they are and the response is filled from arrays; it is the same response.
        """
        request = join_key_values, entity_name_to_join_key_map
        naming = full_feature_names, include_feature_view_version_metadata
        for embedding, groups in _runs(grouped_refs):
            if embedding:
                self._read_embeddings(config, groups, *request, online_features_response, *naming)
            else:
                self._ordinary(config).call(
                    "_read_features_per_fv", groups, *request, online_features_response, *naming
                )

    async def _read_features_per_fv_async(
        self,
        config: RepoConfig,
        grouped_refs: Groups,
        join_key_values: dict[str, list[Value]],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: GetOnlineFeaturesResponse,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """The same with all views read at once; each run of views fills a part of the response."""
        request = join_key_values, entity_name_to_join_key_map
        naming = full_feature_names, include_feature_view_version_metadata

        async def read(embedding: bool, groups: Groups) -> GetOnlineFeaturesResponse:
            part = GetOnlineFeaturesResponse()
            if embedding:
                for table, _ in groups:
                    await self._opened(config, EmbeddingView.from_tags(table.tags))
                await asyncio.to_thread(self._read_embeddings, config, groups, *request, part, *naming)
            else:
                await self._ordinary(config).call_async("_read_features_per_fv", groups, *request, part, *naming)
            return part

        for part in await asyncio.gather(*(read(*run) for run in _runs(grouped_refs))):
            online_features_response.MergeFrom(part)

    def _read_embeddings(
        self,
        config: RepoConfig,
        groups: Groups,
        join_key_values: dict[str, list[Value]],
        join_keys: dict[str, str],
        response: GetOnlineFeaturesResponse,
        full_feature_names: bool,
        with_metadata: bool,
    ) -> None:
        for table, _ in groups:  # an embedding view has one feature
            view = EmbeddingView.from_tags(table.tags)
            keys = _get_table_entity_values(table, join_keys, join_key_values)
            if not keys:
                raise RequestRefused(
                    f"cannot read {table.name}", expected=f"ids of {', '.join(table.entities)}",
                    got=f"ids of {', '.join(join_key_values) or 'nothing'}", remedy="Add them to the request.",
                )
            rows, found = self._reader(config, view).result().lookup(ids_of(table.name, *keys.values()))
            present, stamp = int(found.sum()), Timestamp()
            stamp.FromDatetime(view.as_of)
            projection = table.projection
            response.metadata.feature_names.val.append(
                f"{projection.name_to_use()}__{EmbeddingView.FEATURE}" if full_feature_names else EmbeddingView.FEATURE
            )
            if with_metadata:
                response.metadata.feature_view_metadata.add(
                    name=projection.name_alias or projection.name, version=table.current_version_number or 0
                )
            response.results.add(
                values=_values(rows, found),
                statuses=np.where(found, FieldStatus.PRESENT, FieldStatus.NOT_FOUND).tolist(),
                event_timestamps=[stamp if known else NO_TIME for known in found.tolist()],
            )
            track_feature_statuses(table.name, present, len(found) - present)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[Written],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of an ordinary view that are not older than what is there.

        Raises:
            RequestRefused: it is an embedding view, whose rows never change.
        """
        refuse_write(table)
        self._ordinary(config).write(table, data, progress)

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[Written],
        progress: Callable[[int], Any] | None,
    ) -> None:
        refuse_write(table)
        await self._ordinary(config).write_async(table, data, progress)

    def retrieve_online_documents(self, config: RepoConfig, table: FeatureView, *query: Any, **named: Any) -> Any:
        """Nearest rows of an ordinary view, if the stock store can find them."""
        refuse_search(table)
        return self._ordinary(config).call("retrieve_online_documents", table, *query, **named)

    def retrieve_online_documents_v2(self, config: RepoConfig, table: FeatureView, *query: Any, **named: Any) -> Any:
        refuse_search(table)
        return self._ordinary(config).call("retrieve_online_documents_v2", table, *query, **named)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Called by `feast apply`. A vanished embedding view loses its rows only if its version was retired.

        A view also vanishes when `feast apply` runs over an incomplete repository or workspace; that must not take
        a published version off line.

        Raises:
            VersionInUse: a process holds a version whose rows would go; nothing was deleted.
        """
        workspace = _workspace(config)
        published, gone = set(workspace.versions.numbers()), []
        for table, view in _embeddings_to_delete(tables_to_delete):
            if view.version in published:
                logger.warning(
                    "%s is gone from the feature repository, but version %d is published: its table is kept",
                    table.name, view.version,
                )
            else:
                gone.append(view)
        self._remove(config, gone, to="delete")
        self._ordinary(config).call(
            "update",
            tables_to_delete=[table for table in tables_to_delete if not EmbeddingView.claimed_by(table.tags)],
            tables_to_keep=_without_embeddings(tables_to_keep),
            entities_to_delete=entities_to_delete,
            entities_to_keep=entities_to_keep,
            partial=partial,
        )

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Delete the rows of `tables` and the context store; published versions stay and can be materialized.

        Raises:
            VersionInUse: a process holds one of the versions; nothing was deleted.
        """
        self._remove(config, [view for _, view in _embeddings_to_delete(tables)], to="tear down")
        ordinary = [table for table in tables if not EmbeddingView.claimed_by(table.tags)]
        self._ordinary(config).call("teardown", ordinary, entities)

    def _remove(self, config: RepoConfig, views: Sequence[EmbeddingView], *, to: str) -> None:
        """Delete the rows of views while nobody can pin their versions, or those of none."""
        if not views:
            return
        workspace = _workspace(config)
        rows = row_store(config.online_store.rows, workspace)
        with ExitStack() as unpinned:
            for version in sorted({view.version for view in views}):
                unpinned.enter_context(workspace.versions.unpinned(version, to=to))
            for view in views:
                rows.drop(view.version, view.table, manifest_sha256=view.manifest_sha256)
                self._readers.pop(view, None)
                logger.info("%s deleted", rows.describe(view.version, view.table))

    def _reader(self, config: RepoConfig, view: EmbeddingView) -> "Future[RowReader]":
        """The reader of a view, opened once, however many ask for it at the same time."""
        with self._lock:
            reader = self._readers.get(view)
            if reader is None or (reader.done() and reader.exception()):
                reader = self._readers[view] = self._openers.submit(self._open, config, view)
            return reader

    def _open(self, config: RepoConfig, view: EmbeddingView) -> RowReader:
        rows = row_store(config.online_store.rows, _workspace(config))
        for other in list(self._readers):
            if not rows.holds(other.version, other.table):  # retired; pages of a segment keep the disk's space
                self._readers.pop(other, None)
        reader = rows.open(view.version, view.table, verify=config.online_store.verify)
        if reader.manifest_sha256 != view.manifest_sha256:
            raise IntegrityError(
                rows.describe(view.version, view.table), expected=f"manifest {view.manifest_sha256}",
                got=reader.manifest_sha256, remedy="Delete it, run `feast apply` and materialize the version again.",
            )
        return reader

    async def _opened(self, config: RepoConfig, view: EmbeddingView) -> None:
        """Wait for a reader to be opened without holding a thread, which the reads of other views need."""
        reader = self._reader(config, view)
        if not reader.done():
            await asyncio.shield(asyncio.wrap_future(reader))  # others may wait for it when this request is cancelled

    def _ordinary(self, config: RepoConfig) -> StockStore:
        with self._lock:
            if self._stock is None:
                self._stock = StockStore(config, workspace=_workspace(config))
            return self._stock


def _workspace(config: RepoConfig) -> Workspace:
    return Workspace((Path(config.repo_path or ".") / config.online_store.workspace).resolve())


def _without_embeddings(tables: Sequence[FeatureView]) -> list[FeatureView]:
    return [table for table in tables if EmbeddingView.from_tags(table.tags) is None]


def _embeddings_to_delete(tables: Sequence[FeatureView]) -> Iterator[tuple[FeatureView, EmbeddingView]]:
    """Those that say of which table they are. Others go as they are: their tags name nothing that may be deleted."""
    for table in tables:
        try:
            view = EmbeddingView.from_tags(table.tags)
        except IntegrityError as error:
            logger.warning("%s goes, and no rows with it: %s", table.name, error)
            continue
        if view is not None:
            yield table, view


def _runs(groups: Groups) -> Iterator[tuple[bool, Groups]]:
    """Consecutive views of one kind, in the order of the request; True for embedding views."""
    for embedding, run in groupby(groups, key=lambda group: EmbeddingView.from_tags(group[0].tags) is not None):
        yield embedding, list(run)


def _values(rows: np.ndarray, found: np.ndarray) -> list[Value]:
    """uint8 (B, row_bytes) and bool (B,) -> B values, without one for an id that was not found."""
    packed = rows.view(f"V{rows.shape[1]}").ravel().tolist()
    return [Value(bytes_val=row) if known else NO_VALUE for row, known in zip(packed, found.tolist(), strict=True)]
