"""Who serves a version, so that nobody retires it meanwhile.

```
versions/7/manifest.json        locked shared by every process that serves version 7, exclusively by its retirement
versions/pins/7-3f2a9c01.json   who one of them is: pid, role, machine, address; locked by it for as long as it lives
```

The lock on the manifest is what protects: it needs no right to write, cannot be forgotten and ends with its process,
however it dies. The file in `pins/` only lets a refusal name the holder; without its lock it is a dead one's.

What a process has mapped stays readable to it even after its files are deleted, until it lets go; pins are what keeps
a server able to load it again, and two servers able to answer from the same version.
"""

import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import DiskFull
from pipelines.contracts.locks import locked
from pipelines.contracts.manifest import MANIFEST_NAME
from pipelines.contracts.names import version_number

__all__ = ["PINS", "Holder", "dead_pins", "holders", "pin", "unpinned"]

logger = logging.getLogger(__name__)

PINS = "pins"
"""Name of the folder, among the versions, that says who holds them."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a version."""

    version: int
    role: str
    machine: str
    pid: int
    address: str
    since: str  # ISO time, UTC

    def __str__(self) -> str:
        at = f" at {self.address}" if self.address else ""
        return f"{self.role}{at} (pid {self.pid} on {self.machine}, since {self.since})"


@contextmanager
def pin(directory: Path, *, role: str, address: str = "") -> Iterator[bool]:
    """Hold the version in `directory` while the block runs; yields False if it is not published or being retired.

    Args:
        role: what the process is, as a person would look for it: `cpu-tier`, `ranker`.
        address: where it listens, if it does.
    """
    with locked(directory / MANIFEST_NAME, shared=True) as held:
        if not held:
            yield False
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = Holder(version_number(directory.name), role, socket.gethostname(), os.getpid(), address, now)
        path = _folder(directory) / f"{holder.version}-{uuid.uuid4().hex[:8]}.json"
        file = _announce(path, holder)
        try:
            yield True
        finally:
            if file:
                path.unlink(missing_ok=True)
                file.close()


@contextmanager
def unpinned(directory: Path) -> Iterator[bool]:
    """Keep everybody from holding the version while the block runs; yields False if somebody does."""
    with locked(directory / MANIFEST_NAME) as held:
        yield held


def holders(directory: Path) -> list[Holder]:
    """The living processes that hold a version and could say so, in the order of their files."""
    found = []
    for path in sorted(_folder(directory).glob(f"{directory.name}-*.json")):
        try:
            if not _is_dead(path):
                found.append(Holder(**json.loads(path.read_text())))
        except FileNotFoundError:
            continue  # it has just let go
        except (ValueError, TypeError) as error:
            logger.warning("%s does not say who holds a version: %r", path, error)
    return found


def dead_pins(root: Path) -> list[Path]:
    """Files of holders that died without letting go; they protect nothing and may be deleted."""
    return [path for path in sorted((root / PINS).glob("*.json")) if _is_dead(path)]


def _folder(directory: Path) -> Path:
    return directory.parent / PINS


def _is_dead(path: Path) -> bool:
    with locked(path, shared=True) as held:
        return held


def _announce(path: Path, holder: Holder) -> TextIOWrapper | None:
    """Write who holds, under a lock that lasts as long as the file that is returned; None where nothing may be written.

    The name appears with the lock already on it: at no moment does a living holder look dead.
    """
    file = None
    try:
        path.parent.mkdir(exist_ok=True)
        for dead in dead_pins(path.parent.parent):
            dead.unlink(missing_ok=True)
        with replacing_file(path) as staging:
            file = staging.open("x")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(asdict(holder)))
            file.flush()
    except (OSError, DiskFull) as error:
        if file:
            with suppress(OSError):  # closing writes what is buffered, to the same full disk
                file.close()
        logger.warning(
            "version %d is held, but nothing says by whom: %s. A refusal to retire names nobody", holder.version, error
        )
        return None
    return file
