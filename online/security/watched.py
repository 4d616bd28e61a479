"""Small files that may change while a server runs: certificates that are renewed, roles that are given and taken."""

import hashlib
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

    A look reads their bytes and their permissions. Times would not do: a file that is written twice within one tick of
    the file system's clock has one time.

    Files may become unusable: deleted, open to others, half replaced, or with a slip in them. That is logged once, and
    then one of two things holds until they are right again:

    - what they said before. So it is with certificates: to find two files of different age while they are replaced is
      no reason to stop a server that works.
    - `if_unusable`. So it is with what gives rights: somebody who takes a right away and makes a slip must not leave
      it valid.

    Args:
        paths: the files.
        read: reads them all; raises `FacetError`, which the constructor lets through.
        if_unusable: what holds while they cannot be read; None: what they said before.
        clock: seconds, never backwards.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], Value], *, if_unusable: Value | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths, self._read, self._if_unusable, self._clock = tuple(paths), read, if_unusable, clock
        self._seen = self._look()  # before they are read: a change in between is found by the next look
        self._value = read()
        self._next_look = clock() + CHECK_S
        self._looking = threading.Lock()

    def value(self) -> Value:
        """What they say now, or said until at most a second ago. Safe from several threads."""
        if self._clock() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._looking.release()
        return self._value

    def _refresh(self) -> None:
        self._next_look = self._clock() + CHECK_S
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._read()
        except Exception as error:  # whatever it is, it must not keep a right valid
            holds = "what was there before stays valid"
            if self._if_unusable is not None:
                self._value, holds = self._if_unusable, "nobody has a right by it until it is corrected"
            unforeseen = not isinstance(error, FacetError)
            logger.error("%s changed and cannot be used; %s: %s", names, holds, error, exc_info=unforeseen)
        else:
            logger.info("%s changed and was read again", names)

    def _look(self) -> list[tuple[int, bytes] | None]:
        return [_contents(path) for path in self._paths]


def _contents(path: Path) -> tuple[int, bytes] | None:
    """Permissions and a hash of a file; None: it cannot be read."""
    try:
        return path.stat().st_mode, hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
