"""The published versions of a workspace, the pointer to the current one, and what is kept of the retired ones."""

import getpass
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.contracts.durable import creating_directory, flush, replacing_file, sha256_of
from pipelines.contracts.errors import FacetError, IntegrityError, VersionConflict, VersionInUse, VersionNotFound
from pipelines.contracts.locks import locked
from pipelines.contracts.manifest import MANIFEST_NAME, Manifest
from pipelines.contracts.names import sha256_name, version_number
from pipelines.contracts.pins import Holder, holders, pin, unpinned

__all__ = ["RETIRED_NAME", "Retirement", "VersionStore"]

RETIRED_NAME = "retired.json"
_POINTER = "CURRENT"


@dataclass(frozen=True)
class Retirement:
    """What is kept of a retired version: its manifest, for lineage, and when and by whom it was retired.

    Attributes:
        manifest: None if it was corrupted when it was retired.
        manifest_sha256: of the manifest's bytes; the version's name unless it was corrupted.
    """

    manifest: Manifest | None
    manifest_sha256: str
    at: datetime
    by: str

    @classmethod
    def of(cls, directory: Path, *, version: int) -> "Retirement":
        """The retirement, now and by this user, of the version that lies in `directory`."""
        try:
            manifest = Manifest.read(directory, version=version)
        except IntegrityError:
            manifest = None
        return cls(manifest, sha256_of(directory / MANIFEST_NAME), datetime.now(UTC), _user())

    def write(self, path: Path) -> None:
        raw = {
            "at": self.at.isoformat(timespec="seconds"),
            "by": self.by,
            "manifest_sha256": self.manifest_sha256,
            "manifest": self.manifest and json.loads(self.manifest.to_json()),
        }
        with replacing_file(path) as staging:
            staging.write_text(json.dumps(raw, indent=1, sort_keys=True))

    @classmethod
    def read(cls, path: Path, *, version: int) -> "Retirement":
        """Raises `IntegrityError` if it cannot be understood, or tells of another manifest than was retired."""
        try:
            raw = json.loads(path.read_bytes())
            manifest = raw["manifest"] and Manifest.from_dict(raw["manifest"])
            if manifest and (manifest.sha256, manifest.version) != (raw["manifest_sha256"], version):
                raise ValueError(f"its manifest is of version {manifest.version} and has sha256 {manifest.sha256}")
            sha256 = sha256_name(raw["manifest_sha256"])
            return cls(manifest, sha256, datetime.fromisoformat(raw["at"]), raw["by"])
        except (OSError, ValueError, KeyError, TypeError, FacetError) as error:
            raise IntegrityError(
                f"{path} cannot be read", expected="what is kept of a retired version", got=repr(error),
                remedy="Restore the file; without it only the lineage of that version is lost.",
            ) from error


