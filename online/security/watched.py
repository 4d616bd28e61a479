"""Small files that may change while a server runs: certificates that are renewed, roles that are given and taken."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pipelines.contracts.errors import FacetError

__all__ = ["Watched"]

logger = logging.getLogger(__name__)

CHECK_S = 1.0

Value = TypeVar("Value")


class Watched(Generic[Value]):
    """What some files say. They are looked at once a second at most, and read again when one of them has changed.

    Files that can no longer be read as what they should be are reported once, and what they said before stays valid: a
    slip in a file must not stop a server that works. For the same reason it is no error to find two files of different
    age while they are being replaced.

    Args:
        paths: the files.
        read: reads them all; raises `FacetError`, which the constructor lets through.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        self._paths, self._read = tuple(paths), read
        self._stamps = self._look()
        self._value = read()
        self._next_look = time.monotonic() + CHECK_S
        self._looking = threading.Lock()

    def value(self) -> Value:
        """What they say now, or said until at most a second ago. Safe from several threads."""
        if time.monotonic() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._looking.release()
        return self._value

    def _refresh(self) -> None:
        self._next_look = time.monotonic() + CHECK_S
        stamps = self._look()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._read()
        except FacetError as error:
            logger.error("%s changed and cannot be used; what was there before stays valid: %s", names, error)
        else:
            logger.info("%s changed and was read again", names)

    def _look(self) -> tuple:
        stamps = []
        for path in self._paths:
            try:
                found = path.stat()
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                stamps.append(None)
        return tuple(stamps)
