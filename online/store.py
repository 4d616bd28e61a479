"""The online store behind `get_online_features`: embedding rows from segments, everything else from a stock store."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView
from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pydantic import Field

from pipelines.contracts.durable import remove_directory
from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError, InvalidConfig
from pipelines.contracts.segment import Segment
from pipelines.contracts.workspace import Workspace

__all__ = ["FacetOnlineStore", "FacetOnlineStoreConfig"]

logger = logging.getLogger(__name__)

Written = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
Read = tuple[datetime | None, dict[str, Value] | None]

ABSENT: Read = (None, None)


class FacetOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store:` of `feature_store.yaml`; relative paths are relative to the feature repository.

    Attributes:
        workspace: where segments lie.
        context_store: configuration of the online store for ordinary views, as Feast documents it.
        verify: hash a segment when it is first read.
    """

    type: Literal["online.store.FacetOnlineStore"] = "online.store.FacetOnlineStore"
    workspace: str = "../var"
    context_store: dict[str, Any] = Field(default={"type": "sqlite", "path": "../var/feast/context.db"})
    verify: bool = True


class FacetOnlineStore(OnlineStore):
    """Routes a view by its tags.

    ```
    embedding view (pipelines.contracts.embedding_view)   segments/<version>/<table>/, mapped once, read only
    ordinary view                                         `context_store`, unchanged
    ```
    """

    def __init__(self) -> None:
        self._segments: dict[EmbeddingView, Segment] = {}
        self._context: tuple[OnlineStore, RepoConfig] | None = None

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        return SupportedAsyncMethods(read=True, write=True)

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
            store, context_config = self._context_store(config)
            return store.online_read(context_config, table, entity_keys, requested_features)
        ids = np.fromiter((key.entity_values[0].int64_val for key in entity_keys), np.int64, len(entity_keys))
        rows, found = self._segment(config, view).lookup(ids)
        return [
            (view.as_of, {EmbeddingView.FEATURE: Value(bytes_val=row.tobytes())}) if known else ABSENT
            for row, known in zip(rows, found.tolist(), strict=True)
        ]

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Read]:
        return await asyncio.to_thread(self.online_read, config, table, entity_keys, requested_features)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[Written],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of an ordinary view; raises `InvalidConfig` for an embedding view, whose rows never change."""
        if view := EmbeddingView.from_tags(table.tags):
            raise InvalidConfig(
                f"cannot write into {table.name}", expected="a view whose rows may change",
                got=f"table {view.table} of version {view.version}, which is immutable",
                remedy="Publish a new version; `feast materialize` makes its rows readable.",
            )
        store, context_config = self._context_store(config)
        store.online_write_batch(context_config, table, data, progress)

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[Written],
        progress: Callable[[int], Any] | None,
    ) -> None:
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Called by `feast apply`. A vanished embedding view loses its segment only if its version was retired.

        A view also vanishes when `feast apply` runs over an incomplete repository or workspace; that must not take
        a published version off line.
        """
        workspace = _workspace(config)
        published = set(workspace.versions.numbers())
        for table in tables_to_delete:
            view = EmbeddingView.from_tags(table.tags)
            if view is None:
                continue
            if view.version in published:
                logger.warning(
                    "%s is gone from the feature repository, but version %d is published: its segment is kept",
                    table.name, view.version,
                )
            else:
                self._remove(workspace, view)
        store, context_config = self._context_store(config)
        store.update(
            context_config,
            tables_to_delete=_ordinary(tables_to_delete),
            tables_to_keep=_ordinary(tables_to_keep),
            entities_to_delete=entities_to_delete,
            entities_to_keep=entities_to_keep,
            partial=partial,
        )

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Delete the segments of `tables` and the context store; published versions stay and can be materialized."""
        workspace = _workspace(config)
        for table in tables:
            if view := EmbeddingView.from_tags(table.tags):
                self._remove(workspace, view)
        store, context_config = self._context_store(config)
        store.teardown(context_config, _ordinary(tables), entities)

    def _remove(self, workspace: Workspace, view: EmbeddingView) -> None:
        directory = workspace.segment(view.version, view.table)
        remove_directory(directory)
        self._segments.pop(view, None)
        logger.info("segment %s deleted", directory)

    def _segment(self, config: RepoConfig, view: EmbeddingView) -> Segment:
        segment = self._segments.get(view)
        if segment is None:
            directory = _workspace(config).segment(view.version, view.table)
            segment = Segment.open(directory, verify=config.online_store.verify)
            if segment.manifest_sha256 != view.manifest_sha256:
                raise IntegrityError(
                    f"segment {directory}", expected=f"manifest {view.manifest_sha256}", got=segment.manifest_sha256,
                    remedy="Delete the segment, run `feast apply` and materialize the version again.",
                )
            self._segments[view] = segment
        return segment

    def _context_store(self, config: RepoConfig) -> tuple[OnlineStore, RepoConfig]:
        """The stock store and the configuration it understands: ours, with its own section as `online_store`."""
        if self._context is None:
            context_config = RepoConfig(
                project=config.project,
                provider=config.provider,
                registry=config.registry_config,
                online_store=config.online_store.context_store,
                offline_store=config.offline_config,
                entity_key_serialization_version=config.entity_key_serialization_version,
                repo_path=config.repo_path,
            )
            self._context = get_online_store_from_config(context_config.online_store), context_config
        return self._context


def _workspace(config: RepoConfig) -> Workspace:
    return Workspace((Path(config.repo_path or ".") / config.online_store.workspace).resolve())


def _ordinary(tables: Sequence[FeatureView]) -> list[FeatureView]:
    return [table for table in tables if EmbeddingView.from_tags(table.tags) is None]