class VersionStore:
    """Immutable version directories `<root>/<number>/`, each with its sealed manifest, and `<root>/CURRENT`.

    ```
    publish   fill a staging directory ─► rename it to its number ─► move the pointer
    retire    write retired.json ─► delete manifest.json ─► delete the rest, whenever
    ```

    Each arrow is a moment at which a process may die: a version is published exactly while its manifest is there, and
    the pointer names a published version. Numbers are never used again.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, version: int) -> Path:
        return self.root / f"{version:d}"

    def numbers(self) -> list[int]:
        """Published versions, ascending."""
        return [number for number in self._taken() if (self.path(number) / MANIFEST_NAME).is_file()]

    def manifest(self, version: int) -> Manifest:
        """A version's manifest, checked against its seal.

        Raises:
            VersionNotFound: it is not published here, or no longer.
            IntegrityError: its manifest was altered.
        """
        directory = self.path(version)
        try:
            return Manifest.read(directory, version=version)
        except VersionNotFound as error:
            if directory.is_dir() and not (directory / RETIRED_NAME).is_file():
                raise IntegrityError(
                    f"{directory / MANIFEST_NAME} is missing", expected=f"it, or {RETIRED_NAME}", got="neither",
                    remedy="Restore the file, or delete the directory: nothing is served from it.",
                ) from error
            raise self._not_found(version) from error

    def manifests(self) -> list[Manifest]:
        """The manifests of all published versions, ascending; raises `IntegrityError` if one was altered or is lost."""
        found = []
        for version in self._taken():
            try:
                found.append(self.manifest(version))
            except VersionNotFound:
                continue  # retired
        return found

    def next_number(self) -> int:
        """The number after every one that was ever taken here, retired versions included."""
        return max([0, self.current() or 0, *self._taken()]) + 1

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
        """The version the pointer names, or None before the first publish.

        Raises:
            IntegrityError: the pointer has other bytes than were written, or names no published version.
        """
        path = self.root / _POINTER
        while (text := _read(path)) is not None:
            try:
                version = int(json.loads(text)["version"])
                if text == _pointer_to(self.manifest(version)):
                    return version
                got = repr(text)
            except (ValueError, KeyError, TypeError, VersionNotFound) as error:
                got = repr(error)
            if text == _read(path):  # else it was moved meanwhile, and what it had named may be retired
                raise IntegrityError(
                    f"{path} is corrupted", expected="the number of a published version, and its manifest's sha256",
                    got=got, remedy="Point to a version with `facet versions point N`.",
                )
        return None

    def point_to(self, version: int, *, only_forward: bool = False) -> None:
        """Move the pointer to a published version, atomically.

        Args:
            only_forward: leave it if it names a later version already, which another publisher finished meanwhile.

        Raises:
            VersionNotFound: it is not published here.
            VersionConflict: it is being retired at this moment.
        """
        with locked(self.path(version) / MANIFEST_NAME, shared=True) as held, locked(self.root, wait=True):
            self._require(held, version)
            if only_forward and (self.current() or 0) > version:
                return
            with replacing_file(self.root / _POINTER) as path:
                path.write_bytes(_pointer_to(self.manifest(version)))

    @contextmanager
    def pinned(self, version: int, *, role: str, address: str = "") -> Iterator[None]:
        """Hold a version while the block runs: nobody can retire it. Held before anything of the version is read.

        Raises:
            VersionNotFound: it is not published here.
            VersionConflict: it is being retired at this moment.
        """
        with pin(self.path(version), role=role, address=address) as held:
            self._require(held, version)
            yield

    def holders(self, version: int) -> list[Holder]:
        """The living processes that have a version pinned and could say who they are."""
        return holders(self.path(version))

    @contextmanager
    def unpinned(self, version: int, *, to: str) -> Iterator[None]:
        """Keep everybody from pinning a version while the block runs. It may be one that is not published.

        Args:
            to: what the block does to the version, for the refusal: `retire`.

        Raises:
            VersionInUse: a process has it pinned.
        """
        directory = self.path(version)
        with unpinned(directory) as free:
            known = [str(holder) for holder in self.holders(version)]
            if known or (not free and (directory / MANIFEST_NAME).is_file()):
                raise VersionInUse(
                    f"cannot {to} version {version}", expected="no process that holds it",
                    got="; ".join(known) or "one that has not said who it is: it began just now, or may not write here",
                    remedy=f"Roll out another version there, or stop the process; then {to} again.",
                )
            yield

    def retire(self, version: int) -> Retirement:
        """Unpublish a version, at one moment; its other files are left for whoever deletes them.

        Raises:
            VersionNotFound: it is not published here.
            VersionInUse: the pointer names it, or a process has it pinned.
        """
        directory = self.path(version)
        if not (directory / MANIFEST_NAME).is_file():
            raise self._not_found(version)
        self._refuse_current(version)
        with self.unpinned(version, to="retire"):
            self._refuse_current(version)  # again: only now can the pointer not move to it
            retirement = Retirement.of(directory, version=version)
            retirement.write(directory / RETIRED_NAME)
            (directory / MANIFEST_NAME).unlink()
            flush(directory)
        return retirement

    def retired(self) -> list[int]:
        """Retired versions, ascending."""
        return [
            number
            for number in self._taken()
            if (self.path(number) / RETIRED_NAME).is_file() and not (self.path(number) / MANIFEST_NAME).is_file()
        ]

    def retirement(self, version: int) -> Retirement:
        """What is kept of a retired version.

        Raises:
            VersionNotFound: it was never published here, or still is.
            IntegrityError: its record was altered.
        """
        if version not in self.retired():
            raise self._not_found(version)
        return Retirement.read(self.path(version) / RETIRED_NAME, version=version)

    def _taken(self) -> list[int]:
        """Numbers that have a directory, published or not, ascending."""
        numbers = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            with suppress(ValueError):  # of another name: not a version's
                numbers.append(version_number(path.name))
        return sorted(numbers)

    def _require(self, held: bool, version: int) -> None:
        """Raise unless a shared lock on the version's manifest was got."""
        if not held:
            self.manifest(version)  # says what is wrong if it is not there
            raise VersionConflict(
                f"version {version}", expected="a version that nobody is retiring", got="one that somebody is",
                remedy="Try again: if it is still published then, the retirement was refused.",
            )

    def _refuse_current(self, version: int) -> None:
        if self.current() == version:
            raise VersionInUse(
                f"cannot retire version {version}", expected="a version that the pointer does not name",
                got="the current one", remedy="Publish or point to another first: `facet versions point N`.",
            )

    def _not_found(self, version: int) -> VersionNotFound:
        return VersionNotFound(
            f"version {version}", expected=f"one of {self.numbers()}",
            got="one that was retired" if version in self.retired() else str(version),
            remedy="`facet versions` lists what is published.",
        )

    def _conflict(self, version: int) -> VersionConflict:
        return VersionConflict(
            f"version {version}", expected="a number that is not taken", got=f"{self.path(version)} exists",
            remedy="A version never changes; publish again, under the next number.",
        )


def _pointer_to(manifest: Manifest) -> bytes:
    return json.dumps({"version": manifest.version, "manifest_sha256": manifest.sha256}).encode()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"
