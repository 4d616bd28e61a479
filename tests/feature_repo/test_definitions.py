import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pandas as pd

from pipelines.contracts.context import CONTEXT_FEATURES
from tests.releases import AS_OF, DIMS, FeastRepository, entity_ids, published_rows
from tests.waiting import PROGRAM_S

CONTEXT_VIEWS = {"user_context": ["user"], "item_context": ["item"], "user_item_context": ["user", "item"]}


def test_one_view_per_table_per_version_with_tags(workspace_with_versions: FeastRepository) -> None:
    views = {view.name: view for view in workspace_with_versions.store().list_feature_views()}
    embedding = {f"{table.replace('.', '_')}__v{version}" for table in DIMS for version in (1, 2)}
    assert set(views) == embedding | set(CONTEXT_VIEWS)
    view, manifest = views["item_kge__v2"], workspace_with_versions.workspace.versions.manifest(2)
    assert view.tags == {
        "version": "2", "table": "item.kge", "manifest_sha256": manifest.sha256, "as_of": "2011-07-31T00:00:00+00:00",
        "dataset": "synthetic", "quantization": "int4", "dim": "12", "rows": "200",
        "data_window": "2010-12-01..2011-07-31",
    }
    assert [(column.name, str(column.dtype)) for column in view.features] == [("row", "Bytes")]
    assert view.entities == ["item"] and view.online and not view.ttl


def test_context_views_have_the_features_the_ranker_reads(workspace_with_versions: FeastRepository) -> None:
    store = workspace_with_versions.store()
    for name, entities in CONTEXT_VIEWS.items():
        view = store.get_feature_view(name)
        wanted = {feature.column for feature in CONTEXT_FEATURES if feature.view == name}
        assert sorted(view.entities) == sorted(entities) and {column.name for column in view.features} == wanted


def test_services(workspace_with_versions: FeastRepository) -> None:
    services = {s.name: s for s in workspace_with_versions.store().list_feature_services()}
    assert set(services) == {"context", "ranker_v1", "ranker_v2"}
    projections = {projection.name for projection in services["ranker_v2"].feature_view_projections}
    assert projections == {f"{table.replace('.', '_')}__v2" for table in DIMS}


def test_published_rows_can_be_read_offline_but_not_before_their_time(workspace_with_versions: FeastRepository) -> None:
    ids = entity_ids("item", 200)[:2]
    moments = pd.DataFrame(
        {"item": [*ids, ids[0]], "event_timestamp": [AS_OF, AS_OF + timedelta(days=5), AS_OF - timedelta(days=1)]}
    )
    answer = workspace_with_versions.store().get_historical_features(moments, features=["item_kge__v1:row"]).to_df()
    rows = published_rows(workspace_with_versions.workspace, 1, "item.kge")[1]
    at = answer.set_index(["item", "event_timestamp"])["row"]
    assert bytes(at[ids[0], pd.Timestamp(AS_OF)]) == rows[0].tobytes()
    assert bytes(at[ids[1], pd.Timestamp(AS_OF + timedelta(days=5))]) == rows[1].tobytes()
    assert pd.isna(at[ids[0], pd.Timestamp(AS_OF - timedelta(days=1))])


def test_context_is_joined_as_of_each_moment(workspace_with_versions: FeastRepository) -> None:
    """The two rows of a user are stamped a month apart; between them, the first is what was known."""
    user, month = int(entity_ids("user", 200)[3]), timedelta(days=30)
    moments = [AS_OF, AS_OF - timedelta(seconds=1), AS_OF - month, AS_OF - month - timedelta(seconds=1)]
    frame = pd.DataFrame({"user": [user] * 4, "event_timestamp": moments})
    answer = workspace_with_versions.store().get_historical_features(frame, features=["user_context:events_7d"]).to_df()
    known = answer.set_index("event_timestamp")["events_7d"]
    assert [known[pd.Timestamp(moment)] for moment in moments[:3]] == [13.0, 3.0, 3.0]
    assert pd.isna(known[pd.Timestamp(moments[3])])


def test_definitions_need_neither_torch_nor_spark(workspace_with_versions: FeastRepository) -> None:
    """Feast imports torch where it is installed, so it is hidden rather than looked for."""
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'torchrec', 'fbgemm_gpu', 'pyspark')))\n"
        "import entities, sources, context_views, embedding_views, services\n"
        "assert len(embedding_views.views_by_version) == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=workspace_with_versions.path, check=True, timeout=PROGRAM_S)


def test_apply_on_an_empty_workspace(tmp_path: Path) -> None:
    repository = FeastRepository.create(tmp_path)
    repository.workspace.root.rmdir()  # a fresh clone has no var/
    repository.apply()
    assert {view.name for view in repository.store().list_feature_views()} == set(CONTEXT_VIEWS)
