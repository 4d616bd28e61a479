"""Publish, materialize and retire, each killed before every single thing that it does to the disk.

Random instants are in `test_publish`, `test_engine` and, in their hundreds, `test_crash_series` (`make test-crash`).
"""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.audit import audit
from pipelines.contracts.durable import remove_directory
from pipelines.contracts.errors import VersionConflict, VersionNotFound
from pipelines.contracts.segment import Segment
from pipelines.garbage import collect, find
from pipelines.publish import publish
from pipelines.retire import retire
from tests.crash import (
    every_step,
    leftovers,
    materialize_repository,
    publish_release,
    require_served,
    require_whole,
    retire_version,
)
from tests.releases import FeastRepository, entity_ids, published_rows, write_release

pytestmark = pytest.mark.slow


def answered(repository: FeastRepository, version: int) -> bytes | None:
    """What `get_online_features` of a new process answers for the first item of `item.kge`."""
    ids = entity_ids("item", 200)[:1].tolist()
    answer = repository.store().get_online_features(features=[f"item_kge__v{version}:row"], entity_rows={"item": ids})
    return answer.to_dict()["row"][0]


def audited(repository: FeastRepository, version: int) -> None:
    repository.apply()
    repository.materialize([spec.view_name(version) for spec in repository.workspace.versions.manifest(version).tables])
    report = audit(repository.workspace, version)
    assert report["rows_checked"] > 0 and report["rows_different"] == 0 and not report["problems"]


def test_publish(own_workspace: FeastRepository, tmp_path: Path) -> None:
    workspace, release = own_workspace.workspace, write_release(tmp_path / "release", seed=3)
    moments = {"before": 0, "unpointed": 0, "done": 0}
    for outcome in every_step(publish_release, workspace.root, release, root=workspace.root):
        number = max(*require_whole(workspace), 3)
        require_served(workspace, 2)
        if workspace.versions.current() != 2:
            moments["done"] += 1
            with pytest.raises(VersionConflict, match="not published yet"):
                publish(workspace, release)
        else:
            moments["unpointed" if len(require_whole(workspace)) > 2 else "before"] += 1
            number = publish(workspace, release).version
        assert workspace.versions.current() == number and require_whole(workspace)[-1] == number, outcome
        assert not leftovers(workspace.versions.root), outcome
        if outcome.killed:
            workspace.versions.point_to(2)
            retire(workspace, number)
    assert moments["before"] > 20 and moments["unpointed"] > 2 and moments["done"] > 1
    audited(own_workspace, number)
    require_served(workspace, number)


def test_materialize(own_workspace: FeastRepository) -> None:
    workspace, views = own_workspace.workspace, ["item_kge__v2"]
    first_row, done = published_rows(workspace, 1, "item.kge")[1][0].tobytes(), set()
    for outcome in every_step(materialize_repository, own_workspace.root, views, root=own_workspace.root):
        segments = [path for path in (workspace.segments / "2").glob("*") if not path.name.startswith(".")]
        assert all(Segment.open(path).spec.rows == 200 for path in segments), outcome
        done.add(len(segments))
        require_served(workspace, 1)
        require_whole(workspace)
        assert answered(own_workspace, 1) == first_row
        own_workspace.materialize(views)
        require_served(workspace, 2)
        assert not leftovers(workspace.segments / "2"), outcome
        if outcome.killed:
            remove_directory(workspace.segment(2, "item.kge"), within=workspace.segments)
    audited(own_workspace, 2)
    collect(workspace)
    assert done == {3, 4} and not find(workspace) and not leftovers(workspace.root)


def test_retire(own_workspace: FeastRepository, workspace_with_versions: FeastRepository) -> None:
    workspace, moments = own_workspace.workspace, {"before": 0, "after": 0}
    for outcome in every_step(retire_version, workspace.root, 1, root=workspace.root):
        require_served(workspace, 2)
        published = 1 in require_whole(workspace)
        moments["before" if published else "after"] += 1
        if published:
            require_served(workspace, 1)
        if outcome.steps % 2:
            collect(workspace)
            assert (1 in workspace.versions.numbers()) == published
        if not published:
            with pytest.raises(VersionNotFound):
                workspace.versions.manifest(1)
        with suppress(VersionNotFound):  # nothing is left to retire
            retire(workspace, 1)
        collect(workspace)
        assert not find(workspace) and not leftovers(workspace.root), outcome
        assert [path.name for path in workspace.versions.path(1).iterdir()] == ["retired.json"], outcome
        assert not (workspace.segments / "1").exists(), outcome
        require_served(workspace, 2)
        for part in ("versions", "segments"):  # put version 1 back
            shutil.rmtree(workspace.root / part / "1", ignore_errors=True)
            shutil.copytree(workspace_with_versions.workspace.root / part / "1", workspace.root / part / "1")
    assert moments["before"] > 5 and moments["after"] > 5
