"""Ordinary views in Feast's own stores: SQLite, and a real Redis, which is asynchronous itself."""

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta

import pandas as pd
import pytest

from tests.redis_server import RedisServer
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows

ITEM = int(entity_ids("item", 200)[3])
MONTH_BEFORE = AS_OF - timedelta(days=30)  # when the older of an item's two rows of context is from
CONTEXT = ["user_context", "item_context", "user_item_context"]
REFERENCES = ["user_item_context:events", "item_kge__v2:row", "item_context:events_7d", "user_context:last_event"]


@pytest.fixture
def context_in_redis(own_workspace: FeastRepository) -> Iterator[FeastRepository]:
    with RedisServer() as server:
        path = own_workspace.path / "feature_store.yaml"
        sqlite = "    type: sqlite\n    path: ../var/feast/context.db\n"
        before = path.read_text()
        assert before.count(sqlite) == 1
        path.write_text(
            before.replace(sqlite, f"    type: redis\n    connection_string: 127.0.0.1:{server.port}\n")
        )
        own_workspace.apply()
        own_workspace.materialize(CONTEXT)
        yield own_workspace


@pytest.mark.slow
def test_awaited_and_plain_reads_and_writes_agree(
    workspace_with_versions: FeastRepository, context_in_redis: FeastRepository
) -> None:
    users, items = (entity_ids(entity, 200)[:20].tolist() for entity in ("user", "item"))
    request = {
        "features": REFERENCES, "entity_rows": {"user": users, "item": items}, "full_feature_names": True,
    }
    expected = workspace_with_versions.store().get_online_features(**request).to_dict()
    assert expected["item_kge__v2__row"] == [
        row.tobytes() for row in published_rows(context_in_redis.workspace, 2, "item.kge")[1][:20]
    ]
    store = context_in_redis.store()
    assert store.get_online_features(**request).to_dict() == expected

    def frame(user: int) -> pd.DataFrame:
        features = {"events_7d": 1.0, "events_30d": user, "active_days_30d": 3.0, "last_event": 4.0}
        return pd.DataFrame([{"user": user, "event_timestamp": AS_OF, **features}])

    async def lifetime() -> list:
        await store.initialize()
        answers = await asyncio.gather(*(store.get_online_features_async(**request) for _ in range(20)))
        assert all(answer.to_dict() == expected for answer in answers)
        await asyncio.gather(
            *(store.write_to_online_store_async("user_context", df=frame(user)) for user in range(10**6, 10**6 + 50))
        )
        written = await store.get_online_features_async(
            features=["user_context:events_30d"], entity_rows={"user": list(range(10**6, 10**6 + 50))}
        )
        await store.close()
        return written.to_dict()["events_30d"]

    assert asyncio.run(lifetime()) == [float(user) for user in range(10**6, 10**6 + 50)]


def events(repository: FeastRepository, item: int = ITEM) -> float | None:
    answer = repository.store().get_online_features(features=["item_context:events_7d"], entity_rows={"item": [item]})
    return answer.to_dict()["events_7d"][0]


def item_frame(*rows: tuple[int, float, datetime]) -> pd.DataFrame:
    features = dict.fromkeys(("events_30d", "active_days_30d", "first_event"), 0.0)
    return pd.DataFrame(
        [{"item": item, "events_7d": value, "event_timestamp": time, **features} for item, value, time in rows]
    )


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def context(request: pytest.FixtureRequest) -> FeastRepository:
    return request.getfixturevalue("own_workspace" if request.param == "sqlite" else "context_in_redis")


def test_an_older_time_range_materialized_again_leaves_newer_values(context: FeastRepository) -> None:
    assert events(context) == 13.0  # 3 % 7, plus 10 for the later of the two rows
    context.store().materialize(MONTH_BEFORE, MONTH_BEFORE, feature_views=["item_context"])
    assert events(context) == 13.0


def test_an_older_time_range_is_written_where_nothing_newer_is(own_workspace: FeastRepository) -> None:
    (own_workspace.workspace.root / "feast" / "context.db").unlink()
    own_workspace.apply()
    own_workspace.store().materialize(MONTH_BEFORE, MONTH_BEFORE, feature_views=["item_context"])
    assert events(own_workspace) == 3.0
    own_workspace.store().materialize(MONTH_BEFORE, AS_OF, feature_views=["item_context"])
    assert events(own_workspace) == 13.0


@pytest.mark.parametrize("awaited", [False, True])
def test_of_rows_written_at_once_the_newest_stays(context: FeastRepository, awaited: bool) -> None:
    """More rows than are read at once, older and newer than what is there, in any order; equal times replace."""
    store, day = context.store(), timedelta(days=1)
    others = [(item, float(item), AS_OF) for item in range(10**6, 10**6 + 1_500)]
    frame = item_frame(
        *others, (ITEM, 1.0, AS_OF + day), (ITEM, 2.0, AS_OF + 3 * day), (ITEM, 3.0, AS_OF + 2 * day), (-5, 4.0, AS_OF),
        (-5, 5.0, AS_OF),
    )
    if awaited:
        asyncio.run(store.write_to_online_store_async("item_context", df=frame))
    else:
        store.write_to_online_store("item_context", df=frame)
    assert [events(context, item) for item in (ITEM, 10**6, 10**6 + 1_499)] == [2.0, 1e6, 1e6 + 1_499]
    again = item_frame(*((item, -1.0, time - day) for item, _, time in others), (-5, 6.0, AS_OF))
    store.write_to_online_store("item_context", df=again)
    assert [events(context, item) for item in (10**6, 10**6 + 1_499)] == [1e6, 1e6 + 1_499]


def test_equal_times_replace_in_sqlite(own_workspace: FeastRepository) -> None:
    """Redis keeps the first of two rows of one time."""
    store = own_workspace.store()
    for value in (4.0, 5.0):
        store.write_to_online_store("item_context", df=item_frame((ITEM, value, AS_OF)))
        assert events(own_workspace) == value
