"""What the SQL of a data set may be: each way out of an expression is refused by name, and ordinary ones pass."""

from pathlib import Path

import pytest
import yaml

from pipelines.contracts.errors import InvalidConfig
from pipelines.dataset import load_dataset
from pipelines.row_expressions import require_expressions
from tests.logs import shop_yaml


@pytest.mark.parametrize(
    "expression",
    [
        "price",
        "user",  # a column's name, although DuckDB has a function of that name without parentheses
        '"Customer ID"',
        "upper(trim(what))",
        "CASE WHEN how LIKE 'C%' AND price < 0 THEN 'return' WHEN price > 0 THEN 'purchase' END",
        "NOT regexp_matches(what, '^[0-9]{5}') OR price IS NULL",
        "price * 2 - 1 || 'x'",
        "nullif(price, 0)",
        "coalesce(price, 1.5)::DECIMAL(10, 2)",
        "TRY_CAST(what AS BIGINT)",
        "epoch_ms(millis) >= TIMESTAMP '2017-10-18'",
        "millis AT TIME ZONE 'UTC' + INTERVAL 1 DAY",
        "what IN (1, 2) AND price BETWEEN 1 AND 2",
        "list_filter(parts, x -> x <> '')[1]",
        "[part.name for part in parts]",
        "extra ->> '$.title'",
        "{'a': what}.a",
        "label COLLATE NOCASE",
        "repeat(label, 2)",
        "sum(price) OVER (PARTITION BY who ORDER BY millis)",
        "lag(millis) OVER (PARTITION BY who ORDER BY millis)",
        "'; -- a text; (SELECT 1)'",
        "price -- a comment",
        "price /* a\ncomment */",
    ],
)
def test_an_expression_over_columns_passes(expression: str) -> None:
    require_expressions({"log.columns.user": expression})


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        # Other tables and files.
        ("(SELECT password FROM read_csv('SECRET'))", "a subquery"),
        ("price + (FROM 'SECRET')", "a subquery"),
        ("EXISTS (FROM 'SECRET')", "a subquery"),
        ("price IN (FROM 'SECRET')", "a subquery"),
        ("ARRAY(SELECT 1)", "a subquery"),
        ("price = ANY (SELECT 1)", "a subquery"),
        ("list_transform([1], x -> (SELECT 1))", "a subquery"),
        ("sum(price) OVER (PARTITION BY (SELECT 1))", "a subquery"),
        ("CASE WHEN price > 0 THEN (SELECT 1) END", "a subquery"),
        ("price FROM 'SECRET'", "more than an expression"),
        ("price UNION SELECT password FROM 'SECRET'", "more than an expression"),
        ("read_text('SECRET')", r"read_text\(\), which is no function of a row"),
        ("query('SELECT 1')", r"query\(\), which is no function of a row"),
        ("format_type(1, 2)", r"format_type\(\), which uses a subquery"),
        # More than one expression, or a way out of the parentheses around it.
        ("price; COPY source TO 'OUT'", "Only SELECT"),
        ("price; SELECT 2", "more than an expression"),
        ("price;", "more than an expression"),
        ("price, label", "more than an expression"),
        ("price,", "more than an expression"),
        ("price AS label", "more than an expression"),
        ("label: price", "more than an expression"),
        ("price LIMIT 1", "more than an expression"),
        ("DISTINCT price", "more than an expression"),
        ("price) FROM 'SECRET' --", "syntax error"),
        ("price), (label", "syntax error"),
        ("price) + (label", "syntax error"),
        ("price /* and so on", "unterminated"),
        ("ATTACH 'OUT' AS other", "more than an expression"),
        ("PRAGMA database_list", "more than an expression"),
        ("SET threads = 1", "syntax error"),
        ("", "without selection list"),
        ("abs(" * 900 + "price" + ")" * 900, "too many levels"),
        ("(" * 5000 + "price" + ")" * 5000, "expression depth"),
        # Not a value of each row.
        ("*", "a star"),
        ("COLUMNS('pr.*')", "a star"),
        ("unnest([1, 2])", r"unnest\(\), which is no function of a row"),
        ("generate_subscripts([1], 1)", r"generate_subscripts\(\), which uses unnest\(\)"),
        ("sum(price)", r"sum\(\), which is no function of a row"),
        ("wavg(price, 1)", r"sum\(\), which is no function of a row"),
        ("? + 1", "a parameter"),
        ("$name", "a parameter"),
        ("#1", "a positional reference"),
        # What is not the log: the process, its settings, the clock, chance.
        ("getenv('HOME')", r"getenv\(\), which is no function of a row"),
        ("system.main.\"getenv\"('HOME')", r"getenv\(\), which is no function of a row"),
        ("getvariable('x')", r"getvariable\(\), which depends on more than its arguments"),
        ("current_setting('secret_directory')", r"current_setting\(\), which depends on more"),
        ("CURRENT_SETTING('secret_directory')", r"current_setting\(\), which depends on more"),
        ("write_log(label)", r"write_log\(\), which depends on more"),
        ("sleep_ms(1000)", r"sleep_ms\(\), which depends on more"),
        ("nextval('s')", r"nextval\(\), which depends on more"),
        ("now()", r"now\(\), which depends on more"),
        ("random() * price", r"random\(\), which depends on more"),
    ],
)
def test_a_way_out_is_refused(tmp_path: Path, expression: str, fault: str) -> None:
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    expression = expression.replace("SECRET", str(tmp_path / "secret.csv")).replace("OUT", str(tmp_path / "out"))
    with pytest.raises(InvalidConfig, match=fault) as refusal:
        require_expressions({"log.text.item_title": expression})
    assert refusal.value.problem == "log.text.item_title"
    assert refusal.value.got.startswith(f"`{expression}` with ")
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


@pytest.mark.parametrize(
    ("section", "key"), [("columns", "user"), ("text", "item_title"), ("number", "item_price"), ("drop", "odd")]
)
def test_a_definition_is_refused_with_its_file_key_and_expression(tmp_path: Path, section: str, key: str) -> None:
    definition = yaml.safe_load(shop_yaml())
    definition["log"].setdefault(section, {})[key] = "(SELECT 1)"
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    with pytest.raises(InvalidConfig, match="expected one SQL expression over the log's columns") as refusal:
        load_dataset(str(tmp_path / "shop.yaml"))
    assert refusal.value.problem == f"shop.yaml: log.{section}.{key}"
    assert refusal.value.got == "`(SELECT 1)` with a subquery"
