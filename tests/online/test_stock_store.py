"""Ordinary views in a store that is asynchronous itself: a real Redis, through Feast's own Redis store."""

import asyncio
from collections.abc import Iterator

import pandas as pd
import pytest

from tests.redis_server import RedisServer
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows

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
