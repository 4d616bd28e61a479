import hashlib
import os
from pathlib import Path

import pytest

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.verified import open_verified, read_verified

CONTENT = b"published"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REMEDY = "Publish again."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_what_has_the_hash_is_read(path: Path) -> None:
    assert read_verified(path, SHA256, remedy=REMEDY) == CONTENT
    with open_verified(path, SHA256, remedy=REMEDY) as file:
        assert file.read() == CONTENT


def test_a_file_that_is_replaced_after_the_check_is_not_read(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"planted!!")
    with open_verified(path, SHA256, remedy=REMEDY) as file:
        os.replace(other, path)
        assert path.read_bytes() == b"planted!!" and file.read() == CONTENT


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "directory", "pipe"])
@pytest.mark.parametrize("way", ["open", "read"])
def test_anything_else_is_refused_by_name(path: Path, damage: str, way: str) -> None:
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes(CONTENT[:-1] + (b"D" if damage == "flip" else b""))
    got = hashlib.sha256(path.read_bytes()).hexdigest() if damage in ("flip", "cut") else "no file"
    with pytest.raises(IntegrityError, match=rf"file is corrupted: expected sha256 {SHA256}, got {got}\. {REMEDY}"):
        if way == "read":
            read_verified(path, SHA256, remedy=REMEDY)
        else:
            with open_verified(path, SHA256, remedy=REMEDY):
                pass


def test_a_file_that_is_written_to_while_it_is_hashed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_then_write(file, name, original=hashlib.file_digest):
        digest = original(file, name)
        path.write_bytes(CONTENT + b"more")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", digest_then_write)
    with pytest.raises(IntegrityError, match="written to while they were checked"), open_verified(
        path, SHA256, remedy=REMEDY
    ):
        pass
