"""A JSON file and, beside it, the SHA-256 of its bytes: what names the hashes of other files must be checked itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.contracts.errors import IntegrityError

__all__ = ["read_sealed", "seal_path", "write_sealed"]


def seal_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def write_sealed(path: Path, text: str) -> None:
    """Write `text` to `path` and its hash to `path` with the suffix `.sha256`; flushing is left to the caller."""
    path.write_text(text)
    seal_path(path).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def read_sealed(path: Path, *, remedy: str, sha256: str | None = None) -> Any:
    """The JSON value in `path`.

    Args:
        sha256: of its bytes, where something else than the seal names it too.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: its bytes are not those that were sealed, or they are no JSON.
    """
    seal = seal_path(path)
    # the seal first: whoever deletes the two begins with the file
    sealed = seal.read_bytes() if seal.is_file() else b"no seal"
    content = path.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if sealed != f"{got}\n".encode():
        expected = sealed[:80].decode(errors="backslashreplace").strip()
        raise IntegrityError(
            f"{path} is corrupted, or its seal {seal.name}", expected=f"sha256 {expected}", got=got, remedy=remedy
        )
    if sha256 not in (None, got):
        raise IntegrityError(f"{path} is corrupted", expected=f"sha256 {sha256}", got=got, remedy=remedy)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be understood", expected="JSON", got=repr(error), remedy=remedy) from error
