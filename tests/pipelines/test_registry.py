"""Feast's registry written by several processes: a file, and a database, which is Feast's own choice for that."""

from datetime import timedelta

import pytest
import yaml
from feast import FeatureStore, FeatureViewState
from feast.feature_view import FeatureView

from pipelines.contracts.errors import VersionConflict
from pipelines.registry import DurableRegistryStore
from tests.releases import WIDE_RANGE, FeastRepository
from tests.rivals import applying, declaring, materializing, race

MORE = """
from datetime import timedelta

from entities import user
from feast import FeatureView, Field
from feast.types import Float64, Int64
from sources import user_context_source

more_{number} = FeatureView(
    name="more_{number}", entities=[user], ttl=timedelta(0), source=user_context_source,
    schema=[Field(name="user", dtype=Int64), Field(name="events_7d", dtype=Float64)],
)
"""


@pytest.fixture(params=["file", "sql"])
def repository(request: pytest.FixtureRequest, own_workspace: FeastRepository) -> FeastRepository:
    if request.param == "sql":
        use_sql(own_workspace)
        own_workspace.apply()
    return own_workspace


def use_sql(repository: FeastRepository) -> None:
    """What the comment in feature_store.yaml says, with SQLite."""
    path = repository.path / "feature_store.yaml"
    config = yaml.safe_load(path.read_text())
    config["registry"] = {
        "registry_type": "sql", "path": f"sqlite:///{repository.workspace.root / 'feast' / 'registry.sqlite'}",
        "serve_features_while_materializing": True,
    }
    path.write_text(yaml.safe_dump(config))


def views(repository: FeastRepository) -> set[str]:
    return {view.name for view in repository.store().list_feature_views()}


def change(store: FeatureStore, name: str, **changes: object) -> None:
    """A change in memory, not committed; a read past the cache would drop the changes before it."""
    registry, project = store.registry, store.project
    view = registry.get_feature_view("user_context", project, allow_cache=True)
    entity = registry.get_entity("user", project, allow_cache=True)
    changed = FeatureView(name=name, entities=[entity], source=view.batch_source, schema=view.schema, **changes)
    registry.apply_feature_view(changed, project, commit=False)


def test_processes_that_commit_at_the_same_moment_lose_no_view(repository: FeastRepository) -> None:
    before, rounds, who = views(repository), range(4), ("a", "b", "c")
    outcomes = race(rounds, *((declaring, repository.root, prefix) for prefix in who))
    assert outcomes == [("changed",) * len(who)] * len(rounds)
    assert views(repository) == before | {f"{prefix}_{number}" for prefix in who for number in rounds}


@pytest.mark.slow
def test_feast_apply_beside_feast_materialize(repository: FeastRepository) -> None:
    before, rounds, context = views(repository), range(6), ["user_context", "item_context"] * 3
    intervals = {name: len(repository.store().get_feature_view(name).materialization_intervals) for name in context}
    outcomes = race(rounds, (applying, repository.root, MORE), (materializing, repository.root, context))
    assert outcomes == [("done", "done")] * len(rounds)
    assert views(repository) == before | {f"more_{number}" for number in rounds}
    if repository.store().config.registry.registry_type == "sql":
        return  # which keeps of a view that both wrote what came last, its state and intervals included
    for name in set(context):
        view = repository.store().get_feature_view(name)
        assert view.state == FeatureViewState.AVAILABLE_ONLINE
        assert len(view.materialization_intervals) == intervals[name] + 3


def test_a_commit_of_another_between_two_changes_undoes_neither(own_workspace: FeastRepository) -> None:
    """As `feast materialize` commits while `feast apply` takes one view after the other."""
    one, other = own_workspace.store(), own_workspace.store()
    change(one, "first")
    change(other, "between")
    other.registry.commit()
    change(one, "second")
    one.registry.commit()
    assert {"first", "between", "second"} <= views(own_workspace)
    assert {view.name for view in one.list_feature_views(allow_cache=True)} == views(own_workspace)


def test_both_sides_of_one_view_are_kept(own_workspace: FeastRepository) -> None:
    one, other = own_workspace.store(), own_workspace.store()
    one.list_feature_views(), other.list_feature_views()
    view = one.registry.get_feature_view("user_context", one.project, allow_cache=True)
    view.description, view.tags = "another", {"owner": "ads"}
    one.registry.apply_feature_view(view, one.project, commit=False)
    for store, days in ((other, 1), (one, 2)):
        start = WIDE_RANGE[0] + timedelta(days=days)
        viewed = store.registry.get_feature_view("user_context", store.project, allow_cache=True)
        store.registry.apply_materialization(viewed, store.project, start, WIDE_RANGE[1], commit=store is other)
    one.registry.commit()
    view = own_workspace.store().get_feature_view("user_context")
    assert view.description == "another" and view.tags == {"owner": "ads"}
    starts = [start for start, _ in view.materialization_intervals]
    assert sorted(starts)[-2:] == [WIDE_RANGE[0] + timedelta(days=1), WIDE_RANGE[0] + timedelta(days=2)]


def test_what_one_deleted_is_not_brought_back_by_another(own_workspace: FeastRepository) -> None:
    one, other = own_workspace.store(), own_workspace.store()
    one.list_feature_views()
    view = one.registry.get_feature_view("user_context", one.project, allow_cache=True)
    view.description = "another"
    one.registry.apply_feature_view(view, one.project, commit=False)
    other.registry.delete_feature_view("user_context", other.project)
    one.registry.delete_feature_service("context", one.project, commit=False)
    one.registry.commit()
    assert "user_context" not in views(own_workspace)
    assert "context" not in {service.name for service in own_workspace.store().list_feature_services()}


def test_changes_to_a_state_that_nobody_remembers_are_refused(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    proto = store.registry.proto()
    files = DurableRegistryStore(store.config.registry, own_workspace.path)
    content = (own_workspace.workspace.root / "feast" / "registry.db").read_bytes()
    with pytest.raises(VersionConflict, match="Run the same command again"):
        files.update_registry_proto(proto)
    assert (own_workspace.workspace.root / "feast" / "registry.db").read_bytes() == content


def test_a_view_that_was_materialized_stays_readable_when_a_later_materialization_fails(
    own_workspace: FeastRepository,
) -> None:
    """Killed, and then failed, which Feast records as a view that was never materialized."""
    store = own_workspace.store()
    view = store.get_feature_view("item_context")
    view.state = FeatureViewState.MATERIALIZING
    store.registry.apply_feature_view(view, store.project)
    (own_workspace.workspace.views / "item_context.parquet").unlink()
    with pytest.raises(Exception, match="facet prepare"):
        own_workspace.materialize(["item_context"])
    assert own_workspace.store().get_feature_view("item_context").state == FeatureViewState.AVAILABLE_ONLINE


def test_a_view_that_never_was_materialized_is_not_said_to_be_available(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    change(store, "new")
    store.registry.commit()
    view = store.get_feature_view("new")
    view.state = FeatureViewState.GENERATED
    store.registry.apply_feature_view(view, store.project)
    assert own_workspace.store().get_feature_view("new").state == FeatureViewState.GENERATED


def test_what_feasts_web_interface_keeps_in_the_registry(own_workspace: FeastRepository) -> None:
    store, before = own_workspace.store(), views(own_workspace)
    store.registry.set_project_metadata(store.project, "visits", "[1]")
    assert own_workspace.store().registry.get_project_metadata(store.project, "visits") == "[1]"
    change(store, "first")
    store.registry.commit()
    assert own_workspace.store().registry.get_project_metadata(store.project, "visits") == "[1]"
    assert views(own_workspace) == before | {"first"}
