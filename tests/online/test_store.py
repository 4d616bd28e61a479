import asyncio
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.store import FacetOnlineStore, RequestRefused
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.segment import Segment
from tests.cases import RowReaderCases
from tests.fleet import free_ports
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows
from tests.waiting import PATIENCE_S, PROGRAM_S


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
    refused = r"item_kge__v1.*immutable.*Publish a new version"
    with pytest.raises(RequestRefused, match=refused):
        store.write_to_online_store("item_kge__v1", df=frame)
    with pytest.raises(RequestRefused, match=refused):
        asyncio.run(store.write_to_online_store_async("item_kge__v1", df=frame))
    assert ask(store, 1, "item.kge", ids) == before


@pytest.mark.parametrize("key", ["item", "id"])
def test_a_versions_file_cannot_be_written_through_the_offline_store(own_workspace: FeastRepository, key: str) -> None:
    """Feast's DuckDB store would rewrite the whole file; it cannot, because its rows have a fixed width."""
    store, file = own_workspace.store(), own_workspace.workspace.versions.path(1) / "tables" / "item.kge.parquet"
    before, frame = file.read_bytes(), pd.DataFrame({key: [7], "row": [b"\0" * 10], "event_timestamp": [AS_OF]})
    with pytest.raises((ValueError, KeyError)):
        store.write_to_offline_store("item_kge__v1", frame)
    assert file.read_bytes() == before


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
    workspace.versions.retire(1)
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


@pytest.mark.parametrize(
    "tags",
    [
        {"table": "../../versions"}, {"table": "../2/item.kge"}, {"table": ""}, {"version": ".."}, {"version": "../.."},
        {"manifest_sha256": "../.."}, {"as_of": "never"},
    ],
    ids=str,
)
def test_a_view_tagged_with_a_path_deletes_nothing(
    own_workspace: FeastRepository, caplog: pytest.LogCaptureFixture, tags: dict[str, str]
) -> None:
    store = own_workspace.store()
    view = store.get_feature_view("item_kge__v1")
    view.tags = {**view.tags, **tags}
    store.registry.apply_feature_view(view, store.project)
    before = files_below(own_workspace.workspace.root)
    with pytest.raises(IntegrityError, match="tags of an embedding view"):
        ask(own_workspace.store(), 1, "item.kge", [1])
    with pytest.raises(IntegrityError, match="tags of an embedding view"):
        own_workspace.materialize(["item_kge__v1"])
    own_workspace.store().teardown()
    gone = before - files_below(own_workspace.workspace.root)
    segments = own_workspace.workspace.segments
    own = {path for path in before if path.is_relative_to(segments)}
    kept = {path for path in own if path.is_relative_to(segments / "1" / "item.kge")}
    assert gone - {path for path in gone if "feast" in path.parts} == own - kept
    assert "item_kge__v1 goes, and no rows with it" in caplog.text


def test_a_view_of_another_manifest_deletes_no_segment(
    own_workspace: FeastRepository, caplog: pytest.LogCaptureFixture
) -> None:
    store = own_workspace.store()
    view = store.get_feature_view("item_kge__v1")
    view.tags = {**view.tags, "manifest_sha256": "ab" * 32}
    store.registry.apply_feature_view(view, store.project)
    own_workspace.store().teardown()
    segments = own_workspace.workspace.segments
    left = {path.parent for path in segments.rglob("*") if path.is_file()}
    assert left == {segments / "1" / "item.kge"} and "item.kge is of manifest" in caplog.text


def files_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


