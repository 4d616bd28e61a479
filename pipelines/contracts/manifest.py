"""The frozen record of a version. Its own SHA-256 is the version's name."""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipelines.contracts.errors import IntegrityError, InvalidConfig, VersionNotFound
from pipelines.contracts.lineage import Lineage
from pipelines.contracts.names import sha256_name, version_number
from pipelines.contracts.sealed import read_sealed, write_sealed
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.strict import build
from pipelines.contracts.verified import open_verified, read_verified
from pipelines.contracts.windows import Windows

__all__ = ["MANIFEST_NAME", "Manifest"]

MANIFEST_NAME = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """Everything that was trained together, and the hash of every file it lies in.

    Attributes:
        version: a positive integer.
        dataset: name of the log it was trained on.
        as_of: end of the data it was trained on (UTC); the event timestamp of its rows in Feast.
        windows: the run's four windows.
        parents: versions it was warm-started from.
        tables: one spec per table; table `item.kge` lies in `tables/item.kge.parquet` (id int64, row, event_timestamp).
        lineage: what its ranker was made from, down to the log.
        metrics: what was measured before publishing.
        files: path inside the version -> SHA-256; every file but the manifest and its seal.

    Raises:
        ValueError: a value is out of its range, or does not fit the others.
    """

    version: int
    dataset: str
    created_at: datetime
    as_of: datetime
    windows: Windows
    parents: tuple[int, ...]
    tables: tuple[TableSpec, ...]
    lineage: Lineage
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    UPPER_CONFIG = "upper/config.json"
    UPPER_WEIGHTS = "upper/model.safetensors"

    def __post_init__(self) -> None:
        version_number(str(self.version))
        if len(set(self.parents)) != len(self.parents) or not all(0 < parent < self.version for parent in self.parents):
            raise ValueError(f"expected distinct parents before version {self.version}, got {self.parents}")
        if len({spec.name for spec in self.tables}) != len(self.tables):
            raise ValueError(f"expected distinct tables, got {[spec.name for spec in self.tables]}")
        if any(moment.utcoffset() is None for moment in (self.created_at, self.as_of)):
            raise ValueError(f"expected times with their zone, got {self.created_at} and {self.as_of}")
        for name, sha256 in self.files.items():
            path = PurePosixPath(name)
            if str(path) != name or path.is_absolute() or {"..", "."} & {*path.parts, name}:
                raise ValueError(f"expected paths inside the version, got {name!r}")
            sha256_name(sha256)

    @staticmethod
    def table_path(table: str) -> str:
        return f"tables/{table}.parquet"

    def table(self, name: str) -> TableSpec:
        """Spec of a table by name; raises `VersionNotFound` if the version has none of that name."""
        for spec in self.tables:
            if spec.name == name:
                return spec
        raise VersionNotFound(
            f"table {name} of version {self.version}", expected=f"one of {[spec.name for spec in self.tables]}",
            got=name, remedy="Ask for a table that the version has.",
        )

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "version": self.version,
                "dataset": self.dataset,
                "created_at": self.created_at.isoformat(),
                "as_of": self.as_of.isoformat(),
                "windows": self.windows.to_dict(),
                "parents": list(self.parents),
                "tables": [spec.to_dict() for spec in self.tables],
                "lineage": self.lineage.to_dict(),
                "metrics": self.metrics,
                "files": self.files,
            },
            indent=1,
            sort_keys=True,
        )

    @property
    def sha256(self) -> str:
        """The version's name: SHA-256 of the manifest's bytes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write the manifest and its seal (the hash of its bytes) into a version that is being staged."""
        write_sealed(directory / MANIFEST_NAME, self.to_json())

    @classmethod
    def read(cls, directory: Path, *, version: int) -> "Manifest":
        """Read a manifest, and check it against its seal and its place; the files it names are checked by `verify`.

        Args:
            version: which it must be: a directory that was copied or renamed holds another.

        Raises:
            VersionNotFound: there is no manifest here.
            IntegrityError: the manifest's bytes are not those that were sealed, cannot be understood, or are of another
                version.
        """
        path = directory / MANIFEST_NAME
        try:
            manifest = cls.from_dict(read_sealed(path, remedy=_REMEDY))
        except FileNotFoundError as error:
            raise VersionNotFound(
                f"no version at {directory}", expected=MANIFEST_NAME, got="nothing there",
                remedy="`facet versions` lists what is published.",
            ) from error
        except (ValueError, InvalidConfig) as error:
            raise IntegrityError(
                f"{path} cannot be understood", expected=f"a manifest of format {FORMAT}", got=repr(error),
                remedy=_REMEDY,
            ) from error
        if manifest.version != version:
            raise IntegrityError(
                f"{path} is not in its place", expected=f"the manifest of version {version}",
                got=f"that of version {manifest.version}",
                remedy="Delete the directory, if it is a copy: a version is served under its own number only.",
            )
        return manifest

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Manifest":
        """What `to_json` wrote; raises ValueError or `InvalidConfig` for anything else."""
        written = build(_Written, raw, where="manifest", manual="pipelines/contracts/manifest.py")
        if written.format != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {written.format}")
        values = {each.name: getattr(written, each.name) for each in fields(cls)}
        return cls(
            **{
                **values,
                "created_at": datetime.fromisoformat(written.created_at),
                "as_of": datetime.fromisoformat(written.as_of),
                "windows": Windows.from_dict(written.windows),
                "lineage": Lineage.from_dict(written.lineage, where="manifest.lineage"),
            }
        )

    def verify(self, directory: Path, *, only: tuple[str, ...] | None = None) -> None:
        """Hash the version's files (or `only` some); raises `IntegrityError` naming the first that differs.

        Who reads a file afterwards takes `open_file` or `read_file`: the path may name another by then.
        """
        for name in only if only is not None else self.files:
            with self.open_file(directory, name):
                pass

    def open_file(self, directory: Path, name: str) -> AbstractContextManager[BinaryIO]:
        """A file of the version, open, its bytes checked; raises `IntegrityError` unless they are those published."""
        return open_verified(directory / name, self._sha256_of(name), remedy=_REMEDY)

    def read_file(self, directory: Path, name: str) -> bytes:
        """The published bytes of a file of the version; raises `IntegrityError` if it has others."""
        return read_verified(directory / name, self._sha256_of(name), remedy=_REMEDY)

    def _sha256_of(self, name: str) -> str:
        return self.files.get(name, "of a file of this version")


@dataclass(frozen=True)
class _Written:
    """A manifest as JSON has it."""

    format: int
    version: int
    dataset: str
    created_at: str
    as_of: str
    windows: dict[str, Any]
    parents: tuple[int, ...]
    tables: tuple[TableSpec, ...]
    lineage: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, str]


_REMEDY = "Restore the file or publish the version again; nothing is served from it."
