"""CSV logs: text stays text, what is declared is what it says, and nothing else passes."""

import gzip
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from pipelines.contracts.errors import InvalidConfig, InvalidEvents
from pipelines.text_log import TextFormat, csv_error, read_csv_files, typed_column


def written(folder: Path, **files: str | bytes) -> list[Path]:
    paths = []
    for name, content in files.items():
        paths.append(folder / name.replace("__", "."))
        paths[-1].write_bytes(content.encode() if isinstance(content, str) else content)
    return paths


def rows(files: list[Path], **layout) -> list[dict]:
    relation = duckdb.sql(read_csv_files(files, TextFormat(**layout)))
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def test_every_value_is_the_text_that_stands_there(tmp_path: Path) -> None:
    days = "\n".join(f"{number},{number}.0,2021-01-0{number}" for number in range(1, 10))
    files = written(
        tmp_path, a__csv=f"who,what,at\n{days}\n", z__csv='who,what,at\n007,7.6,04/01/2021\n" a ""b""",,x\n'
    )
    assert rows(files)[-2:] == [
        {"who": "007", "what": "7.6", "at": "04/01/2021"}, {"who": ' a "b"', "what": None, "at": "x"}
    ]


def test_a_type_that_only_the_eleventh_file_contradicts(tmp_path: Path) -> None:
    numbers = {f"f{number}__csv": f"who\n{number}\n" for number in range(10)}
    files = written(tmp_path, **numbers, g__csv="who\n007\n")
    assert [row["who"] for row in rows(files)] == [*map(str, range(10)), "007"]


def test_files_are_put_together_by_the_names_of_their_columns(tmp_path: Path) -> None:
    files = written(tmp_path, a__csv="who,what\n1,2\n", b__csv="what,who\n4,3\n", c__csv="who,what\n5,6\n")
    assert sorted(map(tuple, map(dict.values, rows(files)))) == [("1", "2"), ("3", "4"), ("5", "6")]
    assert list(rows(files)[0]) == ["who", "what"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("3,4\n", r"b.csv: its header: expected the columns of a.csv, \['who', 'what'\], in any order, got \['3', "),
        ("who\n3\n", r"b.csv: its header.*got \['who'\]"),
        ("who,what,when\n3,4,5\n", r"b.csv: its header.*'when'"),
        ("who,who\n3,4\n", r"b.csv: its header: expected each column's name once"),
        ("", r"b.csv: its header: expected each column's name once, got \[\]"),
        (b"wh\xe9,what\n3,4\n", r"b.csv cannot be read: expected CSV in utf-8"),
    ],
)
def test_a_file_with_other_columns_is_refused(tmp_path: Path, second: str | bytes, message: str) -> None:
    with pytest.raises(InvalidEvents, match=message):
        rows(written(tmp_path, a__csv="who,what\n1,2\n", b__csv=second))


def test_files_without_a_header_have_the_names_that_are_given(tmp_path: Path) -> None:
    files = written(tmp_path, a__csv="1,2\n", b__csv="3,4\n")
    assert rows(files, names=("who", "what")) == [{"who": "1", "what": "2"}, {"who": "3", "what": "4"}]


def test_the_layout_is_what_is_declared(tmp_path: Path) -> None:
    [tab, semicolon, quoted, latin, wide, marked] = written(
        tmp_path, a__tsv="a\tb,c\n1\t2\n", b__csv="a;b\n1;2,5\n", c__csv="a,b\n'x,y','it''s'\n",
        d__csv="é\nà\n".encode("latin-1"), e__csv="é\nà\n".encode("utf-16"), f__csv="a\nà\n".encode("utf-8-sig"),
    )
    assert rows([tab]) == [{"a": "1", "b,c": "2"}]
    assert rows([semicolon], delimiter=";") == [{"a": "1", "b": "2,5"}]
    assert rows([quoted], quote="'") == [{"a": "x,y", "b": "it's"}]
    assert rows([latin], encoding="latin-1") == rows([wide], encoding="utf-16") == [{"é": "à"}]
    assert rows([marked]) == [{"a": "à"}]
    [plain] = written(tmp_path, g__csv='a,b\n"1,2"\n')
    assert rows([plain], quote="") == [{"a": '"1', "b": '2"'}]
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert rows([tmp_path / "h.csv.gz"]) == [{"a": "1", "b": "2"}]