# Everything that Feast's interface has, and what becomes of it here: `ours`, or inherited and why that is right.
REVIEWED = {
    "async_supported": "ours",
    "initialize": "ours",
    "close": "ours",
    "online_read": "ours",
    "online_read_async": "ours",
    "online_write_batch": "ours",
    "online_write_batch_async": "ours",
    "update": "ours",
    "teardown": "ours",
    "retrieve_online_documents": "ours",
    "retrieve_online_documents_v2": "ours",
    "_read_features_per_fv": "ours",
    "_read_features_per_fv_async": "ours",
    "plan": "what `feast plan` shows to be created; `update` creates it, and Feast records it for its own SQLite only",
    "get_online_features": "ours",
    "get_online_features_async": "ours",
    "read_precomputed_vectors": "calls online_read with a view of no tags, hence the stock store's",
    "read_precomputed_vectors_async": "calls read_precomputed_vectors in a thread",
    "write_precomputed_vector": "calls online_write_batch with a view of no tags, hence the stock store's",
    "_check_versioned_read_support": "refuses `view@vN`: Feast's versions of schemas, which these views do not use",
    "_is_versioned_read_supported": "see _check_versioned_read_support",
    "_versioned_read_supported": "see _check_versioned_read_support",
    "_build_feature_types": "reads no store",
    "_compute_expected_feature_names": "reads no store",
    "_try_precomputed_fast_path": "reads no store",
}


def test_nothing_in_feasts_interface_was_overlooked() -> None:
    interface = {name for name in vars(OnlineStore) if not name.startswith("__") and name != "_abc_impl"}
    assert interface == set(REVIEWED)
    assert {name for name, what in REVIEWED.items() if what == "ours"} == interface & set(vars(FacetOnlineStore))


class ReadFeastsWay(FacetOnlineStore):
    """The same store read as Feast reads a store that has only `online_read`."""

    _read_features_per_fv = OnlineStore._read_features_per_fv
    _read_features_per_fv_async = OnlineStore._read_features_per_fv_async


@contextmanager
def online_store(store: FeatureStore, replacement: FacetOnlineStore) -> Iterator[None]:
    provider = store._get_provider()
    before, provider._online_store = provider.online_store, replacement
    try:
        yield
    finally:
        provider._online_store = before


REFERENCES = [
    "user_item_context:events", "item_kge__v1:row", "user_kge__v1:row", "item_context:events_7d", "item_kge__v2:row",
    "item_contrastive__v2:row", "user_context:last_event", "item_context:first_event",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_response_is_the_one_feast_would_have_made(
    workspace_with_versions: FeastRepository, data: st.DataObject
) -> None:
    """Byte for byte, for any mixture of views, versions, repeated and unknown ids; awaited or not."""
    store = workspace_with_versions.store()
    known = [entity_ids(entity, 200)[:8].tolist() for entity in ("user", "item")]
    ids = st.sampled_from([-(2**63), -1, 0, 2**63 - 1, *known[0], *known[1]])
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=12))
    request = {
        "features": data.draw(st.lists(st.sampled_from(REFERENCES), min_size=1, unique=True)),
        "entity_rows": {"user": [user for user, _ in pairs], "item": [item for _, item in pairs]},
        "full_feature_names": True,
        "include_feature_view_version_metadata": data.draw(st.booleans()),
    }
    with online_store(store, ReadFeastsWay()):
        expected = store.get_online_features(**request).proto
    assert store.get_online_features(**request).proto == expected
    assert asyncio.run(store.get_online_features_async(**request)).proto == expected


def test_a_service_of_several_tables_beside_context_of_both_entities(workspace_with_versions: FeastRepository) -> None:
    store, workspace = workspace_with_versions.store(), workspace_with_versions.workspace
    users, items = (entity_ids(entity, 200)[:3].tolist() for entity in ("user", "item"))
    features = [f"{view_name(2, table)}:row" for table in ("user.kge", "item.kge")] + ["user_item_context:events"]
    answer = store.get_online_features(
        features=features, entity_rows={"user": [*users, users[0]], "item": [*items, -1]}, full_feature_names=True
    ).to_dict()
    user_rows, item_rows = (
        [row.tobytes() for row in published_rows(workspace, 2, table)[1][:3]] for table in ("user.kge", "item.kge")
    )
    assert answer["user_kge__v2__row"] == [*user_rows, user_rows[0]]
    assert answer["item_kge__v2__row"] == [*item_rows, None]
    assert answer["user_item_context__events"] == [10.0, 11.0, 12.0, None]


