"""Where the rows of materialized tables lie, and what every such place can do: segments on this machine, or Redis."""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipelines.contracts.durable import remove_directory, require_writable, sweep_staging
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import DeltaSegment, header_of, open_segment
from pipelines.contracts.segment_delta_writer import write_copy, write_delta
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.strict import read_yaml
from pipelines.contracts.workspace import Workspace

__all__ = ["SEGMENTS", "Parent", "RowReader", "RowStore", "SegmentRows", "configured_rows", "row_store"]

logger = logging.getLogger(__name__)

SEGMENTS = "segments"


class RowReader(Protocol):
    """One table of one version, whole and open; safe to share between threads.

    Attributes:
        at_hand: whether the rows lie in this machine's memory; else a lookup waits for another process.
    """

    spec: TableSpec
    version: int
    manifest_sha256: str
    at_hand: bool

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (B,) -> rows uint8 (B, row_bytes), the default row for an unknown id, and found bool (B,)."""
        ...


class Parent(NamedTuple):
    """A version that may have many of the rows of a newer one's table of the same name.

    Attributes:
        same_rows: whether it has exactly these, by the hashes of the published files.
    """

    version: int
    manifest_sha256: str
    same_rows: bool


class RowStore(Protocol):
    """Tables of versions: each is there, whole, or it is absent."""

    def describe(self, version: int, table: str) -> str:
        """How an error names a table's place."""
        ...

    def holds(self, version: int, table: str) -> bool: ...

    def open(
        self, version: int, table: str, *, verify: bool = True, part: tuple[int, int] | None = None
    ) -> RowReader:
        """A reader that, with `verify`, answers with no byte it has not checked; raises `VersionNotFound`.

        Args:
            part: (i, n), the part of the ids by their hash that it will be asked for; any other it answers, but slower.
        """
        ...

    def check(self, version: int, table: str) -> RowReader:
        """A reader of a table whose every byte has been read and found to be what was written."""
        ...

    def write(
        self, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch],
        parent: Parent | None = None,
    ) -> None:
        """Make a table of record batches (`id` int64 ascending, `row` fixed-size binary), all of it at once.

        Args:
            batches: may be iterated several times.
            parent: a place that can store rows once for several versions may use what it has of this one.
        """
        ...

    def drop(self, version: int, table: str, *, manifest_sha256: str) -> None:
        """Delete a table, if it is there and of this manifest; not readable from the first moment on."""
        ...

    def collect(self) -> list[str]:
        """Delete what writers left that did not finish; returns names of what was deleted."""
        ...


def configured_rows(workspace: Workspace) -> str:
    """`rows` of `online_store:` in the workspace's `feature_store.yaml`; segments if it does not say."""
    path = workspace.feature_repo / "feature_store.yaml"
    online_store = read_yaml(path).get("online_store") if path.is_file() else None
    return os.path.expandvars(online_store.get("rows", SEGMENTS)) if isinstance(online_store, dict) else SEGMENTS


def row_store(rows: str | None, workspace: Workspace) -> RowStore:
    """The place that the setting `rows` names: `segments`, or the URL of a Redis server or cluster.

    Without it, the place that is configured.

    Raises:
        InvalidConfig: it is neither.
        Unavailable: the server does not answer.
    """
    rows = rows or configured_rows(workspace)
    if rows == SEGMENTS:
        return SegmentRows(workspace)
    # only those who use Redis load it
    from pipelines.contracts.redis_client import connect, without_password
    from pipelines.contracts.redis_rows import RedisRows

    return RedisRows(connect(rows), where=without_password(rows), spill=workspace.root)


class SegmentRows:
    """The segments of a workspace as a `RowStore`."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def describe(self, version: int, table: str) -> str:
        return f"segment {self._workspace.segment(version, table)}"

    def holds(self, version: int, table: str) -> bool:
        return self._workspace.segment(version, table).exists()

    def open(
        self, version: int, table: str, *, verify: bool = True, part: tuple[int, int] | None = None
    ) -> Segment | DeltaSegment:
        reader = open_segment(self._workspace.segment(version, table), verify=verify, part=part)
        if (reader.version, reader.spec.name) != (version, table):
            raise IntegrityError(
                f"{self.describe(version, table)} is not in its place", expected=f"table {table} of version {version}",
                got=f"{reader.spec.name} of version {reader.version}",
                remedy="Delete the directory and materialize the version again.",
            )
        return reader

    def check(self, version: int, table: str) -> Segment | DeltaSegment:
        return self.open(version, table)

    def write(
        self, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch],
        parent: Parent | None = None,
    ) -> None:
        directory = self._workspace.segment(version, spec.name)
        require_writable(directory.parent)
        sweep_staging(directory.parent)
        table = {"spec": spec, "version": version, "manifest_sha256": manifest_sha256}
        if parent:
            theirs = self._workspace.segment(parent.version, spec.name)
            shared = (
                write_copy(directory, **table, parent=theirs, parent_manifest_sha256=parent.manifest_sha256)
                if parent.same_rows
                else write_delta(directory, **table, batches=batches, parent=theirs)
            )
            if shared:
                return
        write_segment(directory, **table, batches=batches)

    def drop(self, version: int, table: str, *, manifest_sha256: str) -> None:
        directory = self._workspace.segment(version, table)
        with suppress(VersionNotFound, IntegrityError):  # half of one, or a damaged one: nobody reads it
            if (found := header_of(directory).manifest_sha256) != manifest_sha256:
                logger.warning("%s is of manifest %s: kept", self.describe(version, table), found)
                return
        remove_directory(directory, within=self._workspace.segments)

    def collect(self) -> list[str]:
        swept = []
        for folder in self._workspace.segments.iterdir() if self._workspace.segments.is_dir() else ():
            swept += sweep_staging(folder)
        return swept
