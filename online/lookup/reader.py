"""The direct way to rows: ids to packed rows of one version, in batches, without Feast in between."""

from types import MappingProxyType

import numpy as np

from online.lookup.shards import Shard
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import RowReader, row_store
from pipelines.contracts.workspace import Workspace

__all__ = ["VersionReader"]


class VersionReader:
    """All tables of one version: memory-mapped segments, whose pages all processes share, or tables in Redis.

    Safe to use from several threads: nothing changes after it was opened.

    >>> reader = VersionReader.open(Workspace(Path("var")), 2)                    # doctest: +SKIP
    >>> rows, found = reader.lookup("item.kge", np.array([17, 42]))               # doctest: +SKIP

    Attributes:
        manifest: the version's manifest, checked against its seal.
        tables: name -> its reader, in the manifest's order.
    """

    def __init__(self, manifest: Manifest, tables: dict[str, RowReader]) -> None:
        self.manifest = manifest
        self.tables = MappingProxyType(tables)

    @property
    def version(self) -> int:
        return self.manifest.version

    @classmethod
    def open(
        cls, workspace: Workspace, version: int, *, verify: bool = True, rows: str | None = None,
        shard: Shard | None = None,
    ) -> "VersionReader":
        """Open every table of a version.

        Args:
            verify: hash segments before they are served; in Redis, compare the checksum of every value that is read.
            rows: `segments`, or the URL of the Redis server or cluster that the rows were materialized to; by default
                what `feature_store.yaml` says.
            shard: the ids it will be asked for; of segments only their rows are entered into this process's memory.

        Raises:
            VersionNotFound: the version is not published, or one of its tables is not materialized.
            IntegrityError: a file was altered, or a table belongs to another manifest.
            Unavailable: the Redis server does not answer.
        """
        manifest, store = workspace.versions.manifest(version), row_store(rows, workspace)
        part = (shard.index, shard.count) if shard else None
        tables = {}
        for spec in manifest.tables:
            table = store.open(version, spec.name, verify=verify, part=part)
            if table.manifest_sha256 != manifest.sha256 or table.spec != spec:
                raise IntegrityError(
                    store.describe(version, spec.name), expected=f"manifest {manifest.sha256}",
                    got=table.manifest_sha256, remedy="Delete it and materialize the version again.",
                )
            tables[spec.name] = table
        return cls(manifest, tables)

    def lookup(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Packed rows of a batch of ids; an unknown id gets the table's default row.

        Args:
            table: `entity.facet`.
            ids: int64, shape (B,); any order, repeats allowed.

        Returns:
            rows: uint8, shape (B, row_bytes).
            found: bool, shape (B,).

        Raises:
            VersionNotFound: the version has no such table.
        """
        try:
            reader = self.tables[table]
        except KeyError:
            raise VersionNotFound(
                f"table {table} of version {self.version}", expected=f"one of {list(self.tables)}", got=table,
                remedy="Ask for a table that the version has.",
            ) from None
        return reader.lookup(ids)
