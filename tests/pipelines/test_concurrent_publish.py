"""Two who publish, or materialize, at the same moment: one wins, the other is told, nothing is mixed."""

from pathlib import Path

import pytest

from pipelines.contracts.durable import remove_directory, sha256_of
from pipelines.contracts.workspace import Workspace
from tests.crash import leftovers, require_served, require_whole
from tests.releases import FeastRepository, entity_ids, published_rows, write_release
from tests.rivals import materializing, publishing, race

pytestmark = pytest.mark.slow

ROUNDS = 12


def test_two_publishers(tmp_path: Path) -> None:
    """In even rounds each has a release of its own, in odd rounds both have the same."""
    workspace, folders = Workspace(tmp_path / "var"), [tmp_path / name for name in ("mine", "theirs")]
    for number in range(ROUNDS):
        for position, folder in enumerate(folders):
            write_release(folder / str(number), seed=2 * number + position * (1 - number % 2), rows=60)
    outcomes = race(range(ROUNDS), *((publishing, workspace.root, folder) for folder in folders))
    published = require_whole(workspace)
    for number, outcome in enumerate(outcomes):
        won = {told: folder for told, folder in zip(outcome, folders, strict=True) if told.isdigit()}
        lost = [told for told in outcome if not told.isdigit()]
        numbers = [told for told in outcome if told.isdigit()]
        # Of the same release, the second may find the first between its rename and its pointer, and finish for it.
        assert len(won) == 1 if number % 2 else len(won) == len(numbers) > 0, outcome
        assert all(told.startswith("VersionConflict") for told in lost), outcome
        for told, folder in won.items():
            manifest = workspace.versions.manifest(int(told))
            expected = {name: sha256_of(folder / str(number) / name) for name in manifest.files}
            assert manifest.files == expected
    winners = sorted({int(told) for outcome in outcomes for told in outcome if told.isdigit()})
    assert winners == published == list(range(1, len(published) + 1))
    assert workspace.versions.current() == published[-1] and not leftovers(workspace.root)


def test_two_materializations(own_workspace: FeastRepository) -> None:
    """Real `feast materialize` calls of one view, over one registry file: who comes second finds the rows there."""
    workspace = own_workspace.workspace
    specs = [(version, spec) for version in (1, 2) for spec in workspace.versions.manifest(version).tables]
    for version, spec in specs:
        remove_directory(workspace.segment(version, spec.name), within=workspace.segments)
    views = [spec.view_name(version) for version, spec in specs]
    outcomes = race(range(len(views)), *[(materializing, own_workspace.root, views)] * 2)
    assert outcomes == [("done", "done")] * len(views)
    for version in (1, 2):
        require_served(workspace, version)
        first = published_rows(workspace, version, "item.kge")[1][0].tobytes()
        ids = entity_ids("item", 200)[:1].tolist()
        own_workspace.materialize([f"item_kge__v{version}"])
        answer = own_workspace.store().get_online_features([f"item_kge__v{version}:row"], entity_rows={"item": ids})
        assert answer.to_dict()["row"] == [first]
    assert not leftovers(workspace.segments)
