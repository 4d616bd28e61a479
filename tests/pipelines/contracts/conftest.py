"""What the tests of the contracts share."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed, renamed and deleted below `tmp_path`, in order; names of staging directories are cut to `*`."""
    seen: list[tuple[str, str]] = []

    def note(event: str, path: Path | str) -> None:
        seen.append((event, re.sub(r"\.staging-[^/]*", "*", os.path.relpath(path, tmp_path))))

    def flush(descriptor: int, original=os.fsync) -> None:
        note("flush", os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    def move(source: Path, target: Path, original=os.rename) -> None:
        note("rename to", target)
        original(source, target)

    def delete(original: Callable[..., None], path: Path | str, *, dir_fd: int | None = None) -> None:
        parent = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        original(path, dir_fd=dir_fd)
        note("delete", os.path.join(parent, path))

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move)
    monkeypatch.setattr(os, "replace", move)
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, partial(delete, getattr(os, name)))
    return seen
