"""The same feature repository with `rows` and `context_store` in Redis: stock commands, and the ways to rows."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import redis
import yaml
from click.testing import CliRunner
from feast.errors import FeatureViewNotFoundException

from online.lookup.reader import VersionReader
from pipelines.cli import facet
from pipelines.contracts.errors import IntegrityError, Unavailable, VersionConflict, VersionNotFound
from pipelines.contracts.row_store import row_store
from pipelines.retire import retire
from tests.cases import RowReaderCases, rows_or_none
from tests.redis_server import RedisServer
from tests.releases import AS_OF, DIMS, FeastRepository, entity_ids, published_rows


def copy_on_redis(original: FeastRepository, root: Path, server: RedisServer) -> FeastRepository:
    """A copy of a repository without its segments and SQLite files, configured for a Redis server."""
    shutil.copytree(original.root, root, ignore=shutil.ignore_patterns("segments", "feast"))
    repository = FeastRepository(root)
    path = repository.path / "feature_store.yaml"
    config = yaml.safe_load(path.read_text())
    config["online_store"] |= {
        "rows": server.url, "context_store": {"type": "redis", "connection_string": f"127.0.0.1:{server.port},db=0"},
    }
    path.write_text(yaml.safe_dump(config))
    repository.apply()
    return repository


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def materialized(
    workspace_with_versions: FeastRepository, tmp_path_factory: pytest.TempPathFactory, server: RedisServer
) -> FeastRepository:
    """Do not change it."""
    repository = copy_on_redis(workspace_with_versions, tmp_path_factory.mktemp("redis") / "own", server)
    repository.materialize()
    return repository


@pytest.fixture
def own(materialized: FeastRepository, tmp_path: Path) -> Iterator[tuple[FeastRepository, redis.Redis]]:
    """A repository and the server of its own, with both versions materialized."""
    with RedisServer() as server:
        repository = copy_on_redis(materialized, tmp_path / "own", server)
        repository.materialize()
        yield repository, server.client()


def first_item(repository: FeastRepository, version: int) -> bytes | None:
    ids = entity_ids("item", 200)[:1].tolist()
    answer = repository.store().get_online_features(features=[f"item_kge__v{version}:row"], entity_rows={"item": ids})
    return answer.to_dict()["row"][0]


class TestGetOnlineFeatures(RowReaderCases):
    errors = (FeatureViewNotFoundException,)

    @pytest.fixture(autouse=True)
    def _materialized(self, materialized: FeastRepository) -> None:
        self.repository, self.store = materialized, materialized.store()

    def prepare(self, repository: FeastRepository) -> None:
        """`_materialized` does it."""

    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        reference = f"{table.replace('.', '_')}__v{version}:row"
        answer = self.store.get_online_features(features=[reference], entity_rows={table.partition(".")[0]: ids})
        return answer.to_dict()["row"]


class TestVersionReader(RowReaderCases):
    errors = (VersionNotFound,)

    @pytest.fixture(autouse=True)
    def _materialized(self, materialized: FeastRepository, server: RedisServer) -> None:
        self.repository, self.server = materialized, server

    def prepare(self, repository: FeastRepository) -> None:
        """`_materialized` does it."""

    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        reader = VersionReader.open(self.repository.workspace, version, rows=self.server.url)
        return rows_or_none(*reader.lookup(table, np.array(ids, np.int64)))


def test_no_segment_is_written(materialized: FeastRepository) -> None:
    assert not materialized.workspace.segments.exists()


def test_materializing_again_confirms_and_writes_nothing(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    client.config_resetstat()
    repository.materialize(["item_kge__v1"])
    used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    assert "mget" in used and not used & {"set", "mset", "del", "unlink"}


def test_materializing_again_over_a_damaged_table_is_refused(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    key = next(key for key in client.scan_iter("{item.kge@1:*"))
    client.delete(key)
    with pytest.raises(IntegrityError, match="no key"):
        repository.materialize(["item_kge__v1"])
    with pytest.raises(IntegrityError, match="no key"):
        repository.store().get_online_features(
            features=["item_kge__v1:row"], entity_rows={"item": entity_ids("item", 200).tolist()}
        )
    assert first_item(repository, 2) is not None


def test_another_version_of_the_same_number_on_the_server(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, _ = own
    versions, manifest = repository.workspace.versions, repository.workspace.versions.manifest(2)
    manifest.__class__(**{**manifest.__dict__, "metrics": {"auc": 1.0}}).write(versions.path(2))
    repository.apply()
    with pytest.raises(VersionConflict, match=r"table item\.kge of version 2 at unix:.*delete it"):
        repository.materialize(["item_kge__v2"])
    with pytest.raises(IntegrityError, match="feast apply"):
        first_item(repository, 2)


def names_left(client: redis.Redis) -> set[bytes]:
    return {key.partition(b"}")[0].partition(b":")[0] for key in client.scan_iter("{*")}


def test_retiring_a_version_drops_its_keys_and_no_others(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    retire(repository.workspace, 1)
    assert names_left(client) == {f"{{{table}@2".encode() for table in DIMS}
    repository.apply()
    assert first_item(repository, 2) == published_rows(repository.workspace, 2, "item.kge")[1][0].tobytes()


def test_rows_of_a_version_retired_while_the_server_was_away_go_with_its_views(
    own: tuple[FeastRepository, redis.Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, client = own
    with monkeypatch.context() as patched:
        away = partial(row_store, "redis://127.0.0.1:1/0")
        patched.setattr("pipelines.retire.row_store", lambda _, workspace: away(workspace))
        retire(repository.workspace, 1)
    assert b"{item.kge@1" in names_left(client)
    repository.apply()
    assert names_left(client) == {f"{{{table}@2".encode() for table in DIMS}


def test_commands_look_where_rows_lie(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    client.sadd("facet:tables", "item.kge@9")
    run = partial(CliRunner().invoke, facet, catch_exceptions=False)
    assert "4/4" in run(["--workspace", str(repository.workspace.root), "versions"]).output
    assert "left of item.kge@9" in run(["--workspace", str(repository.workspace.root), "gc"]).output


def test_teardown_drops_all_of_it_and_it_can_be_materialized_again(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    repository.store().teardown()
    assert client.dbsize() == 0
    repository.apply()
    repository.materialize(["item_kge__v1"])
    assert first_item(repository, 1) == published_rows(repository.workspace, 1, "item.kge")[1][0].tobytes()


def test_a_server_that_is_gone_is_named_and_nothing_is_answered(
    materialized: FeastRepository, tmp_path: Path
) -> None:
    with RedisServer() as server:
        repository = copy_on_redis(materialized, tmp_path / "own", server)
    with pytest.raises(Unavailable, match=f"unix://{server.socket_path}"):
        repository.materialize(["item_kge__v1"])
    with pytest.raises(Unavailable, match=f"unix://{server.socket_path}"):
        first_item(repository, 1)


def test_ordinary_views_live_in_redis_by_configuration(own: tuple[FeastRepository, redis.Redis]) -> None:
    repository, client = own
    store, item = repository.store(), int(entity_ids("item", 200)[3])
    features = ["item_context:events_7d", "item_context:first_event"]
    answer = store.get_online_features(features=features, entity_rows={"item": [item, -1]}).to_dict()
    assert answer["events_7d"] == [13.0, None]  # 3 % 7, plus 10 for the later of the two rows
    assert answer["first_event"] == [AS_OF.timestamp() - 4 * 86_400, None]
    frame = pd.DataFrame(
        [{"user": 77_777_777, "event_timestamp": AS_OF, "events_7d": 1.0, "events_30d": 2.0, "active_days_30d": 3.0,
          "last_event": 4.0}]
    )
    before = client.dbsize()
    store.write_to_online_store("user_context", df=frame)
    assert client.dbsize() == before + 1
    answer = store.get_online_features(features=["user_context:events_30d"], entity_rows={"user": [77_777_777]})
    assert answer.to_dict()["events_30d"] == [2.0]
    assert not (repository.workspace.root / "feast" / "context.db").exists()
