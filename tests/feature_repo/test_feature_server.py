"""`feast serve`: rows over HTTP, from two versions at once, while versions come and go; what it refuses, and how.

A value of type Bytes is base64 text in an answer. Feast takes no Bytes from JSON: a row sent as text is refused by
Feast itself, before our store is asked, and a row sent as null is dropped by it.
"""

import asyncio
import logging
import shutil
import statistics
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest

from online.store import RequestRefused
from pipelines.publish import publish
from pipelines.retire import retire
from tests.releases import AS_OF, DIMS, FeastRepository, entity_ids, published_rows, write_release
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow
logger = logging.getLogger(__name__)

STAMP = "2012-01-01T00:00:00"
EVERY_TIME = {"start_ts": "2010-01-01T00:00:00", "end_ts": "2030-01-01T00:00:00"}

# Views that can be pushed to: an ordinary one, and one that says it holds rows of version 2.
PUSHED_VIEWS = """
from datetime import timedelta

from embedding_views import views_by_version
from entities import item, user
from feast import FeatureView, Field, PushSource
from feast.types import Bytes, Float64, Int64
from sources import user_context_source

rows = next(view for view in views_by_version[2] if view.name == "item_kge__v2")
live = FeatureView(
    name="user_live", entities=[user], ttl=timedelta(0),
    schema=[Field(name="user", dtype=Int64), Field(name="events_7d", dtype=Float64)],
    source=PushSource(name="live_push", batch_source=user_context_source),
)
pushed = FeatureView(
    name="pushed_rows", entities=[item], ttl=timedelta(0), tags=rows.tags,
    schema=[Field(name="item", dtype=Int64), Field(name="row", dtype=Bytes)],
    source=PushSource(name="rows_push", batch_source=rows.batch_source),
)
"""


@pytest.fixture(scope="module")
def repository(
    workspace_with_versions: FeastRepository, tmp_path_factory: pytest.TempPathFactory
) -> FeastRepository:
    root = tmp_path_factory.mktemp("served") / "own"
    shutil.copytree(workspace_with_versions.root, root)
    repository = FeastRepository(root)
    (repository.path / "pushed_views.py").write_text(PUSHED_VIEWS)
    repository.apply()
    return repository


@pytest.fixture(scope="module")
def server(repository: FeastRepository, feast_server: Any) -> Any:
    return feast_server(repository, "/health", "serve", "--registry_ttl_sec", "1")


def decoded(answer: dict[str, Any], column: str) -> list[bytes | None]:
    result = answer["results"][answer["metadata"]["feature_names"].index(column)]
    for value, status in zip(result["values"], result["statuses"], strict=True):
        assert status == ("NOT_FOUND" if value is None else "PRESENT")
    return [value and b64decode(value, validate=True) for value in result["values"]]


def ask(server: Any, features: list[str] | str, **ids: list) -> tuple[int, Any]:
    wanted = {"feature_service": features} if isinstance(features, str) else {"features": features}
    return server.post("/get-online-features", {**wanted, "entities": ids, "full_feature_names": True})


def truth(repository: FeastRepository, version: int, table: str, rows: int = 20) -> list[bytes]:
    return [row.tobytes() for row in published_rows(repository.workspace, version, table)[1][:rows]]


def test_rows_of_two_versions_at_the_same_time(server: Any, repository: FeastRepository) -> None:
    users, items = (entity_ids(entity, 200)[:20].tolist() for entity in ("user", "item"))
    service = {table: [*truth(repository, 2, table), None] for table in DIMS}
    view, seconds = [*truth(repository, 1, "item.kge"), None, truth(repository, 1, "item.kge")[0]], []

    def request(number: int) -> None:
        start = time.perf_counter()
        if number % 2:
            status, answer = ask(server, "ranker_v2", user=[*users, -7], item=[*items, -7])
            got = {table: decoded(answer, f"{table.replace('.', '_')}__v2__row") for table in DIMS}
            assert status == 200 and got == service
        else:
            status, answer = ask(server, ["item_kge__v1:row"], item=[*items, -7, items[0]])
            assert status == 200 and decoded(answer, "item_kge__v1__row") == view
        seconds.append(time.perf_counter() - start)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(request, range(80)))
    logger.info("median of %d requests, 8 at a time: %.1f ms", len(seconds), 1e3 * statistics.median(seconds))


def test_what_it_refuses(server: Any) -> None:
    item = int(entity_ids("item", 200)[0])
    status, message = ask(server, ["item_kge__v1:row"], item=[item, None])
    assert status == 422 and "64-bit integers, got null at row 1" in message
    for id_, said in ((7.9, "7.9"), (2**63, str(2**63)), (True, "True"), ("abc", "'abc'")):
        for feature in ("item_kge__v1:row", "item_context:events_7d"):
            status, message = ask(server, [feature], item=[item, id_])
            assert status == 422 and f"64-bit integers, got {said} at row 1" in message
    assert ask(server, ["item_kge__v1:row"], item=[-(2**63), 2**63 - 1, str(item)])[0] == 200
    assert ask(server, ["item_kge__v9:row"], item=[item])[0] == 404
    assert ask(server, "ranker_v9", item=[item])[0] == 404
    search = {"features": ["item_kge__v1:row"], "query": [0.0] * 12, "top_k": 2}
    status, message = server.post("/search", search)
    assert status == 422 and "cannot search item_kge__v1" in message


