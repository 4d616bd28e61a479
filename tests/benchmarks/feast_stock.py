"""Feast as it comes: the same views over the same Parquet files, with its own engine and a stock online store."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from feast import FeatureStore

from tests.redis_server import RedisServer
from tests.releases import FeastRepository, feast_apply

__all__ = ["redis_store", "sqlite_path", "sqlite_store", "stock_repository"]


def stock_repository(repository: FeastRepository, name: str, online_store: dict[str, Any]) -> Path:
    """A copy of `feature_repo/` beside the workspace with a stock configuration, applied.

    The settings are those of our `feature_store.yaml`, for the same reasons: with others, Feast's local engine writes
    only the first record batch of a chunked table, or takes each entity's latest row in Python.
    """
    path = repository.root / f"feature_repo_{name}"
    shutil.copytree(repository.path, path, ignore=shutil.ignore_patterns("__pycache__", "feature_store.yaml"))
    config = {
        "project": "stock",
        "provider": "local",
        "registry": f"../var/feast/{name}.db",
        "entity_key_serialization_version": 3,
        "offline_store": {"type": "duckdb"},
        "online_store": online_store,
        "batch_engine": {"type": "local"},
        "materialization": {"pull_latest_features": True, "online_write_batch_size": 10_000},
    }
    (path / "feature_store.yaml").write_text(yaml.safe_dump(config))
    feast_apply(path)
    return path


def sqlite_store(name: str) -> dict[str, Any]:
    return {"type": "sqlite", "path": f"../var/feast/{name}_online.db"}


def sqlite_path(repository: FeastRepository, name: str) -> Path:
    return repository.workspace.root / "feast" / f"{name}_online.db"


def redis_store(server: RedisServer, *, skip_dedup: bool = False) -> dict[str, Any]:
    """Feast's Redis store over a Unix socket; with `skip_dedup` it does not read old timestamps before each write."""
    socket = f"127.0.0.1:{server.port},unix_socket_path={server.socket_path}"
    return {"type": "redis", "connection_string": socket, "skip_dedup": skip_dedup}


def open_store(path: Path) -> FeatureStore:
    return FeatureStore(repo_path=str(path))
