"""Files that change under a running server: when that is noticed, and what holds while they are unusable."""

import logging
import os
import threading
from pathlib import Path

import pytest

from online.security.credentials import ServerSecurity
from online.security.roles import Roles, token_sha256
from online.security.watched import Watched
from pipelines.contracts.errors import InvalidConfig
from tests.waiting import PATIENCE_S, joined

TOKEN = "t" * 40
ENTRY = f"a: {{token_sha256: {token_sha256(TOKEN)}, roles: [lookup]}}\n"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusing_nonsense(path: Path) -> str:
    text = path.read_text()
    if "nonsense" in text:
        raise InvalidConfig("file", expected="sense", got="none", remedy="Correct it.")
    if "defect" in text:
        raise ZeroDivisionError
    return text


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    path.chmod(0o600)
    return path


def test_files_are_looked_at_once_a_second(file, clock) -> None:
    reads = []
    watched = Watched([file], lambda: reads.append(1) or file.read_text(), clock=clock)
    file.write_text("two")
    clock.now += 0.999
    assert watched.value() == "one" and len(reads) == 1
    clock.now += 0.002
    assert watched.value() == "two" and len(reads) == 2
    file.write_text("three")
    clock.now += 0.5
    assert watched.value() == "two", "the second begins anew"
    clock.now += 10.0
    assert watched.value() == "three" and watched.value() == "three" and len(reads) == 3, "unchanged: not read again"


def test_a_change_that_leaves_size_times_and_inode_as_they_were_is_noticed(file, clock) -> None:
    watched = Watched([file], file.read_text, clock=clock)
    before = file.stat()
    with file.open("r+") as opened:
        opened.write("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    clock.now += 2
    assert watched.value() == "two"


def test_a_change_while_it_is_read_is_found_by_the_next_look(file, clock) -> None:
    later = ["three", "two"]

    def read() -> str:
        text = file.read_text()
        if later:
            file.write_text(later.pop())
        return text

    watched = Watched([file], read, clock=clock)
    for expected in ("two", "three", "three"):
        clock.now += 2
        assert watched.value() == expected


def spoil_by_a_slip(path: Path) -> None:
    path.write_text("nonsense")


def spoil_by_deleting(path: Path) -> None:
    path.unlink()


def spoil_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_by_a_defect_of_ours(path: Path) -> None:
    path.write_text("defect")


@pytest.mark.parametrize(
    "spoil", [spoil_by_a_slip, spoil_by_deleting, spoil_by_a_folder, spoil_by_a_defect_of_ours]
)
@pytest.mark.parametrize(("if_unusable", "holds"), [(None, "one"), ("nothing", "nothing")])
def test_what_holds_while_a_file_is_unusable_is_logged_once(
    file, clock, caplog, spoil, if_unusable, holds
) -> None:
    watched = Watched([file], lambda: refusing_nonsense(file), if_unusable=if_unusable, clock=clock)
    spoil(file)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            clock.now += 2
            assert watched.value() == holds
        (record,) = caplog.records
        assert record.levelname == "ERROR" and f"{file} changed and cannot be used" in record.getMessage()
        assert ("stays valid" in record.getMessage()) == (if_unusable is None)
        if file.is_dir():
            file.rmdir()
        file.write_text("three")
        clock.now += 2
        assert watched.value() == "three" and len(caplog.records) == 2


def test_the_same_contents_after_a_slip_hold_again(file, clock) -> None:
    watched = Watched([file], lambda: refusing_nonsense(file), if_unusable="nothing", clock=clock)
    file.write_text("nonsense")
    clock.now += 2
    assert watched.value() == "nothing"
    file.write_text("one")
    clock.now += 2
    assert watched.value() == "one"


def test_a_thread_that_looks_keeps_no_other_waiting(file, clock) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slowly() -> str:
        text = file.read_text()
        if text == "two":
            reading.set()
            assert go_on.wait(PATIENCE_S)
        return text

    watched = Watched([file], slowly, clock=clock)
    file.write_text("two")
    clock.now += 2
    looking = threading.Thread(target=watched.value)
    looking.start()
    assert reading.wait(PATIENCE_S)
    clock.now += 2
    assert watched.value() == "one", "what was there before, until the new one is read"
    go_on.set()
    joined(looking)
    assert watched.value() == "two"


# ---- what gives rights


@pytest.fixture
def roles_file(tmp_path) -> Path:
    path = tmp_path / "roles.yaml"
    path.write_text(ENTRY)
    path.chmod(0o600)
    return path


def spoil_by_opening_it_to_others(path: Path) -> None:
    path.chmod(0o602)


def spoil_by_a_repeated_key(path: Path) -> None:
    path.write_text(ENTRY + ENTRY)


def spoil_by_an_open_bracket(path: Path) -> None:
    path.write_text(ENTRY + "b: {")


def spoil_by_emptying_it(path: Path) -> None:
    path.write_text("")


def spoil_by_an_impossible_date(path: Path) -> None:
    path.write_text(ENTRY + "b: 2021-13-45")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_by_deleting, spoil_by_a_folder, spoil_by_opening_it_to_others, spoil_by_a_repeated_key,
        spoil_by_an_open_bracket, spoil_by_emptying_it, spoil_by_an_impossible_date,
    ],
)
def test_while_a_roles_file_is_not_right_nobody_is_known(roles_file, clock, caplog, spoil) -> None:
    watched = ServerSecurity(roles=roles_file).watch_roles(clock=clock)
    assert watched.value().of_token(TOKEN) == "a"
    spoil(roles_file)
    clock.now += 2
    assert watched.value().of_token(TOKEN) is None and not watched.value().identities
    assert "nobody has a right by it until it is corrected" in caplog.text and TOKEN not in caplog.text
    if roles_file.is_dir():
        roles_file.rmdir()
    roles_file.write_text(ENTRY)
    roles_file.chmod(0o600)
    clock.now += 2
    assert watched.value().of_token(TOKEN) == "a"


def test_a_token_that_is_taken_out_is_unknown_within_a_second(roles_file, clock) -> None:
    watched = ServerSecurity(roles=roles_file).watch_roles(clock=clock)
    roles_file.write_text("{}")
    clock.now += 1
    roles: Roles = watched.value()
    assert roles.of_token(TOKEN) is None
