"""`facet serve cpu-tier --rows`: the CPU tier answers from Redis."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from online.lookup.client import LookupClient
from online.rpc_error import Code, RpcError
from pipelines.contracts.redis_rows import RedisRows
from pipelines.contracts.row_store import row_store
from tests.redis_server import RedisServer
from tests.releases import DIMS, FeastRepository, entity_ids, published_rows
from tests.waiting import PATIENCE_S


@pytest.fixture
def server(workspace_with_versions: FeastRepository, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that has version 1 and not version 2."""
    versions = workspace_with_versions.workspace.versions
    manifest = versions.manifest(1)
    with RedisServer() as running:
        rows = RedisRows(running.client(), where=running.url, spill=tmp_path)
        for spec in manifest.tables:
            with pq.ParquetFile(versions.path(1) / manifest.table_path(spec.name)) as file:
                rows.write(
                    spec=spec, version=1, manifest_sha256=manifest.sha256,
                    batches=file.iter_batches(columns=["id", "row"]),
                )
        yield running


def test_a_cpu_tier_answers_from_redis_and_says_when_it_is_gone(
    workspace_with_versions: FeastRepository, server: RedisServer, launch: Any
) -> None:
    workspace = workspace_with_versions.workspace
    missing = launch(workspace, "serve", "cpu-tier", "--versions", "2", "--rows", server.url)
    tier = launch(workspace, "serve", "cpu-tier", "--versions", "1", "--rows", server.tcp_url).wait_ready()
    client = LookupClient([tier.port("lookup")], timeout_s=PATIENCE_S)
    asked = {table: np.array([*entity_ids(table.partition(".")[0], 200), 3]) for table in DIMS}
    answer = client.lookup([1], asked)
    for table in DIMS:
        assert np.array_equal(answer.rows[table][:-1], published_rows(workspace, 1, table)[1])
        assert answer.found[table].tolist() == [True] * 200 + [False]
    assert not row_store(server.tcp_url, workspace).open(1, "item.kge").at_hand
    status, _, errors = missing.finish()
    assert status == 2 and "no table user.contrastive of version 2" in errors and "Traceback" not in errors
    server.stop()
    with pytest.raises(RpcError, match=server.tcp_url) as refused:
        client.lookup([1], asked)
    assert refused.value.code is Code.LOOKUP_UNAVAILABLE
    client.close()