@pytest.mark.parametrize(("row", "status", "reason"), [(None, 200, ""), ("AAAA", 500, "bytes")])
def test_rows_of_a_version_stay_as_they_are_whatever_is_posted(
    server: Any, repository: FeastRepository, row: str | None, status: int, reason: str
) -> None:
    item = int(entity_ids("item", 200)[0])
    frame = {"item": [item], "row": [row], "event_timestamp": [STAMP]}
    for path, body in (
        ("/push", {"push_source_name": "rows_push", "df": frame}),
        ("/write-to-online-store", {"feature_view_name": "item_kge__v2", "df": frame}),
    ):
        got, message = server.post(path, body)
        assert got == status and reason in str(message)
    got, message = server.post("/push", {"push_source_name": "item_kge__v2_source", "df": frame})
    assert got == 422 and "Unable to find push source" in message
    for view in ("item_kge__v2", "pushed_rows"):
        _, answer = ask(server, [f"{view}:row"], item=[item])
        assert decoded(answer, f"{view}__row") == truth(repository, 2, "item.kge", 1)


def test_rows_pushed_as_bytes_are_refused_with_the_reason(repository: FeastRepository) -> None:
    store, reason = repository.store(), r"cannot write into pushed_rows.*item\.kge of version 2, which is immutable"
    frame = pd.DataFrame({"item": [7], "row": [b"\0" * 10], "event_timestamp": [AS_OF]})
    with pytest.raises(RequestRefused, match=reason) as refused:
        store.push("rows_push", frame)
    assert refused.value.http_status_code() == 422
    with pytest.raises(RequestRefused, match=reason):
        asyncio.run(store.push_async("rows_push", frame))


def test_ordinary_views_are_pushed_and_written_and_read_back(server: Any) -> None:
    pushed = {"user": [777], "events_7d": [5.5], "event_timestamp": [STAMP]}
    assert server.post("/push", {"push_source_name": "live_push", "df": pushed})[0] == 200
    row = {"user": [778], "events_7d": [6.5], "events_30d": [1.0], "active_days_30d": [1.0], "last_event": [1.0]}
    written = {"feature_view_name": "user_context", "df": {**row, "event_timestamp": [STAMP]}}
    assert server.post("/write-to-online-store", written)[0] == 200
    status, answer = ask(server, ["user_live:events_7d", "user_context:events_7d"], user=[777, 778])
    assert status == 200
    values = {name: r["values"] for name, r in zip(answer["metadata"]["feature_names"], answer["results"], strict=True)}
    assert values["user_live__events_7d"] == [5.5, None] and values["user_context__events_7d"] == [None, 6.5]


def test_versions_come_and_go_while_it_serves(server: Any, repository: FeastRepository) -> None:
    """Version 3 is half materialized beside the server and half by it; then version 1 is retired. 2 never falters."""
    items, wanted = entity_ids("item", 200)[:20].tolist(), truth(repository, 2, "item.kge")
    done, wrong = threading.Event(), []

    def watch() -> int:
        asked = 0
        while not done.is_set():
            status, answer = ask(server, ["item_kge__v2:row"], item=items)
            if status != 200 or decoded(answer, "item_kge__v2__row") != wanted:
                wrong.append((status, answer))
            asked += 1
        return asked

    def until(version: int, table: str, status: int) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        view, entity = f"{table.replace('.', '_')}__v{version}", table.partition(".")[0]
        ids = entity_ids(entity, 200)[:20].tolist()
        while True:
            got, answer = ask(server, [f"{view}:row"], **{entity: ids})
            if got == 200:  # never a wrong or a missing row, whatever else it says
                assert decoded(answer, f"{view}__row") == truth(repository, version, table)
            if got == status:
                return answer
            assert time.monotonic() < deadline, (got, answer)
            time.sleep(0.1)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            publish(repository.workspace, write_release(repository.root / "release3", seed=3), parents=(2,))
            repository.apply()
            answer = until(3, "item.kge", 500)
            assert "feast materialize" in answer
            repository.materialize(["item_kge__v3", "item_contrastive__v3"])
            until(3, "item.kge", 200)
            views = ["user_kge__v3", "user_contrastive__v3"]
            status, message = server.post("/materialize", {**EVERY_TIME, "feature_views": views})
            assert status == 200, message
            for table in DIMS:
                until(3, table, 200)
            until(1, "item.kge", 200)
            retire(repository.workspace, 1)
            repository.apply()
            for table in DIMS:
                until(1, table, 404)
                until(3, table, 200)
        finally:
            done.set()
        assert watching.result() > 0 and not wrong
    assert server.get("/health")[0] == 200