@pytest.mark.parametrize("kind", [{"string_val": "7"}, {"int32_val": 7}, {"double_val": 7.0}, {}])
def test_an_id_of_another_type_is_refused_and_not_read_as_zero(
    workspace_with_versions: FeastRepository, kind: dict
) -> None:
    store = workspace_with_versions.store()
    values = RepeatedValue(val=[Value(int64_val=0), Value(**kind)])
    refused = rf"item_kge__v1.*64-bit integers.*{(next(iter(kind), 'null')).removesuffix('_val')} at row 1"
    with pytest.raises(RequestRefused, match=refused):
        store.get_online_features(features=["item_kge__v1:row"], entity_rows={"item": values})


@pytest.mark.parametrize("ids", [["abc"], [7, "abc"], [2**63], [None], [7, None], [[7]]])
def test_what_is_no_id_at_all_is_an_error(workspace_with_versions: FeastRepository, ids: list) -> None:
    store = workspace_with_versions.store()
    with pytest.raises((ValueError, TypeError, RequestRefused)):
        ask(store, 1, "item.kge", ids)


def test_no_ids_give_no_rows_and_the_wrong_entity_is_named(workspace_with_versions: FeastRepository) -> None:
    store = workspace_with_versions.store()
    assert ask(store, 1, "item.kge", []) == []
    with pytest.raises(RequestRefused, match=r"item_kge__v1: expected ids of item, got ids of user"):
        store.get_online_features(features=["item_kge__v1:row"], entity_rows={"user": [1]})


def test_vector_search_is_refused_for_rows_and_left_to_the_stock_store_for_others(
    workspace_with_versions: FeastRepository,
) -> None:
    store = workspace_with_versions.store()
    for search in (store.retrieve_online_documents, store.retrieve_online_documents_v2):
        with pytest.raises(RequestRefused, match=r"cannot search item_kge__v1.*get_online_features"):
            search(features=["item_kge__v1:row"], query=[0.0] * 12, top_k=3)
        with pytest.raises(ValueError, match=r"in the online store config"):  # SQLite's own words
            search(features=["item_context:events_7d"], query=[0.0], top_k=3)


COUNTED = """
import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener
from pipelines.contracts.quick_import import import_typeguard_optimized
import_typeguard_optimized()
from feast import FeatureStore
from feast.metrics import start_metrics_server
from tests.waiting import until

path, port, known = sys.argv[1], int(sys.argv[2]), [int(word) for word in sys.argv[3:]]
store, told = FeatureStore(path), []
start_metrics_server(store, port, start_resource_monitoring=False, start_freshness_monitoring=False)
for ids in (known, [-1, known[0]], [-2, -3, -4, -5]):
    store.get_online_features(features=["item_kge__v1:row"], entity_rows={"item": ids})
store.get_online_features(features=["user_kge__v1:row"], entity_rows={"user": [-1]})

def scraped():
    try:
        told[:] = [build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/metrics").read().decode()]
    except URLError:
        return False
    return True

until(scraped)
print(told[0])
"""


def test_feasts_metrics_count_ids_with_a_row_and_without(workspace_with_versions: FeastRepository) -> None:
    known = entity_ids("item", 200)[:7].tolist()
    words = [str(workspace_with_versions.path), str(free_ports(1)[0]), *map(str, known)]
    ran = subprocess.run(
        [sys.executable, "-c", COUNTED, *words], capture_output=True, text=True, timeout=PROGRAM_S, check=False,
    )
    counted = re.findall(
        r'^feast_online_features_status_total\{feature_view="(\w+)",status="(\w+)"\} ([0-9.]+)$', ran.stdout, re.M
    )
    assert {(view, status): float(count) for view, status, count in counted} == {
        ("item_kge__v1", "present"): 8, ("item_kge__v1", "not_found"): 5, ("user_kge__v1", "not_found"): 1,
    }, ran.stderr


