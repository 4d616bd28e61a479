"""The frozen record of a version. Its own SHA-256 is the version's name."""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.sealed import read_sealed, write_sealed
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.verified import open_verified, read_verified
from pipelines.contracts.windows import Windows

__all__ = ["MANIFEST_NAME", "Manifest"]

MANIFEST_NAME = "manifest.json"
FORMAT = 1


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
        metrics: what was measured before publishing.
        files: path inside the version -> SHA-256; every file but the manifest and its seal.
    """

    version: int
    dataset: str
    created_at: datetime
    as_of: datetime
    windows: Windows
    parents: tuple[int, ...]
    tables: tuple[TableSpec, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    UPPER_CONFIG = "upper/config.json"
    UPPER_WEIGHTS = "upper/model.safetensors"

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
    def read(cls, directory: Path) -> "Manifest":
        """Read and check a manifest against its seal; the files it names are checked by `verify`.

        Raises:
            VersionNotFound: there is no manifest here.
            IntegrityError: the manifest's bytes are not those that were sealed, or cannot be understood.
        """
        path = directory / MANIFEST_NAME
        try:
            return cls.from_dict(read_sealed(path, remedy=_REMEDY))
        except FileNotFoundError as error:
            raise VersionNotFound(
                f"no version at {directory}", expected=MANIFEST_NAME, got="nothing there",
                remedy="`facet versions` lists what is published.",
            ) from error
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path} cannot be understood", expected=f"a manifest of format {FORMAT}", got=repr(error),
                remedy=_REMEDY,
            ) from error

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Manifest":
        """What `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        if raw["format"] != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return cls(
            **{
                **{name: value for name, value in raw.items() if name != "format"},
                "created_at": datetime.fromisoformat(raw["created_at"]),
                "as_of": datetime.fromisoformat(raw["as_of"]),
                "windows": Windows.from_dict(raw["windows"]),
                "parents": tuple(raw["parents"]),
                "tables": tuple(TableSpec(**table) for table in raw["tables"]),
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


_REMEDY = "Restore the file or publish the version again; nothing is served from it."
