"""What is answered while a real `feast materialize` writes, after it was killed there, and after the next one failed.

The command stands at the lock that writers of the context store take, which the test holds: by then it has written
into the registry that its view is being materialized.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from feast import FeatureViewState

from online.ranking.context_source import FeastContext
from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.locks import locked
from tests.feast_command import FEAST
from tests.releases import FeastRepository, entity_ids
from tests.waiting import PROGRAM_S, until


def command(repository: FeastRepository, log: Path, *arguments: str) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(
            [*FEAST, *arguments], cwd=repository.path, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(log.parent), "PYTHONPATH": os.pathsep.join(sys.path)},
        )


@contextmanager
def materializing(repository: FeastRepository, log: Path) -> Iterator[subprocess.Popen]:
    """`feast materialize` in the middle of its work; killed at the end of the block."""
    lock = repository.workspace.root / "feast" / "context.lock"
    lock.touch()
    store = repository.store()
    registry = repository.path / store.config.registry.path
    before = registry.stat().st_mtime_ns
    with locked(lock) as held:
        assert held
        process = command(repository, log, "materialize", "-v", "item_context", "2010-01-01", "2030-01-01")
        try:
            until(
                lambda: process.poll() is not None
                or (
                    registry.stat().st_mtime_ns != before
                    and store.get_feature_view("item_context").state == FeatureViewState.MATERIALIZING
                ),
                PROGRAM_S,
            )
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.kill()
            process.wait()


def require_answers(repository: FeastRepository) -> None:
    """A ranker starts and reads; so does the SDK, context and rows."""
    items = entity_ids("item", 200)[3:4]
    columns = FeastContext(repository.path, CONTEXT_FEATURES).columns(
        CONTEXT_FEATURES, users=entity_ids("user", 200)[3:4], items=items
    )
    assert columns["item_context__events_7d"].tolist() == [13.0]
    answer = repository.store().get_online_features(
        features=["item_context:events_7d", "item_kge__v1:row"], entity_rows={"item": items.tolist()}
    ).to_dict()
    assert answer["events_7d"] == [13.0] and answer["row"] != [None]


@pytest.mark.slow
def test_while_feast_materialize_writes_and_after_it_was_killed(own_workspace: FeastRepository, tmp_path: Path) -> None:
    with materializing(own_workspace, tmp_path / "log.txt"):
        running = FeastContext(own_workspace.path, CONTEXT_FEATURES)
        require_answers(own_workspace)
    assert own_workspace.store().get_feature_view("item_context").state == FeatureViewState.MATERIALIZING
    require_answers(own_workspace)
    assert running.columns(CONTEXT_FEATURES, users=entity_ids("user", 1), items=entity_ids("item", 1))
    own_workspace.materialize(["item_context"])
    assert own_workspace.store().get_feature_view("item_context").state == FeatureViewState.AVAILABLE_ONLINE
    require_answers(own_workspace)


@pytest.mark.slow
def test_after_one_was_killed_and_the_next_one_failed(own_workspace: FeastRepository, tmp_path: Path) -> None:
    with materializing(own_workspace, tmp_path / "log.txt"):
        pass
    file = own_workspace.workspace.views / "item_context.parquet"
    file.rename(file.with_suffix(".away"))
    with pytest.raises(Exception, match="facet prepare"):
        own_workspace.materialize(["item_context"])
    require_answers(own_workspace)


@pytest.mark.slow
def test_a_view_that_was_applied_after_the_ranker_started(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    view = store.get_feature_view("item_context")
    store.registry.delete_feature_view("item_context", store.project)
    others = [feature for feature in CONTEXT_FEATURES if feature.view != "item_context"]
    running = FeastContext(own_workspace.path, others)
    store.registry.apply_feature_view(view, store.project)
    running.require(CONTEXT_FEATURES)
    ids = {"users": entity_ids("user", 200)[3:4], "items": entity_ids("item", 200)[3:4]}
    assert running.columns(CONTEXT_FEATURES, **ids)["item_context__events_7d"].tolist() == [13.0]


@pytest.mark.slow
def test_a_command_that_leaves_a_version_out_says_so_last(own_workspace: FeastRepository, tmp_path: Path) -> None:
    """Below no pages of what DuckDB finds left at the end, nor of a warning about a setting that does its work."""
    log, workspace = tmp_path / "log.txt", own_workspace.workspace
    (workspace.segment(2, "item.kge") / "segment.json").unlink()
    workspace.segment(2, "item.kge").rename(tmp_path / "away")
    views = ["-v", "item_kge__v2", "-v", "item_context"]
    process = command(own_workspace, log, "materialize", *views, "2011-07-01T00:00:00", "2011-07-02T00:00:00")
    assert process.wait(PROGRAM_S) == 1
    text = log.read_text()
    assert "item_kge__v2: version 2 is not materialized" in text.splitlines()[-1]
    assert "nanobind" not in text and "serve_features_while_materializing" not in text
    process = command(own_workspace, log, "materialize", *views, "2011-07-01T00:00:00", "2011-08-02T00:00:00")
    assert process.wait(PROGRAM_S) == 0
    text = log.read_text()
    assert "nanobind" not in text and "serve_features_while_materializing" not in text
    require_answers(own_workspace)