def test_many_awaited_reads_of_all_kinds_at_once(workspace_with_versions: FeastRepository) -> None:
    store = workspace_with_versions.store()
    users, items = (entity_ids(entity, 200)[:30].tolist() for entity in ("user", "item"))
    request = {"features": REFERENCES, "entity_rows": {"user": users, "item": items}, "full_feature_names": True}
    expected = store.get_online_features(**request).to_dict()

    async def all_at_once() -> list:
        return await asyncio.gather(*(store.get_online_features_async(**request) for _ in range(100)))

    assert all(answer.to_dict() == expected for answer in asyncio.run(all_at_once()))


def test_a_version_being_opened_keeps_nobody_waiting_who_reads_another(
    own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing a large segment takes minutes; more readers wait for it here than the event loop has threads."""
    store, ids = own_workspace.store(), entity_ids("item", 200)[:5].tolist()
    expected = {version: ask(own_workspace.store(), version, "item.kge", ids) for version in (1, 2)}
    hashed, opened, open_segment = threading.Event(), [], Segment.open

    def open_slowly(directory: Path, **options) -> Segment:
        opened.append(directory)
        if directory.parent.name == "2":
            assert hashed.wait(PATIENCE_S)
        return open_segment(directory, **options)

    monkeypatch.setattr(Segment, "open", open_slowly)

    async def read(version: int) -> list[bytes | None]:
        reference = f"{view_name(version, 'item.kge')}:row"
        answer = await store.get_online_features_async(features=[reference], entity_rows={"item": ids})
        return answer.to_dict()["row"]

    async def scenario() -> None:
        waiting = [asyncio.create_task(read(2)) for _ in range(64)]
        try:
            assert await asyncio.wait_for(read(1), PATIENCE_S) == expected[1]
            assert not any(task.done() for task in waiting)
        finally:
            hashed.set()
        assert await asyncio.gather(*waiting) == [expected[2]] * 64

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    assert len(opened) == 2


def test_a_client_that_goes_away_takes_nothing_from_those_who_wait_for_the_same_rows(
    own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling must not reach what they share: a segment that has not begun to open could still be cancelled."""
    store, hashed, open_segment = own_workspace.store(), threading.Event(), Segment.open
    user, expected = int(entity_ids("user", 200)[0]), published_rows(own_workspace.workspace, 2, "user.kge")[1][0]

    def open_slowly(directory: Path, **options) -> Segment:
        assert hashed.wait(PATIENCE_S)
        return open_segment(directory, **options)

    monkeypatch.setattr(Segment, "open", open_slowly)
    monkeypatch.setattr(store._get_provider().online_store, "_openers", ThreadPoolExecutor(1))

    async def scenario() -> list:
        reads = [
            asyncio.create_task(store.get_online_features_async(features=[f"{view}:row"], entity_rows={"user": [user]}))
            for view in ("user_contrastive__v2", "user_kge__v2", "user_kge__v2")  # the first keeps the only opener busy
        ]
        while len(store._get_provider().online_store._readers) < 2:
            await asyncio.sleep(0)
        reads[1].cancel()
        await asyncio.wait(reads[1:2])
        hashed.set()
        await asyncio.wait(reads)
        assert not reads[2].cancelled()
        return reads[2].result().to_dict()["row"]

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == [expected.tobytes()]


def test_a_slow_context_store_keeps_no_embedding_waiting(
    workspace_with_versions: FeastRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, item = workspace_with_versions.store(), int(entity_ids("item", 200)[0])
    expected, answered = ask(store, 1, "item.kge", [item]), threading.Event()
    read_sqlite = SqliteOnlineStore.online_read

    def read_slowly(*arguments, **named):
        assert answered.wait(PATIENCE_S)
        return read_sqlite(*arguments, **named)

    monkeypatch.setattr(SqliteOnlineStore, "online_read", read_slowly)

    async def read(reference: str) -> list:
        answer = await store.get_online_features_async(features=[reference], entity_rows={"item": [item]})
        return answer.to_dict()[reference.partition(":")[2]]

    async def scenario() -> list:
        waiting = [asyncio.create_task(read("item_context:events_7d")) for _ in range(64)]
        try:
            assert await asyncio.wait_for(read("item_kge__v1:row"), PATIENCE_S) == expected
        finally:
            answered.set()
        return await asyncio.gather(*waiting)

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == [[10.0]] * 64


def test_rows_written_into_a_context_view_at_the_same_time_all_arrive(own_workspace: FeastRepository) -> None:
    """Feast's SQLite store shares one connection between threads: without turns, rows are lost."""
    store, users = own_workspace.store(), range(10**6, 10**6 + 240)

    def frame(user: int) -> pd.DataFrame:
        features = {"events_7d": 1.0, "events_30d": user, "active_days_30d": 3.0, "last_event": 4.0}
        return pd.DataFrame([{"user": user, "event_timestamp": AS_OF, **features}])

    async def await_half() -> None:
        writes = (store.write_to_online_store_async("user_context", df=frame(user)) for user in users[::2])
        await asyncio.gather(*writes)

    with ThreadPoolExecutor(8) as pool:
        awaited = pool.submit(asyncio.run, await_half())
        for written in pool.map(lambda user: store.write_to_online_store("user_context", df=frame(user)), users[1::2]):
            assert written is None
        awaited.result()
    answer = store.get_online_features(features=["user_context:events_30d"], entity_rows={"user": list(users)})
    assert answer.to_dict()["events_30d"] == [float(user) for user in users]


def test_what_appears_or_is_repaired_later_is_read_by_the_same_store(own_workspace: FeastRepository) -> None:
    directory = own_workspace.workspace.segment(2, "item.kge")
    hidden, store, ids = directory.with_name("elsewhere"), own_workspace.store(), entity_ids("item", 200)[:2].tolist()
    directory.rename(hidden)
    with pytest.raises(VersionNotFound, match="feast materialize"):
        ask(store, 2, "item.kge", ids)
    hidden.rename(directory)
    content = (directory / "rows.npy").read_bytes()
    (directory / "rows.npy").write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=r"rows\.npy is corrupted"):
        ask(store, 2, "item.kge", ids)
    (directory / "rows.npy").write_bytes(content)
    rows = published_rows(own_workspace.workspace, 2, "item.kge")[1][:2]
    assert ask(store, 2, "item.kge", ids) == [row.tobytes() for row in rows]


def mapped(repository: FeastRepository) -> set[int]:
    """Versions whose rows this process has mapped."""
    prefix = f"{repository.workspace.segments.resolve()}/"
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.partition(prefix)[2].partition("/")[0]) for line in lines if prefix in line}


def test_a_retired_version_is_let_go_when_the_next_one_is_opened(own_workspace: FeastRepository) -> None:
    """A process that keeps deleted rows mapped keeps their disk space."""
    store, ids = own_workspace.store(), entity_ids("item", 200)[:1].tolist()
    ask(store, 1, "item.kge", ids)
    assert mapped(own_workspace) == {1}
    own_workspace.workspace.versions.retire(1)
    own_workspace.apply()
    ask(store, 2, "item.kge", ids)
    assert mapped(own_workspace) == {2}


def test_a_closed_store_lets_go_of_everything_and_can_be_read_again(own_workspace: FeastRepository) -> None:
    store, ids = own_workspace.store(), entity_ids("item", 200)[:2].tolist()

    async def lifetime() -> list:
        await store.initialize()
        answer = await store.get_online_features_async(
            features=["item_kge__v1:row", "item_context:events_7d"], entity_rows={"item": ids}
        )
        assert mapped(own_workspace) == {1}
        await store.close()
        return answer.to_dict()["row"]

    rows = asyncio.run(lifetime())
    assert mapped(own_workspace) == set()
    assert ask(store, 1, "item.kge", ids) == rows
