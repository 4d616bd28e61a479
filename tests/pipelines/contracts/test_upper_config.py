"""The shape of an upper model is read strictly: what a ranker could not build or use is refused by its name."""

import json
from collections.abc import Callable

import pytest

from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.upper_config import MAX_LAYERS, MAX_WIDTH, UpperConfig

CONFIG = UpperConfig(
    tables={"user.kge": 4, "item.kge": 4}, context=(ContextFeature("user_context", "events_7d", "log1p"),),
    tasks=("click", "convert"), cross_rank=3, hidden=(8, 4), dropout=0.5,
)

WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "unknown key": (lambda raw: raw.update(heads=3), r"unknown key.*heads"),
    "no tables key": (lambda raw: raw.pop("tables"), r"missing key.*tables"),
    "no tables": (lambda raw: raw.update(tables={}), r"tables: expected 1 to 64, got 0"),
    "too many tables": (
        lambda raw: raw.update(tables={f"item.t{n}": 1 for n in range(MAX_LAYERS + 1)}), r"tables.*1 to 64, got 65"
    ),
    "unknown entity": (lambda raw: raw["tables"].update({"shop.kge": 4}), r"table shop\.kge.*\('user', 'item'\)"),
    "no facet": (lambda raw: raw["tables"].update({"item": 4}), r"table item: expected 'entity\.facet'"),
    "dimension as text": (lambda raw: raw["tables"].update({"item.kge": "4"}), r"tables\.item\.kge.*a whole number"),
    "no columns": (lambda raw: raw["tables"].update({"item.kge": 0}), r"columns of item\.kge: expected 1 to"),
    "wide table": (lambda raw: raw["tables"].update({"item.kge": MAX_WIDTH + 1}), r"columns of item\.kge.*got 16,385"),
    "unknown transform": (
        lambda raw: raw["context"][0].update(transform="sqrt"), r"user_context:events_7d.*'log1p'.*got 'sqrt'"
    ),
    "unknown key of a feature": (lambda raw: raw["context"][0].update(scale=2), r"context\[0\]: unknown key.*scale"),
    "a feature without column": (lambda raw: raw["context"][0].pop("column"), r"context\[0\]: missing key.*column"),
    "a feature that is text": (lambda raw: raw["context"].append("events"), r"context\[1\]: expected a mapping"),
    "no tasks": (lambda raw: raw.update(tasks=[]), r"tasks: expected 1 to"),
    "a task twice": (lambda raw: raw.update(tasks=["click", "click"]), r"tasks: expected distinct names"),
    "a task without name": (lambda raw: raw.update(tasks=[""]), r"tasks: expected distinct names"),
    "tasks as text": (lambda raw: raw.update(tasks="click"), r"tasks: expected tuple"),
    "a true number of layers": (lambda raw: raw.update(cross_layers=True), r"cross_layers: expected a whole number"),
    "negative layers": (lambda raw: raw.update(cross_layers=-1), r"cross_layers: expected 0 to 64"),
    "a thousand million layers": (lambda raw: raw.update(cross_layers=10**9), r"cross_layers.*got 1,000,000,000"),
    "no rank": (lambda raw: raw.update(cross_rank=0), r"cross_rank: expected 1 to"),
    "two million units": (lambda raw: raw.update(hidden=[8, 2_000_000]), r"units of a hidden layer.*got 2,000,000"),
    "a unit too many": (lambda raw: raw.update(hidden=[8, MAX_WIDTH + 1]), r"units of a hidden layer.*got 16,385"),
    "a layer without units": (lambda raw: raw.update(hidden=[8, 0]), r"units of a hidden layer: expected 1 to"),
    "a rank too many": (lambda raw: raw.update(cross_rank=MAX_WIDTH + 1), r"cross_rank: expected 1 to.*got 16,385"),
    "a task too many": (
        lambda raw: raw.update(tasks=[f"t{n}" for n in range(MAX_WIDTH + 1)]), r"tasks: expected 1 to.*got 16,385"
    ),
    "a feature too many": (
        lambda raw: raw.update(context=raw["context"] * (MAX_WIDTH + 1)), r"context features.*got 16,385"
    ),
    "deep": (lambda raw: raw.update(hidden=[1] * (MAX_LAYERS + 1)), r"hidden layers.*got 65"),
    "certain dropout": (lambda raw: raw.update(dropout=1), r"dropout: expected a probability"),
    "dropout that is no number": (lambda raw: raw.update(row_dropout=float("nan")), r"row_dropout.*got nan"),
}


def test_what_was_written_is_read():
    assert UpperConfig.from_json(CONFIG.to_json()) == CONFIG


def test_a_configuration_from_before_row_dropout_is_read():
    raw = json.loads(CONFIG.to_json())
    del raw["row_dropout"]
    assert UpperConfig.from_json(json.dumps(raw)) == CONFIG


def test_the_largest_widths_are_read():
    raw = json.loads(CONFIG.to_json()) | {"hidden": [MAX_WIDTH], "cross_rank": MAX_WIDTH, "cross_layers": MAX_LAYERS}
    assert UpperConfig.from_json(json.dumps(raw)).hidden == (MAX_WIDTH,)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_ranker_could_use_is_refused(wrong):
    change, message = WRONG[wrong]
    raw = json.loads(CONFIG.to_json())
    change(raw)
    with pytest.raises(InvalidConfig, match=message):
        UpperConfig.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "configuration: expected JSON"),
        ("[" * 100_000, "configuration: expected JSON"),
        ("[]", "configuration: expected a mapping"),
        (CONFIG.to_json().replace('"cross_rank"', '"cross_layers"'), "a key is repeated among"),
        (b"\xff\xfe{", "configuration: expected JSON"),
    ],
    ids=["cut", "nested without end", "a list", "a key twice", "other bytes"],
)
def test_what_is_no_configuration_is_refused(text, message):
    with pytest.raises(InvalidConfig, match=message):
        UpperConfig.from_json(text)
