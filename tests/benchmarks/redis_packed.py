"""Our rows in Redis: the packed form of `pipelines.contracts.redis_rows`."""

from pathlib import Path

from pipelines.contracts.redis_rows import RedisRows, RedisTable
from pipelines.contracts.workspace import Workspace
from tests.benchmarks.synthetic import TABLE, record_batches, table_file
from tests.redis_server import RedisServer

__all__ = ["load_packed", "open_packed"]


def load_packed(server: RedisServer, workspace: Workspace, *, scratch: Path) -> None:
    """Write the table of version 1 as the engine does."""
    manifest = workspace.versions.manifest(1)
    _rows(server, scratch).write(
        spec=manifest.table(TABLE), version=1, manifest_sha256=manifest.sha256,
        batches=record_batches(table_file(workspace)),
    )


def open_packed(server: RedisServer, *, scratch: Path) -> RedisTable:
    return _rows(server, scratch).open(1, TABLE)


def _rows(server: RedisServer, scratch: Path) -> RedisRows:
    return RedisRows(server.client(), where=server.url, spill=scratch)
