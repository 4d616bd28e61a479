"""The compute engine behind `feast materialize`: embedding views go to the row store, other views Feast's own way.

Feast's own way turns every row into protobuf; here Arrow record batches are copied into segments, or into Redis, as
they are.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
from feast import FileSource
from feast.infra.common.materialization_job import (
    MaterializationJob,
    MaterializationJobStatus,
    MaterializationTask,
)
from feast.infra.compute_engines.base import ComputeEngine
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from tqdm import tqdm

from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import FacetError, IntegrityError, InvalidConfig, NotPrepared, VersionConflict
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import SEGMENTS, Parent, RowStore, row_store
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import open_table_file
from pipelines.contracts.workspace import Workspace

__all__ = ["SegmentEngine", "SegmentEngineConfig"]

logger = logging.getLogger(__name__)

BATCH_ROWS = 65_536


class SegmentEngineConfig(FeastConfigBaseModel):
    """`batch_engine:` of `feature_store.yaml`; `workspace` is relative to the feature repository.

    Where rows are written is `rows` of `online_store:`, which reads them there.
    """

    type: Literal["pipelines.engine.SegmentEngine"] = "pipelines.engine.SegmentEngine"
    workspace: str = "../var"


class SegmentEngine(ComputeEngine):
    """Materializes one view at a time.

    ```
    embedding view   tables/<t>.parquet ── hash checked ── record batches ──► segments/<n>/<t>/ or Redis   (in one step)
    ordinary view    Feast's LocalComputeEngine
    ```

    A table that is there already and whole is left as it is, so that materializing again is cheap and safe. One that
    is not there, and whose time the range does not contain, is an error: nothing would say that its version is missing.
    All views of a command are tried; Feast then raises the first error.
    """

    supports_batch = True

    def __init__(self, *, workspace: str = "../var", type: str | None = None, **engine: Any) -> None:
        super().__init__(**engine)
        repo = Path(self.repo_config.repo_path or ".")
        self.workspace = Workspace((repo / workspace).resolve())
        self._ordinary = LocalComputeEngine(backend="pandas", **engine)

    def update(
        self,
        project: str,
        views_to_delete: Sequence[Any],
        views_to_keep: Sequence[Any],
        entities_to_delete: Sequence[Any],
        entities_to_keep: Sequence[Any],
    ) -> None:
        """Nothing to prepare: rows belong to the online store."""

    def teardown_infra(self, project: str, fvs: Sequence[Any], entities: Sequence[Any]) -> None:
        """Nothing to tear down: rows belong to the online store."""

    def get_historical_features(self, registry: BaseRegistry, task: Any) -> Any:
        return self._ordinary.get_historical_features(registry, task)

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> MaterializationJob:
        job_id = f"{task.feature_view.name}-{task.start_time}-{task.end_time}"
        try:
            view = EmbeddingView.from_tags(task.feature_view.tags)
            if view is None:
                _require_source(task.feature_view)
                job = self._ordinary.materialize(registry, task, **kwargs)[0]
                if error := job.error():
                    logger.error("%s: %s", task.feature_view.name, error)
                return job
            with self.workspace.versions.pinned(view.version, role="materialize"):
                self._materialize_table(view, task)
        except (FacetError, OSError, pa.ArrowException) as error:
            logger.error("%s", error)
            return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.ERROR, error=error)
        return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.SUCCEEDED)

    def _materialize_table(self, view: EmbeddingView, task: MaterializationTask) -> None:
        manifest = self.workspace.versions.manifest(view.version)
        spec = manifest.table(view.table)
        if view != EmbeddingView.of(manifest, spec):
            raise IntegrityError(
                f"feature view {task.feature_view.name}", expected=f"tags of manifest {manifest.sha256}", got=str(view),
                remedy="Run `feast apply`, then materialize again.",
            )
        rows = row_store(getattr(self.repo_config.online_store, "rows", SEGMENTS), self.workspace)
        inside = task.start_time <= manifest.as_of <= task.end_time
        if rows.holds(view.version, view.table):
            if inside:  # else nobody asked for it, and hashing every old version takes its time
                _confirm(rows, manifest, spec)
                logger.info("%s is materialized already, %d rows verified", task.feature_view.name, spec.rows)
            return
        if not inside:
            raise _outside(task, manifest)
        start = time.perf_counter()
        version = self.workspace.versions.path(view.version)
        try:
            with manifest.open_file(version, manifest.table_path(spec.name)) as file:
                rows.write(
                    spec=spec, version=manifest.version, manifest_sha256=manifest.sha256,
                    batches=_Batches(file, label=task.feature_view.name), parent=self._parent(rows, manifest, spec),
                )
        except OSError:
            if not rows.holds(view.version, view.table):
                raise
            _confirm(rows, manifest, spec)
            logger.info("%s was materialized meanwhile by another process", task.feature_view.name)
            return
        self._record(task.feature_view.name, spec, seconds=time.perf_counter() - start)

    def _parent(self, rows: RowStore, manifest: Manifest, spec: TableSpec) -> Parent | None:
        """The newest parent whose table is there; of the same rows, if there is one."""
        path, found = manifest.table_path(spec.name), []
        for number in sorted(manifest.parents, reverse=True):
            with suppress(FacetError):  # retired, or damaged: it is asked for nothing
                theirs = self.workspace.versions.manifest(number)
                if rows.holds(number, spec.name):
                    found.append(Parent(number, theirs.sha256, theirs.files.get(path) == manifest.files[path]))
        return max(found, key=lambda parent: parent.same_rows, default=None)

    def _record(self, view: str, spec: TableSpec, *, seconds: float) -> None:
        """Say what was written and how fast, in the log and as a line of `feast/materializations.jsonl`.

        The seconds hold the hashing of the source, the writing, the flushing and the hashing of what was written.
        """
        logger.info("%s materialized, %d rows of %d bytes in %.3f s", view, spec.rows, spec.row_bytes, seconds)
        line = {
            "view": view, "rows": spec.rows, "row_bytes": spec.row_bytes, "seconds": round(seconds, 6),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path = self.workspace.root / "feast" / "materializations.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _confirm(rows: RowStore, manifest: Manifest, spec: TableSpec) -> None:
    """Raise unless the table that is there is whole and of this manifest."""
    table = rows.check(manifest.version, spec.name)
    if table.manifest_sha256 != manifest.sha256 or table.spec != spec:
        raise VersionConflict(
            rows.describe(manifest.version, spec.name), expected=f"manifest {manifest.sha256}",
            got=table.manifest_sha256,
            remedy="It belongs to another version of this number; delete it and materialize again.",
        )


def _outside(task: MaterializationTask, manifest: Manifest) -> InvalidConfig:
    name = task.feature_view.name
    start, end, moment = (
        at.astimezone(UTC).replace(tzinfo=None).isoformat() for at in (task.start_time, task.end_time, manifest.as_of)
    )
    return InvalidConfig(
        f"{name}: version {manifest.version} is not materialized", expected=f"a range around its rows' time {moment}",
        got=f"{start} to {end}",
        remedy=f"Run `feast materialize --views {name} {moment} {moment}`, or give a wider range.",
    )


def _require_source(view: Any) -> None:
    """Raise `NotPrepared` if a view's Parquet file has not been written: DuckDB's own message names no stage."""
    source = getattr(view, "batch_source", None)
    if isinstance(source, FileSource) and Path(source.path).is_absolute() and not Path(source.path).exists():
        raise NotPrepared(
            f"feature view {view.name}", expected=f"its rows in {source.path}", got="no file",
            remedy="Run `facet prepare` first, or materialize other views with `feast materialize --views`.",
        )


@dataclass(frozen=True)
class _Batches:
    """The record batches of a table's open file, read anew by whoever iterates."""

    file: BinaryIO
    label: str

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        with open_table_file(self.file) as file, tqdm(
            total=file.metadata.num_rows, desc=self.label, unit="row", unit_scale=True, disable=None
        ) as progress:
            for batch in file.iter_batches(BATCH_ROWS, columns=["id", "row"]):
                yield batch
                progress.update(batch.num_rows)
