"""The engine that runs the transformations, and the one way their results reach a file.

Every transformation after entry is an Ibis expression, free of any engine's own SQL: what a module writes once runs on
each engine named here.
"""

from collections.abc import Callable
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import BaseBackend

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig

__all__ = ["ENGINES", "connect", "write_parquet"]

def _duckdb() -> BaseBackend:
    backend = ibis.duckdb.connect()
    backend.raw_sql("SET TimeZone = 'UTC'")  # a day is a UTC day, whatever the machine's zone
    return backend


def _spark() -> BaseBackend:
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.appName("facet")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    return ibis.pyspark.connect(session)


ENGINES: dict[str, Callable[[], BaseBackend]] = {"duckdb": _duckdb, "spark": _spark}


def connect(engine: str = "duckdb") -> BaseBackend:
    """An Ibis backend whose days are UTC days: `duckdb` in this process, `spark` in the session it finds or starts.

    Raises:
        InvalidConfig: no such engine.
    """
    if engine not in ENGINES:
        raise InvalidConfig(
            "engine", expected=f"one of {sorted(ENGINES)}", got=engine, remedy="Choose an engine that is there."
        )
    return ENGINES[engine]()


def write_parquet(rows: ibis.Table | pa.Table, path: Path, schema: pa.Schema) -> int:
    """Write an expression's rows or a table to `path` as `schema`, whole or not at all.

    Returns:
        The number of rows.
    """
    table = rows.to_pyarrow() if isinstance(rows, ibis.Table) else rows
    with replacing_file(path) as staging:
        pq.write_table(table.select(schema.names).cast(schema), staging, compression="zstd")
    return table.num_rows
