"""What `feast teardown` and `feast apply` may not delete: rows of a version that a process holds."""

import shutil
import sqlite3

import pytest
from feast import FeatureStore

from pipelines.contracts.errors import VersionConflict, VersionInUse
from pipelines.contracts.manifest import MANIFEST_NAME
from tests.crash import require_served
from tests.releases import FeastRepository, entity_ids


def context_rows(repository: FeastRepository) -> int:
    with sqlite3.connect(repository.workspace.root / "feast" / "context.db") as database:
        return database.execute("SELECT count(*) FROM facet_item_context").fetchone()[0]


def test_teardown_is_refused_while_any_version_is_held_and_deletes_nothing(own_workspace: FeastRepository) -> None:
    workspace, rows = own_workspace.workspace, context_rows(own_workspace)
    views = {view.name for view in own_workspace.store().list_feature_views()}
    with workspace.versions.pinned(2, role="cpu-tier", address="10.0.0.7:7100"):
        with pytest.raises(VersionInUse) as refused:
            own_workspace.store().teardown()
        said = str(refused.value)
        assert "cannot tear down version 2" in said and "cpu-tier at 10.0.0.7:7100 (pid " in said
        assert "Roll out another version there, or stop the process; then tear down again." in said
    require_served(workspace, 1)
    require_served(workspace, 2)
    assert context_rows(own_workspace) == rows > 0
    assert {view.name for view in own_workspace.store().list_feature_views()} == views
    own_workspace.store().teardown()
    assert not workspace.segment(1, "item.kge").exists() and not workspace.segment(2, "item.kge").exists()


def test_a_holder_that_could_not_say_who_it_is_holds_all_the_same(own_workspace: FeastRepository) -> None:
    versions = own_workspace.workspace.versions
    with versions.pinned(1, role="ranker"):
        for path in (versions.root / "pins").glob("1-*.json"):
            path.unlink()
        with pytest.raises(VersionInUse, match="one that has not said who it is"):
            own_workspace.store().teardown()
    require_served(own_workspace.workspace, 1)


def test_nobody_can_take_hold_of_a_version_whose_rows_are_being_deleted(own_workspace: FeastRepository) -> None:
    versions = own_workspace.workspace.versions
    with versions.unpinned(1, to="tear down"), pytest.raises(VersionConflict), versions.pinned(1, role="cpu-tier"):
        pytest.fail("it was held")


@pytest.mark.parametrize("lost", ["manifest", "directory"])
def test_a_version_whose_files_are_lost_keeps_its_rows_while_it_is_held(
    own_workspace: FeastRepository, lost: str
) -> None:
    """`feast apply` takes a version without a manifest for retired: its views go, and with them its rows."""
    workspace = own_workspace.workspace
    with workspace.versions.pinned(1, role="cpu-tier"):
        if lost == "manifest":
            (workspace.versions.path(1) / MANIFEST_NAME).unlink()
            (workspace.versions.path(1) / "retired.json").write_text("{}")
        else:
            shutil.rmtree(workspace.versions.path(1))
        with pytest.raises(VersionInUse, match=r"cannot delete version 1: .*cpu-tier \(pid "):
            own_workspace.apply()
        assert all(workspace.segment(1, table).is_dir() for table in ("item.kge", "user.contrastive"))
        ids = entity_ids("item", 200)[:1].tolist()
        answer = FeatureStore(repo_path=str(own_workspace.path)).get_online_features(
            features=["item_kge__v1:row"], entity_rows={"item": ids}
        )
        assert answer.to_dict()["row"] != [None]
    own_workspace.apply()
    assert not workspace.segment(1, "item.kge").exists()
    require_served(workspace, 2)