def test_texts_that_stand_for_no_value(tmp_path: Path) -> None:
    [file] = written(tmp_path, a__csv="a,b\n,NULL\n-1,x\n")
    assert rows([file]) == [{"a": None, "b": "NULL"}, {"a": "-1", "b": "x"}]
    assert rows([file], nulls=("NULL", "-1")) == [{"a": "", "b": None}, {"a": None, "b": "x"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\n1,2\n1,2,3\n", "Line: 3.*1,2,3.*Expected Number of Columns: 2 Found: 3"),
        ("a,b\n1,2\n1\n", "Line: 3.*Expected Number of Columns: 2 Found: 1"),
        (b"a,b\n" + b"1,2\n" * 9000 + b"1,\xe9\n", "Line: 9002.*not utf-8"),
        ('a,b\n1,"2\n', "Line: 2.*unterminated quote"),
        (b"a,b\n1,\xe9\n", "Line: 2.*not utf-8"),
    ],
)
def test_what_is_no_csv_is_named_with_its_line_its_reason_and_its_file(tmp_path: Path, content, reason: str) -> None:
    with pytest.raises(duckdb.Error) as refused:
        rows(written(tmp_path, good__csv="a,b\n1,2\n", bad__csv=content))
    said = csv_error(refused.value)
    assert all(part in said for part in [*reason.split(".*"), "bad.csv"]) and "strict_mode" not in said


def moment(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


@pytest.mark.parametrize(
    ("declared", "values", "others"),
    [
        ("text", {"7": "7", "": "", "nan": "nan"}, []),
        (
            "integer", {"7": 7, "-12": -12, "+5": 5, "007": 7, str(2**63 - 1): 2**63 - 1, str(-(2**63)): -(2**63)},
            ["7.6", "7.0", "1e3", str(2**63), "", " 7", "7 ", "0x1F", "1_000", "seven", "nan", "٧"],
        ),
        (
            "number", {"7": 7.0, "-.5": -0.5, "1.": 1.0, "2.5e-3": 0.0025, "+1E2": 100.0},
            ["nan", "NaN", "inf", "-Infinity", "1e999", "7,5", "1,000.5", "1_000", "", " 1", "0x10", "--1", "."],
        ),
        (
            "time",
            {
                "2021-01-31": moment(2021, 1, 31), "2021-01-31 12:30": moment(2021, 1, 31, 12, 30),
                "2021-01-31T12:30:45.5Z": moment(2021, 1, 31, 12, 30, 45, 500_000),
                "2021-01-31 12:30:00+02": moment(2021, 1, 31, 10, 30),
            },
            ["31/01/2021", "04/01/2021", "2021-02-30", "2021-1-31", "1612051200", "", "2021-01-31 25:00:00", "now"],
        ),
        (
            "%d/%m/%Y", {"04/01/2021": datetime(2021, 1, 4), "31/12/2021": datetime(2021, 12, 31)},
            ["01/31/2021", "2021-01-04", "04/01/2021 10:00", "4.1.2021", ""],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_declared_column_holds(declared: str, values: dict, others: list[str]) -> None:
    database = duckdb.connect()
    database.execute("SET TimeZone = 'UTC'")
    column = typed_column("x", declared)

    def read(text: str):
        return database.execute(f"SELECT {column.sql} FROM (SELECT ? AS x)", [text]).fetchone()[0]

    assert {text: read(text) for text in values} == values
    assert {text: read(text) for text in others} == dict.fromkeys(others)


def test_a_number_may_have_its_fraction_after_a_comma() -> None:
    column = typed_column("x", "number", decimal=",")
    texts = {"7,5": 7.5, "7": 7.0, "7.5": None, "1.000,5": None, "1,000,5": None}
    read = duckdb.sql(f"SELECT x, {column.sql} FROM (SELECT unnest(?) AS x)", params=[list(texts)]).fetchall()
    assert dict(read) == texts


def test_a_name_is_no_sql(tmp_path: Path) -> None:
    [file] = written(tmp_path, a__csv='"a ""b"";",it\'s\n1,2\n')
    assert rows([file]) == [{'a "b";': "1", "it's": "2"}]


@pytest.mark.parametrize("declared", ["BIGINT", "money", "", "text; DROP TABLE x"])
def test_no_other_type(declared: str) -> None:
    with pytest.raises(InvalidConfig, match="type of a column: expected text, integer, number, time"):
        typed_column("x", declared)
