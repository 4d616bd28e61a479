"""The published versions of a workspace, and the pointer to the current one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.contracts.durable import creating_directory, replacing_file
from pipelines.contracts.errors import IntegrityError, VersionConflict, VersionNotFound
from pipelines.contracts.manifest import MANIFEST_NAME, Manifest

__all__ = ["VersionStore"]

_POINTER = "CURRENT"


class VersionStore:
    """Immutable version directories `<root>/<number>/`, each with its sealed manifest, and `<root>/CURRENT`.

    Publishing is three separate steps: fill a staging directory, rename it to its number, move the pointer. A crash
    between any two leaves the pointer on the last whole version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, version: int) -> Path:
        return self.root / str(version)

    def numbers(self) -> list[int]:
        """Published versions, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit() and (p / MANIFEST_NAME).is_file())

    def manifest(self, version: int) -> Manifest:
        """A version's manifest, checked against its seal.

        Raises:
            VersionNotFound: it is not published here.
            IntegrityError: its manifest was altered.
        """
        if version not in self.numbers():
            raise VersionNotFound(
                f"version {version}", expected=f"one of {self.numbers()}", got=str(version),
                remedy="`facet versions` lists what is published.",
            )
        return Manifest.read(self.path(version))

    def manifests(self) -> list[Manifest]:
        return [self.manifest(version) for version in self.numbers()]

    def next_number(self) -> int:
        """The number after every one that was ever taken here, retired versions included."""
        taken = [int(path.name) for path in self.root.iterdir() if path.name.isdigit()] if self.root.is_dir() else []
        return max([0, self.current() or 0, *taken]) + 1

    @contextmanager
    def creating(self, version: int) -> Iterator[Path]:
        """Yield a staging directory that becomes the version when the block ends without an error.

        Raises:
            VersionConflict: the version exists, or appeared meanwhile.
        """
        if self.path(version).exists():
            raise self._conflict(version)
        try:
            with creating_directory(self.path(version)) as staging:
                yield staging
        except OSError as error:
            if self.path(version).exists():
                raise self._conflict(version) from error
            raise

    def current(self) -> int | None:
        """The version the pointer names, or None before the first publish."""
        path = self.root / _POINTER
        if not path.is_file():
            return None
        try:
            return int(json.loads(path.read_text())["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path} cannot be read", expected='{"version": N, ...}', got=repr(error),
                remedy="Delete it and point to a version with `facet publish`.",
            ) from error

    def point_to(self, version: int) -> None:
        """Move the pointer to a published version, atomically."""
        pointer = {"version": version, "manifest_sha256": self.manifest(version).sha256}
        with replacing_file(self.root / _POINTER) as path:
            path.write_text(json.dumps(pointer))

    def _conflict(self, version: int) -> VersionConflict:
        return VersionConflict(
            f"version {version}", expected="a number that is not taken", got=f"{self.path(version)} exists",
            remedy="A version never changes; publish under the next number.",
        )
