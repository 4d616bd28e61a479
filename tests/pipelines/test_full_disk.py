"""A disk without room, a limit on file sizes, a disk that may only be read: refused by name, and nothing changed.

The disks are file systems of their own, in memory (tmpfs), which only root may mount; the limit needs no right.
"""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.contracts.durable import remove_directory
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from tests.crash import (
    leftovers,
    materialize_repository,
    publish_release,
    require_served,
    require_whole,
    run_child,
)
from tests.releases import DIMS, FeastRepository, write_release

DISK_BYTES = 16 << 20
ROWS = 30_000  # of each table: about 2.5 MB of Parquet, and as much again in segments
VIEWS = [f"{table.replace('.', '_')}__v2" for table in DIMS]
FREE = [0.0, 0.1, 0.4, 0.7, 0.95]  # of what is needed

pytestmark = pytest.mark.slow


class Disk:
    """A mounted file system with a repository on it: version 1 served, and a ballast that leaves only so much free."""

    def __init__(self, where: Path) -> None:
        self.where, self.ballast = where, where / "ballast"
        self.repository = FeastRepository.create(where / "repository")

    @property
    def workspace(self) -> Workspace:
        return self.repository.workspace

    def free_bytes(self) -> int:
        state = os.statvfs(self.where)
        return state.f_bavail * state.f_frsize

    def leave_free(self, count: int) -> None:
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.free_bytes() - count))

    @contextmanager
    def read_only(self, where: Path) -> Iterator[FeastRepository]:
        """The same repository at another place, where nothing may be written."""
        where.mkdir()
        subprocess.run(["mount", "--bind", str(self.where), str(where)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
            yield FeastRepository(where / "repository")
        finally:
            subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small one, and one that is too large for what is left of a disk."""
    root = tmp_path_factory.mktemp("releases")
    return write_release(root / "small", seed=1), write_release(root / "large", seed=2, rows=ROWS)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, releases: tuple[Path, Path]) -> Iterator[Disk]:
    where = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(where)]
    tried = subprocess.run(mount, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    try:
        disk = Disk(where)
        publish(disk.workspace, releases[0])
        disk.repository.apply()
        disk.repository.materialize([view.replace("__v2", "__v1") for view in VIEWS])
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_publishing_onto_a_full_disk(disk: Disk, releases: tuple[Path, Path]) -> None:
    workspace, large = disk.workspace, releases[1]
    needed = sum(path.stat().st_size for path in large.rglob("*") if path.name != "release.json")
    for share in FREE:
        disk.leave_free(int(share * needed))
        outcome = run_child(publish_release, workspace.root, large, root=workspace.root)
        assert outcome.error.startswith(("DiskFull: cannot write", "InvalidConfig: cannot write")), (share, outcome)
        assert str(workspace.versions.root) in outcome.error and "No space left on device" in outcome.error
        assert require_whole(workspace) == [1] and not leftovers(workspace.root), (share, outcome)
        require_served(workspace, 1)
        disk.ballast.unlink()
    assert publish(workspace, large).version == 2 and require_whole(workspace) == [1, 2]


def test_materializing_onto_a_full_disk(disk: Disk, releases: tuple[Path, Path]) -> None:
    repository, workspace = disk.repository, disk.workspace
    if 2 not in workspace.versions.numbers():
        publish(workspace, releases[1])
    repository.apply()
    before = disk.free_bytes()
    repository.materialize(VIEWS)
    needed = before - disk.free_bytes()
    seen = set()
    for share in FREE:
        remove_directory(workspace.segments / "2", within=workspace.segments)
        disk.leave_free(int(share * needed))
        outcome = run_child(materialize_repository, repository.root, VIEWS, root=workspace.root)
        assert "No space left on device" in outcome.error and str(disk.where) in outcome.error, (share, outcome)
        seen.add(outcome.error.partition(":")[0])
        assert not leftovers(workspace.root), (share, outcome)
        require_served(workspace, 1)
        disk.ballast.unlink()
        repository.materialize(VIEWS)
        require_served(workspace, 2)
    assert "DiskFull" in seen


@pytest.mark.parametrize("limit_bytes", [0, 1 << 16, 1 << 18])
def test_a_limit_on_the_size_of_files(
    own_workspace: FeastRepository, releases: tuple[Path, Path], limit_bytes: int
) -> None:
    workspace, large = own_workspace.workspace, releases[1]
    outcome = run_child(_limited, limit_bytes, publish_release, (workspace.root, large), root=workspace.root)
    assert outcome.error.startswith("DiskFull: cannot write") and "File too large" in outcome.error, outcome
    assert require_whole(workspace) == [1, 2] and not leftovers(workspace.root)
    assert publish(workspace, large).version == 3
    own_workspace.apply()
    views = [view.replace("__v2", "__v3") for view in VIEWS]
    outcome = run_child(
        _limited, limit_bytes, materialize_repository, (own_workspace.root, views), root=workspace.root
    )
    assert outcome.error.startswith("DiskFull: cannot write") and "File too large" in outcome.error, outcome
    assert not leftovers(workspace.root)
    require_served(workspace, 2)
    own_workspace.materialize(views)
    require_served(workspace, 3)


def _limited(limit_bytes: int, work, args: tuple) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    work(*args)


def test_a_disk_that_may_only_be_read(disk: Disk, releases: tuple[Path, Path], tmp_path: Path) -> None:
    remove_directory(disk.workspace.segment(1, "item.kge"), within=disk.workspace.segments)
    other = write_release(tmp_path / "release", seed=5)
    with disk.read_only(tmp_path / "read_only") as repository:
        workspace = repository.workspace
        outcome = run_child(publish_release, workspace.root, other, root=workspace.root)
        assert outcome.error.startswith(f"InvalidConfig: cannot write to {workspace.versions.root}"), outcome
        assert "Read-only file system" in outcome.error
        outcome = run_child(materialize_repository, repository.root, ["item_kge__v1"], root=workspace.root)
        assert "Read-only file system" in outcome.error and str(tmp_path / "read_only") in outcome.error, outcome
    disk.repository.materialize(["item_kge__v1"])
    with disk.read_only(tmp_path / "read_only_too") as repository:
        require_served(repository.workspace, 1)
        with repository.workspace.versions.pinned(1, role="reader"):
            assert require_whole(repository.workspace)
    assert not leftovers(disk.workspace.root)
