"""One expression, two engines, the same rows."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis import BaseBackend

from pipelines.backend import connect, write_parquet
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.windows import Window
from pipelines.examples import positives
from pipelines.pairs import contrastive_pairs, within
from pipelines.relations import Bands, CoOccurrence, Events, Value, Words
from pipelines.tasks import Followed, Sampled
from pipelines.views import item_context, user_context, user_item_context
from tests.logs import canonical, day, random_events

WINDOW = Window(date(2021, 1, 11), date(2021, 2, 20))

EXPRESSIONS: dict[str, Callable[[ibis.Table], ibis.Table]] = {
    "user_context": user_context,
    "item_context": item_context,
    "user_item_context": user_item_context,
    "pairs": lambda events: contrastive_pairs(events, kinds=["buy"], window=WINDOW),
    "positives": lambda events: positives(
        within(events, WINDOW), events, sampled=Sampled(kinds=("view",)),
        followed={"buy_7d": Followed(trigger=("view",), outcome=("buy",), days=7)}, known_until=day(45),
    ),
    "bought": Events(kinds=("buy",)).edges,
    "seen_together": CoOccurrence(kinds=("view",), min_count=1, top_k=3).edges,
    "words": Words(attribute="item_title", min_count=2).edges,
    "bands": Bands(attribute="item_price", bands=4).edges,
    "value": Value(attribute="item_title", tail="title").edges,
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "events.parquet"
    table = canonical(random_events(11, events=600, days=60, kinds=("view", "buy"))).to_pyarrow()
    item = table["item"].to_pylist()
    titles = pa.array([f"Pot No.{i % 9}, {'Grün' if i % 2 else 'blau'}" if i % 5 else None for i in item])
    prices = pa.array([float(i % 7) if i % 4 else None for i in item])
    pq.write_table(table.append_column("item_title", titles).append_column("item_price", prices), path)
    return path


@pytest.fixture(scope="module")
def spark() -> BaseBackend:
    session = pytest.importorskip("pyspark.sql").SparkSession
    builder = session.builder.master("local[2]").config("spark.sql.shuffle.partitions", "2")
    builder.config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    backend = connect("spark")
    yield backend
    backend.disconnect()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_spark_and_duckdb_agree_on_every_row(name: str, log: Path, spark: BaseBackend) -> None:
    tables = [
        EXPRESSIONS[name](engine.read_parquet(str(log), table_name="events")).to_pyarrow()
        for engine in (connect(), spark)
    ]
    order = [(column, "ascending") for column in tables[0].column_names]
    first, second = (table.cast(tables[0].schema).sort_by(order).combine_chunks() for table in tables)
    assert first.num_rows > 20
    assert first.equals(second)


def test_days_are_utc_days_whatever_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    rows = user_context(canonical([(1, 1, "buy", day(0.9))])).to_pyarrow()
    assert rows["event_timestamp"].to_pylist()[0] == day(1)


def test_unknown_engine() -> None:
    with pytest.raises(InvalidConfig, match=r"one of \['duckdb', 'spark'\], got abacus"):
        connect("abacus")


def test_a_table_that_does_not_fit_its_schema_leaves_no_file(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)])
    with pytest.raises(pa.ArrowInvalid):
        write_parquet(pa.table({"id": ["not a number"]}), tmp_path / "ids.parquet", schema)
    assert list(tmp_path.iterdir()) == []
    assert write_parquet(pa.table({"id": [1, 2], "more": [3, 4]}), tmp_path / "ids.parquet", schema) == 2
    assert pq.read_schema(tmp_path / "ids.parquet").equals(schema)
