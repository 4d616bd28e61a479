"""The way in: what is kept, what is dropped by name, and what is refused with which words."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.contracts.errors import FacetError, InvalidConfig, InvalidEvents
from pipelines.contracts.ids import id_of
from pipelines.dataset import load_dataset
from pipelines.events import SCHEMA
from pipelines.log import canonical_events
from tests.logs import shop_yaml

JANUARY = 1_609_459_200_000  # 2021-01-01 in milliseconds since 1970
HOUR = 3_600_000

ROWS = [
    ("anna", 7, "view", JANUARY + 5 * HOUR, 2.5, "Red tea pot"),
    ("anna", 7, "buy", JANUARY + 6 * HOUR, 2.5, "Red tea pot"),
    ("bert", 8, "view", JANUARY + 1 * HOUR, 4.0, None),
]
COLUMNS = ("who", "what", "how", "millis", "price", "label")


def as_table(rows: list[tuple]) -> pa.Table:
    return pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))


@pytest.fixture
def ingest(tmp_path: Path):
    """Ingest rows of the columns `COLUMNS` (or a table) under a definition whose sections may be replaced."""

    def ingest(rows=ROWS, **changes: str):
        pq.write_table(rows if isinstance(rows, pa.Table) else as_table(rows), tmp_path / "log.parquet")
        (tmp_path / "shop.yaml").write_text(shop_yaml(source="source: log.parquet", **{"log": layout(), **changes}))
        return canonical_events(load_dataset(str(tmp_path / "shop.yaml")))

    return ingest


def layout(**changes: str) -> str:
    """The `log` section with some of its lines replaced or added."""
    lines = {
        "columns": "{user: who, item: what, kind: how, event_timestamp: epoch_ms(millis)}",
        "ids": "{user: text, item: integer}",
        "text": "{item_title: label}",
        "number": "{item_price: price}",
        "kinds": "{view: onsite, buy: offsite}",
        "time_range": "[2021-01-01, 2022-01-01]",
        "types": "{what: integer, millis: integer, price: number}",
    }
    return "log:\n" + "\n".join(f"  {key}: {value}" for key, value in (lines | changes).items())


def replaced(position: int, column: str, value) -> list[tuple]:
    rows = [list(row) for row in ROWS]
    rows[position][COLUMNS.index(column)] = value
    return [tuple(row) for row in rows]


def test_rows_become_events(ingest) -> None:
    events, facts = ingest()
    assert events.schema.names == [*SCHEMA.names, "item_title", "item_price"]
    assert events["user"].to_pylist() == [id_of("bert"), id_of("anna"), id_of("anna")]  # sorted by time
    assert events["item"].to_pylist() == [8, 7, 7]
    assert events["surface"].to_pylist() == ["onsite", "onsite", "offsite"]
    assert events["item_title"].to_pylist() == [None, "Red tea pot", "Red tea pot"]
    assert (facts.rows_read, facts.rows, facts.users, facts.items) == (3, 3, 2, 2)
    assert facts.kinds == {"buy": 1, "view": 2}
    assert facts.first == "2021-01-01T01:00:00+00:00"


def test_order_of_the_log_does_not_matter(ingest) -> None:
    at_once = [(f"user{number}", 8, "view", JANUARY + HOUR, 4.0, None) for number in range(50)]
    rows = [*ROWS, *at_once]
    assert ingest(rows)[0].equals(ingest(rows[::-1])[0])


def test_dropped_rows_are_counted_by_the_first_rule_they_meet(ingest) -> None:
    rest = (JANUARY, 1.0, "x")
    rows = [*ROWS, (None, 9, "view", *rest), (None, 9, "gone", *rest), ("c", 9, "gone", *rest)]
    _, facts = ingest(rows, log=layout(drop="{nobody: who IS NULL, not a kind: how = 'gone'}"))
    assert facts.dropped == {"nobody": 2, "not a kind": 1, "duplicate row": 0}
    assert facts.rows_read == facts.rows + sum(facts.dropped.values()) == 6


def test_some_duplicates_are_dropped_if_the_definition_says_so(ingest) -> None:
    events, facts = ingest([*ROWS, ROWS[0]], log=layout(max_duplicate_share="0.25"))
    assert facts.dropped == {"duplicate row": 1} and events.num_rows == 3
    events, facts = ingest([*ROWS, ROWS[0]], log=layout(max_duplicate_share="null"))
    assert facts.dropped == {} and events.num_rows == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (replaced(0, "who", None), "null user: expected a value in every row, got 1 rows without"),
        (replaced(1, "what", None), "null item"),
        (replaced(1, "millis", None), "null event_timestamp"),
        (replaced(1, "how", None), "null kind"),
        (replaced(1, "how", "stare"), "unknown kind of event: expected one of .*'buy', 'view'.*stare"),
        (replaced(2, "millis", JANUARY // 1000), "timestamp out of range: expected times from 2021-01-01.*1970-01-19"),
        (replaced(2, "millis", JANUARY + 366 * 24 * HOUR), "timestamp out of range"),
        (replaced(2, "millis", JANUARY + 365 * 24 * HOUR), "timestamp out of range"),  # the day after the last begins
        ([*ROWS, ROWS[0]], r"duplicate rows: expected at most 0\.00%.*1 of 4 \(25\.00%\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(ingest, rows: list[tuple], message: str) -> None:
    with pytest.raises(InvalidEvents, match=message):
        ingest(rows)


def test_missing_column_names_it_and_those_there_are(ingest) -> None:
    table = as_table(ROWS).drop_columns(["what"])
    message = r"missing column for item: expected `what` among the log's columns, got \['who', 'how'"
    with pytest.raises(InvalidEvents, match=message):
        ingest(table, log=layout(types="{millis: integer}"))
    message = r"missing column what: expected what `types` names among the log's columns \['who', 'how'"
    with pytest.raises(InvalidEvents, match=message):
        ingest(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": "{item_price: label}"},
         "wrong type of item_price: expected a finite DOUBLE.*VARCHAR.*2 rows.*'Red tea pot'"),
        ({"columns": "{user: who, item: price, kind: how, event_timestamp: epoch_ms(millis)}"},
         "wrong type of item: expected integer, as `ids` says, got DOUBLE"),
        ({"columns": "{user: who, item: what, kind: how, event_timestamp: label}"}, "wrong type of event_timestamp"),
        ({"columns": "{user: who, item: what, kind: how, event_timestamp: millis}"}, "wrong type of event_timestamp"),
        ({"columns": "{user: who, item: what, kind: how, event_timestamp: epoch_ms(label)}"},
         "wrong expression for event_timestamp"),
        ({"columns": "{user: who, item: CAST(label AS BIGINT), kind: how, event_timestamp: epoch_ms(millis)}"},
         "wrong type"),
        ({"columns": "{user: who, item: what.which, kind: how, event_timestamp: epoch_ms(millis)}"},
         "wrong expression for item"),
        ({"drop": "{impossible: nothing > 3}"}, "missing column for drop rule 'impossible'"),
        ({"drop": "{all: 1 = 1}"}, "no event is left"),
    ],
)
def test_definitions_that_do_not_fit_the_log_are_refused(ingest, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidEvents, match=message):
        ingest(log=layout(**changes))


def test_empty_log(ingest) -> None:
    empty = pa.table({name: pa.array([], pa.string()) for name in COLUMNS})
    with pytest.raises(InvalidEvents, match="the log is empty"):
        ingest(empty)


def test_no_log_there(tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(shop_yaml(log=layout()))
    dataset = load_dataset(str(tmp_path / "shop.yaml"))
    with pytest.raises(InvalidConfig, match="--source"):
        canonical_events(dataset)
    with pytest.raises(InvalidConfig, match="nothing there"):
        canonical_events(dataset, tmp_path / "absent.parquet")
    (tmp_path / "broken.parquet").write_text("not Parquet")
    with pytest.raises(FacetError, match=r"broken\.parquet cannot be read"):
        canonical_events(dataset, tmp_path / "broken.parquet")


def test_a_folder_of_files_is_one_log(ingest, tmp_path: Path) -> None:
    whole, _ = ingest()
    folder = tmp_path / "days"
    folder.mkdir()
    table = pq.read_table(tmp_path / "log.parquet")
    for number in range(3):
        pq.write_table(table.slice(number, 1), folder / f"{number}.parquet")
    parts, _ = canonical_events(load_dataset(str(tmp_path / "shop.yaml")), folder)
    assert parts.equals(whole)


def test_online_retail_is_cleaned_as_its_definition_says() -> None:
    events, facts = canonical_events(load_dataset("online_retail"))
    assert facts.rows_read == 541_909
    assert facts.dropped["no customer"] == 135_080
    assert facts.rows_read == facts.rows + sum(facts.dropped.values())
    assert set(facts.kinds) == {"purchase", "return"}
    assert id_of("85123A") in events["item"].to_pylist() and id_of("85123a") not in events["item"].to_pylist()
    assert id_of("POST") not in events["item"].to_pylist()
    values = events.to_pandas().groupby("kind")["value"]
    assert values.min()["purchase"] >= 0 and values.max()["return"] <= 0


def test_a_column_named_like_a_word_of_sql_is_that_column(ingest) -> None:
    table = as_table([("anna", "tea", "view", JANUARY, 1.0, "x")])
    table = table.rename_columns(["user", "order", "how", "at", "price", "label"])
    own = layout(
        columns='{user: user, item: order, kind: how, event_timestamp: epoch_ms("at")}', ids="{user: text, item: text}",
        types="{at: integer}",
    )
    events, _ = ingest(table, log=own)
    assert events["user"].to_pylist() == [id_of("anna")] and events["item"].to_pylist() == [id_of("tea")]
    with pytest.raises(InvalidEvents, match="missing column for user"):
        ingest(table.drop_columns(["user"]), log=own)


def test_a_drop_rule_of_one_word_is_a_column(ingest) -> None:
    table = as_table(ROWS).append_column("user", pa.array([False, True, False]))
    assert ingest(table, log=layout(drop="{ours: user}"))[1].dropped["ours"] == 1
    with pytest.raises(InvalidEvents, match="missing column for drop rule 'ours'"):
        ingest(log=layout(drop="{ours: user}"))


def test_a_comment_ends_with_its_expression(ingest) -> None:
    columns = '{user: "who -- a name", item: what, kind: how, event_timestamp: "epoch_ms(millis) /* UTC */ -- "}'
    assert ingest(log=layout(columns=columns, drop='{free: "price = 0 -- gifts"}'))[0].equals(ingest()[0])


# ---- Confinement. The syntax check is off here, so that DuckDB alone has to hold these back. ----


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch, ingest, tmp_path: Path):
    """`ingest` with an expression for the attribute `item_title` that nobody read before it runs."""
    monkeypatch.setattr("pipelines.dataset.require_expressions", lambda expressions: None)
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    pq.write_table(pa.table({"password": ["hunter2"]}), tmp_path / "secret.parquet")

    def unchecked(expression: str):
        expression = expression.replace("LEAK", str(tmp_path / "secret")).replace("OUT", str(tmp_path / "out"))
        return ingest(log=layout(text=yaml.safe_dump({"item_title": expression}, default_flow_style=True)))

    return unchecked


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(SELECT password FROM read_csv('LEAK.csv'))", "Cannot access file .*secret.csv"),
        ("(SELECT password FROM 'LEAK.csv')", "Cannot access file .*secret.csv"),
        ("(SELECT password FROM 'LEAK.parquet')", "Cannot access file .*secret.parquet"),
        ("(SELECT content FROM read_text('LEAK.csv'))", "Cannot access file .*secret.csv"),
        ("(SELECT content FROM read_blob('LEAK.csv'))", "Cannot access file .*secret.csv"),
        ("(SELECT file FROM glob('LEAK*'))", "Cannot access file .*secret"),
        ("(SELECT password FROM query('FROM \"LEAK.csv\"'))", "Cannot access file .*secret.csv"),
        ("(SELECT user FROM local_rows)", "local_rows does not exist"),
        ("1); COPY (SELECT 1) TO 'OUT'; SELECT (1", "Cannot access file .*out"),
        ("1); ATTACH 'OUT'; SELECT (1", "Cannot access file .*out"),
        ("1); EXPORT DATABASE 'OUT'; SELECT (1", "Cannot access directory .*out"),
        ("1); INSTALL httpfs; SELECT (1", "disabled"),
        ("(SELECT 1 FROM read_xlsx('LEAK.csv'))", "read_xlsx.* is not in the catalog"),
        ("1); LOAD httpfs; SELECT (1", "disabled"),
        ("1); SET enable_external_access = true; SELECT (1", "configuration has been locked"),
        ("1); RESET lock_configuration; SELECT (1", "configuration has been locked"),
        ("1); SET allowed_directories = ['/']; SELECT (1", "configuration has been locked"),
        ("1); PRAGMA enable_profiling = 'json'; SELECT (1", "configuration has been locked"),
        ("1); CREATE PERSISTENT SECRET s (TYPE http); SELECT (1", "Cannot access directory .*secrets"),
    ],
)
def test_an_expression_reaches_no_file_but_the_logs_and_no_setting(
    unchecked, tmp_path: Path, expression: str, message: str
) -> None:
    local_rows = as_table(ROWS)
    with pytest.raises(InvalidEvents, match=f"wrong expression for item_title.*{message}"):
        unchecked(expression)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.parquet", "secret.csv", "secret.parquet", "shop.yaml"
    ]
    assert local_rows.num_rows == 3


def test_a_plan_of_another_file_is_not_made(ingest, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    query = f"SELECT * FROM read_csv(''{tmp_path / 'secret.csv'}'')"
    events, _ = ingest(log=layout(text="{item_title: \"json_serialize_plan('" + query + "')\"}"))
    for answer in events["item_title"].to_pylist():
        assert '"error":true' in answer and "password" not in answer


def test_the_log_may_be_a_relative_path(ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = ingest()
    monkeypatch.chdir(tmp_path)
    assert canonical_events(load_dataset("shop.yaml"), Path("log.parquet"))[0].equals(whole)


@pytest.fixture
def ingest_csv(tmp_path: Path):
    """Ingest a CSV log, or a folder of them, under a definition whose `log` lines may be replaced."""

    def ingest_csv(*files: str, **lines: str):
        (tmp_path / "days").mkdir(exist_ok=True)
        for number, content in enumerate(files):
            (tmp_path / "days" / f"{number}.csv").write_text(content)
        (tmp_path / "shop.yaml").write_text(shop_yaml(source="source: days", log=layout(**lines)))
        return canonical_events(load_dataset(str(tmp_path / "shop.yaml")))

    return ingest_csv


HEADER = ",".join(COLUMNS) + "\n"


def test_an_id_is_what_the_definition_says_whatever_else_the_column_holds(ingest_csv, ingest) -> None:
    """A log with one `85123A` once made another id of every number in the column."""

    def line(who: object, what: object) -> str:
        return f"{who},{what},view,{JANUARY},1.0,x\n"

    events, _ = ingest_csv(HEADER + line("007", 7) + line(7, "007"))
    assert set(events["user"].to_pylist()) == {id_of("007"), id_of("7")} and set(events["item"].to_pylist()) == {7}
    with pytest.raises(InvalidEvents, match=r"column what: expected a whole number of 64 bits in every row.*'85123A'"):
        ingest_csv(HEADER + line("a", 7) + line("a", "85123A"))
    with pytest.raises(InvalidEvents, match="wrong type of item: expected text, as `ids` says, got BIGINT"):
        ingest(log=layout(ids="{user: text, item: text}"))
    with pytest.raises(InvalidEvents, match="wrong type of user: expected integer, as `ids` says, got VARCHAR"):
        ingest(log=layout(ids="{user: integer, item: integer}"))


@pytest.mark.parametrize(
    "item", ["CAST(price AS BIGINT)", "price::INTEGER + 0", "TRY_CAST(floor(price) AS BIGINT)",
             "CASE WHEN what = 7 THEN 7 ELSE (price * 2)::HUGEINT::BIGINT END"],
)  # fmt: skip
def test_ids_never_pass_through_floating_point(ingest, item: str) -> None:
    columns = f'{{user: who, item: "{item}", kind: how, event_timestamp: epoch_ms(millis)}}'
    with pytest.raises(InvalidEvents, match=r"wrong type of item: expected integers or text all the way.*is DOUBLE"):
        ingest(log=layout(columns=columns))
    exact = columns.replace(item, "CAST(CAST(what AS VARCHAR) AS BIGINT)")
    assert ingest(log=layout(columns=exact))[0]["item"].to_pylist() == ingest()[0]["item"].to_pylist()


@pytest.mark.parametrize("price", [float("nan"), float("inf"), float("-inf")])
def test_a_number_is_finite_or_null(ingest, price: float) -> None:
    """A price `nan` was once in the top band."""
    with pytest.raises(InvalidEvents, match="wrong type of item_price: expected a finite DOUBLE in every row"):
        ingest(replaced(1, "price", price))
    own = layout(number="{item_price: 'CASE WHEN isfinite(price) THEN price END'}")
    assert None in ingest(replaced(1, "price", price), log=own)[0]["item_price"].to_pylist()


def test_a_time_in_a_form_of_its_own(ingest_csv) -> None:
    """04/01/2021 to 04/12/2021 were once twelve months."""
    lines = "".join(f"a,7,view,04/{month:02d}/2021,1.0,x\n" for month in (1, 12))
    own = {"columns": "{user: who, item: what, kind: how, event_timestamp: millis}"}
    events, _ = ingest_csv(HEADER + lines, **own, types="{what: integer, price: number, millis: '%d/%m/%Y'}")
    assert [(time.month, time.day) for time in events["event_timestamp"].to_pylist()] == [(1, 4), (12, 4)]
    with pytest.raises(InvalidEvents, match=r"column millis: expected a time as `%m/%d/%Y` in .*'31/01/2021'"):
        ingest_csv(HEADER + "a,7,view,31/01/2021,1.0,x\n", **own,
                   types="{what: integer, price: number, millis: '%m/%d/%Y'}")  # fmt: skip
    with pytest.raises(InvalidEvents, match="column millis: expected a time such as"):
        ingest_csv(HEADER + lines, **own, types="{what: integer, price: number, millis: time}")


def test_a_csv_of_another_layout(ingest_csv) -> None:
    content = f"a;7;view;{JANUARY};2,5;'x;y'\nb;8;buy;{JANUARY};none;\n"
    names = ", ".join(COLUMNS)
    form = f"{{delimiter: ;, quote: \"'\", decimal: ',', nulls: ['', none], names: [{names}]}}"
    events, _ = ingest_csv(content, csv=form)
    assert events["item_price"].to_pylist() == [2.5, None] and events["item_title"].to_pylist() == ["x;y", None]


def test_what_is_no_csv_is_named(ingest_csv) -> None:
    line = f"a,7,view,{JANUARY},1.0,x\n"
    with pytest.raises(InvalidEvents, match=r"cannot be read.*Line: 3; Original Line: a,7; .*Found: 2; file =.*1\.csv"):
        ingest_csv(HEADER + line, HEADER + line + "a,7\n")
    with pytest.raises(InvalidEvents, match=r"1\.csv: its header"):
        ingest_csv(HEADER + line, line * 2)


def test_columns_of_parquet_are_of_the_declared_types(ingest) -> None:
    as_text = as_table(ROWS)
    as_text = as_text.set_column(1, "what", as_text["what"].cast(pa.string()))
    assert ingest(as_text)[0].equals(ingest()[0])
    with pytest.raises(InvalidEvents, match="column price: expected integer, as `types` says, got DOUBLE"):
        ingest(log=layout(types="{price: integer}"))
    with pytest.raises(InvalidEvents, match="column what: expected text, as `types` says, got BIGINT"):
        ingest(log=layout(types="{what: text}"))
    with pytest.raises(InvalidEvents, match="column millis: expected time, as `types` says, got BIGINT"):
        ingest(log=layout(types="{millis: time}"))
    assert ingest(log=layout(types="{price: number, millis: number}"))[0].equals(ingest()[0])


def write_csv(path: Path, rows: list[tuple]) -> None:
    path.write_text("\n".join([",".join(COLUMNS), *(",".join(str(value or "") for value in row) for row in rows)]))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize(
    ("name", "matched"), [("log[1]", "log1"), ("l*g", "lag"), ("log?", "log2"), ("[!a]", "b"), ("**", "c")]
)
def test_a_path_is_no_pattern(tmp_path: Path, suffix: str, name: str, matched: str) -> None:
    """Neither a file's name nor a folder's; DuckDB would read the other one."""
    write = write_csv if suffix == ".csv" else lambda path, rows: pq.write_table(as_table(rows), path)
    for folder, kind in ((name, "buy"), (matched, "view")):
        (tmp_path / folder).mkdir()
        for file in (name, matched):
            write(tmp_path / folder / f"{file}{suffix}", [("anna", 7, kind, JANUARY + HOUR, 2.5, file)])
    (tmp_path / "shop.yaml").write_text(shop_yaml(log=layout()))
    dataset = load_dataset(str(tmp_path / "shop.yaml"))
    events, _ = canonical_events(dataset, tmp_path / name / f"{name}{suffix}")
    assert events["kind"].to_pylist() == ["buy"] and events["item_title"].to_pylist() == [name]
    events, _ = canonical_events(dataset, tmp_path / name)
    assert events["kind"].to_pylist() == ["buy", "buy"] and set(events["item_title"].to_pylist()) == {name, matched}
