import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from pipelines.contracts.durable import (
    creating_directory,
    remove_directory,
    replacing_file,
    require_writable,
    sha256_of,
    sweep_staging,
)
from pipelines.contracts.errors import DiskFull, InvalidConfig


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_a_file_is_old_or_new_and_never_between(tmp_path: Path) -> None:
    path = tmp_path / "made" / "f"
    with replacing_file(path) as staging:
        staging.write_text("old")
    with replacing_file(path) as staging:
        staging.write_text("ne")
        assert path.read_text() == "old"
        staging.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), replacing_file(path) as staging:
        staging.write_text("bad")
        raise RuntimeError
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["f"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with pytest.raises(RuntimeError), creating_directory(path) as staging:
        (staging / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with creating_directory(path) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "f").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "f").read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("first")
    with pytest.raises(OSError), creating_directory(tmp_path / "d") as staging:
        (staging / "f").write_text("second")
    assert (tmp_path / "d" / "f").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_only_what_nobody_fills_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".staging-1-d" / "sub").mkdir(parents=True)
    (tmp_path / ".staging-2-file").touch()
    (tmp_path / "kept").touch()
    with creating_directory(tmp_path / "d") as directory, replacing_file(tmp_path / "f") as file:
        assert sweep_staging(tmp_path) == [".staging-1-d", ".staging-2-file"]
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["kept", directory.name, file.parent.name])
        file.touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f", "kept"]
    assert sweep_staging(tmp_path / "absent") == []


def test_removing_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    remove_directory(tmp_path / "d", within=tmp_path)
    remove_directory(tmp_path / "d", within=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_outside_the_folder_is_removed(tmp_path: Path) -> None:
    """Whatever leads there: `..`, a link, the folder itself, or another folder, of a name that begins alike, too."""
    own, other, alike = tmp_path / "own", tmp_path / "other", tmp_path / "own-2"
    for folder in (own, other, alike):
        (folder / "d").mkdir(parents=True)
    (own / "link").symlink_to(other)
    outside = [own / ".." / "other" / "d", own / "link" / "d", other / "d", alike / "d"]
    outside += [own, own / "d" / "..", tmp_path, Path("/")]
    for path in outside:
        with pytest.raises(InvalidConfig, match="is not deleted: expected something inside"):
            remove_directory(path, within=own)
    assert all((folder / "d").is_dir() for folder in (own, other, alike))
    remove_directory(own / "d", within=own)
    assert not (own / "d").exists()


def test_what_lies_in_the_folder_is_removed_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace that is reached through a link, or by a name from where the process is."""
    own, link, here = tmp_path / "own", tmp_path / "link", Path("own")
    link.symlink_to(own)
    monkeypatch.chdir(tmp_path)
    for name, within in [(own, link), (link, own), (link, link), (here, own), (own, here), (own / ".." / "own", own)]:
        (own / "d").mkdir(parents=True)
        remove_directory(name / "d", within=within)
        assert not (own / "d").exists(), (name, within)


def test_what_is_read_only_is_read_only_when_it_appears(tmp_path: Path) -> None:
    with creating_directory(tmp_path / "d", read_only=True) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "f").write_text("x")
    assert stat.S_IMODE((tmp_path / "d" / "sub" / "f").stat().st_mode) == 0o444
    remove_directory(tmp_path / "d", within=tmp_path)
    assert not (tmp_path / "d").exists()


def test_a_power_loss_finds_every_byte_below_a_name_that_it_finds(
    tmp_path: Path, disk: list[tuple[str, str]]
) -> None:
    with creating_directory(tmp_path / "made" / "d") as staging:
        (staging / "a" / "b").mkdir(parents=True)
        for name in ("a/b/f", "g"):
            (staging / name).write_text("x")
    inside = {("flush", f"made/*{name}") for name in ("", "/a", "/a/b", "/a/b/f", "/g")}
    assert disk[0] == ("flush", ".")  # "made" itself, in its parent
    assert set(disk[1:6]) == inside and disk[6:] == [("rename to", "made/d"), ("flush", "made")]
    disk.clear()
    with replacing_file(tmp_path / "made" / "f") as staging:
        staging.write_text("x")
    assert disk == [("flush", "made/*/f"), ("rename to", "made/f"), ("flush", "made"), ("delete", "made/*")]
    disk.clear()
    remove_directory(tmp_path / "made" / "d", within=tmp_path)
    assert disk[:2] == [("rename to", "made/*"), ("flush", "made")]
    assert sorted(disk[2:]) == sorted(("delete", f"made/*{name}") for name in ("", "/a", "/a/b", "/a/b/f", "/g"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_refused_by_name_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(DiskFull, match=r"cannot write .*/f:.*Free space"), replacing_file(tmp_path / "f") as staging:
        staging.write_text("ne")
        raise OSError(number, os.strerror(number))
    with pytest.raises(DiskFull, match=r"cannot write .*/d:"), creating_directory(tmp_path / "d") as staging:
        (staging / "half").touch()
        raise OSError(number, os.strerror(number))
    assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_other_errors_of_the_system_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing_file(tmp_path / "f"):
        pass  # nothing was written
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidConfig, match=r"cannot write to .*file.*--workspace"):
            require_writable(bad)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidConfig, match="Permission denied"):
        require_writable(tmp_path)
