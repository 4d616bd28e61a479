"""The direct way to rows: ids to packed rows of one version, in batches, without Feast in between."""

from types import MappingProxyType

import numpy as np

from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.segment import Segment
from pipelines.contracts.workspace import Workspace

__all__ = ["VersionReader"]


class VersionReader:
    """All tables of one version, memory-mapped: every process that opens it shares the pages.

    Safe to use from several threads: nothing changes after it was opened.

    >>> reader = VersionReader.open(Workspace(Path("var")), 2)                    # doctest: +SKIP
    >>> rows, found = reader.lookup("item.kge", np.array([17, 42]))               # doctest: +SKIP

    Attributes:
        manifest: the version's manifest, checked against its seal.
        tables: name -> `Segment`, in the manifest's order.
    """

    def __init__(self, manifest: Manifest, segments: dict[str, Segment]) -> None:
        self.manifest = manifest
        self.tables = MappingProxyType(segments)

    @property
    def version(self) -> int:
        return self.manifest.version

    @classmethod
    def open(cls, workspace: Workspace, version: int, *, verify: bool = True) -> "VersionReader":
        """Map every table of a version; with `verify` the segments' bytes are hashed first.

        Raises:
            VersionNotFound: the version is not published, or one of its tables is not materialized.
            IntegrityError: a file was altered, or a segment belongs to another manifest.
        """
        manifest = workspace.versions.manifest(version)
        segments = {}
        for spec in manifest.tables:
            directory = workspace.segment(version, spec.name)
            segment = Segment.open(directory, verify=verify)
            if segment.manifest_sha256 != manifest.sha256 or segment.spec != spec:
                raise IntegrityError(
                    f"segment {directory}", expected=f"manifest {manifest.sha256}", got=segment.manifest_sha256,
                    remedy="Delete the segment and materialize the version again.",
                )
            segments[spec.name] = segment
        return cls(manifest, segments)

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
            segment = self.tables[table]
        except KeyError:
            raise VersionNotFound(
                f"table {table} of version {self.version}", expected=f"one of {list(self.tables)}", got=table,
                remedy="Ask for a table that the version has.",
            ) from None
        return segment.lookup(ids)
