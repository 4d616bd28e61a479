import asyncio
import logging

import pandas as pd
import pytest
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from pipelines.contracts.errors import IntegrityError, InvalidConfig, VersionNotFound
from tests.cases import RowReaderCases
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows


def view_name(version: int, table: str) -> str:
    return f"{table.replace('.', '_')}__v{version}"


def ask(store: FeatureStore, version: int, table: str, ids: list[int]) -> list[bytes | None]:
    reference = f"{view_name(version, table)}:row"
    answer = store.get_online_features(features=[reference], entity_rows={table.partition(".")[0]: ids})
    return answer.to_dict()["row"]


class TestGetOnlineFeatures(RowReaderCases):
    errors = (FeatureViewNotFoundException,)

    def prepare(self, repository: FeastRepository) -> None:
        self.store = repository.store()

    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        return ask(self.store, version, table, ids)


def test_unknown_ids_are_not_found_and_known_ones_carry_the_versions_time(
    workspace_with_versions: FeastRepository,
) -> None:
    store, known = workspace_with_versions.store(), int(entity_ids("item", 200)[0])
    answer = store.get_online_features(features=["item_kge__v1:row"], entity_rows={"item": [known, -7]}).proto
    result = answer.results[list(answer.metadata.feature_names.val).index("row")]
    names = [result.DESCRIPTOR.fields_by_name["statuses"].enum_type.values_by_number[s].name for s in result.statuses]
    assert names == ["PRESENT", "NOT_FOUND"]
    assert result.event_timestamps[0].seconds == AS_OF.timestamp()


def test_all_tables_of_a_version_in_one_service(workspace_with_versions: FeastRepository) -> None:
    store = workspace_with_versions.store()
    user, item = (int(entity_ids(entity, 200)[5]) for entity in ("user", "item"))
    answer = store.get_online_features(
        features=store.get_feature_service("ranker_v2"), entity_rows=[{"user": user, "item": item}],
        full_feature_names=True,
    ).to_dict()
    for table in ("user.kge", "user.contrastive", "item.kge", "item.contrastive"):
        row = published_rows(workspace_with_versions.workspace, 2, table)[1][5].tobytes()
        assert answer[f"{view_name(2, table)}__row"] == [row]


def test_context_comes_from_the_stock_store_latest_row_first(workspace_with_versions: FeastRepository) -> None:
    store, item = workspace_with_versions.store(), int(entity_ids("item", 200)[3])
    answer = store.get_online_features(
        features=["item_context:events_7d", "item_context:first_event"], entity_rows={"item": [item, -1]}
    ).to_dict()
    assert answer["events_7d"] == [13.0, None]  # 3 % 7, plus 10 for the later of the two rows
    assert answer["first_event"] == [AS_OF.timestamp() - 4 * 86_400, None]


def test_an_awaited_read_gives_the_same(workspace_with_versions: FeastRepository) -> None:
    store, ids = workspace_with_versions.store(), entity_ids("user", 200)[:5].tolist()
    asked = store.get_online_features_async(features=["user_kge__v1:row"], entity_rows={"user": [*ids, -1]})
    assert asyncio.run(asked).to_dict()["row"] == ask(store, 1, "user.kge", [*ids, -1])


def test_rows_of_a_version_cannot_be_written(workspace_with_versions: FeastRepository) -> None:
    store, ids = workspace_with_versions.store(), entity_ids("item", 200)[:1].tolist()
    before = ask(store, 1, "item.kge", ids)
    frame = pd.DataFrame({"item": ids, "row": [b"\0" * 10], "event_timestamp": [AS_OF]})
    with pytest.raises(InvalidConfig, match=r"item_kge__v1.*immutable.*Publish a new version"):
        store.write_to_online_store("item_kge__v1", df=frame)
    assert ask(store, 1, "item.kge", ids) == before


def test_rows_of_a_context_view_can_be_written(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    features = {"events_7d": 1.0, "events_30d": 2.0, "active_days_30d": 3.0, "last_event": 4.0}
    frame = pd.DataFrame([{"user": 77_777_777, "event_timestamp": AS_OF, **features}])
    store.write_to_online_store("user_context", df=frame)
    answer = store.get_online_features(features=["user_context:events_30d"], entity_rows={"user": [77_777_777]})
    assert answer.to_dict()["events_30d"] == [2.0]


def test_a_view_that_is_not_materialized_is_an_error(own_workspace: FeastRepository) -> None:
    (own_workspace.workspace.segment(2, "item.kge") / "segment.json").unlink()
    store = own_workspace.store()
    with pytest.raises(VersionNotFound, match="feast materialize"):
        ask(store, 2, "item.kge", [1])
    assert ask(store, 1, "item.kge", entity_ids("item", 200)[:1].tolist()) != [None]


def test_an_altered_segment_is_refused_by_name_and_other_versions_still_answer(own_workspace: FeastRepository) -> None:
    path = own_workspace.workspace.segment(2, "item.kge") / "rows.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    store = own_workspace.store()
    with pytest.raises(IntegrityError, match=r"item\.kge/rows\.npy is corrupted"):
        ask(store, 2, "item.kge", [1])
    assert ask(store, 1, "item.kge", entity_ids("item", 200)[:1].tolist()) != [None]


def test_retiring_a_version_deletes_its_segments_and_no_others(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    (workspace.versions.path(1) / "manifest.json").unlink()
    own_workspace.apply()
    assert not workspace.segment(1, "item.kge").exists() and workspace.segment(2, "item.kge").is_dir()
    store = own_workspace.store()
    assert ask(store, 2, "item.kge", entity_ids("item", 200)[:1].tolist()) != [None]
    with pytest.raises(FeatureViewNotFoundException):
        ask(store, 1, "item.kge", [1])


def test_views_that_vanish_from_the_repository_keep_the_segments_of_a_published_version(
    own_workspace: FeastRepository, caplog: pytest.LogCaptureFixture
) -> None:
    definitions = {name: (own_workspace.path / name).read_text() for name in ("embedding_views.py", "services.py")}
    for name in definitions:
        (own_workspace.path / name).unlink()
    with caplog.at_level(logging.WARNING, logger="online.store"):
        own_workspace.apply()
    assert "item_kge__v1 is gone" in caplog.text and "is kept" in caplog.text
    assert own_workspace.workspace.segment(1, "item.kge").is_dir()
    for name, text in definitions.items():
        (own_workspace.path / name).write_text(text)
    own_workspace.apply()
    assert ask(own_workspace.store(), 1, "item.kge", entity_ids("item", 200)[:1].tolist()) != [None]


def test_teardown_deletes_what_can_be_materialized_again_and_nothing_else(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    own_workspace.store().teardown()
    assert not workspace.segment(1, "item.kge").exists() and not (workspace.root / "feast" / "context.db").exists()
    workspace.versions.manifest(1).verify(workspace.versions.path(1))
    own_workspace.apply()
    own_workspace.materialize()
    assert ask(own_workspace.store(), 1, "item.kge", entity_ids("item", 200)[:1].tolist()) != [None]
