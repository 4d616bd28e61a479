"""Definitions: the three that ship are read, and each mistake in one's own gets its own message."""

from pathlib import Path

import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.dataset import known_datasets, load_dataset
from pipelines.tasks import Sampled
from tests.logs import shop_yaml


@pytest.fixture
def load(tmp_path: Path):
    def load(**changes: str):
        path = tmp_path / "shop.yaml"
        path.write_text(shop_yaml(**changes))
        return load_dataset(str(path))

    return load


def test_three_data_sets_come_along() -> None:
    assert known_datasets() == ["alibaba2014", "globo", "online_retail"]


def log(**changes: str) -> str:
    """A `log` section in one line, some of its keys replaced or added."""
    keys = {
        "columns": "{user: a, item: b, kind: c, event_timestamp: d}", "ids": "{user: text, item: text}",
        "kinds": "{view: onsite, buy: offsite}", "time_range": "[2021-01-01, 2022-01-01]",
    }
    return "log: {" + ", ".join(f"{key}: {value}" for key, value in (keys | changes).items()) + "}"


@pytest.mark.parametrize("name", known_datasets())
def test_every_shipped_definition_is_understood(name: str) -> None:
    dataset = load_dataset(name)
    assert dataset.name == dataset.reference == name
    assert isinstance(next(iter(dataset.tasks.values())), Sampled)
    assert "v1" in dataset.runs


def test_online_retail_is_the_data_in_the_project() -> None:
    dataset = load_dataset("online_retail")
    assert dataset.source is not None and dataset.source.is_file()
    assert list(dataset.tasks) == ["purchase", "repurchase_60d"]
    assert list(dataset.relations) == ["bought", "returned", "co_bought", "has_word", "in_price_band", "from_country"]


def test_ones_own_file_lies_anywhere(load) -> None:
    dataset = load(source="source: log.csv")
    assert dataset.source is not None and dataset.source.name == "log.csv" and dataset.source.is_absolute()


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="online_retail"):
        load_dataset("online_retial")


def test_absent_file() -> None:
    with pytest.raises(InvalidConfig, match=r"nowhere\.yaml cannot be read"):
        load_dataset("nowhere.yaml")


def test_unknown_run_names_those_there_are(load) -> None:
    with pytest.raises(InvalidConfig, match="first"):
        load().windows("second")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": "pair_kind: [view]"}, "unknown key.*pair_kind"),
        ({"pair_kinds": ""}, "missing key.*pair_kinds"),
        ({"pair_kinds": "pair_kinds: view"}, "pair_kinds: expected"),
        ({"pair_kinds": "pair_kinds: [vieww]"}, "pair_kinds.*vieww"),
        ({"context_kinds": "context_kinds: []"}, "context_kinds.*none"),
        ({"log": log(columns="{user: a, item: b, kind: c}")}, "missing column.*event_timestamp"),
        ({"log": "log: 3"}, "log: expected a mapping"),
        ({"log": log(columns="{user: a, item: b, kind: c, event_timestamp: d, colour: e}")}, "unknown column.*colour"),
        ({"log": log(ids="{user: text}")}, "log.ids: expected integer or text for user and item each"),
        ({"log": log(ids="{user: text, item: text, session: text}")}, "log.ids"),
        ({"log": log(ids="{user: text, item: double}")}, "log.ids.*double"),
        ({"log": log(kinds="{view: nowhere}")}, "kinds.*nowhere"),
        ({"log": log(time_range="[2022-01-01, 2021-01-01]")}, "time_range"),
        ({"log": log(text="{title: e}")}, "attribute without an owner.*title"),
        ({"log": log(types="{d: money}")}, "type of a column: expected text, integer, number.*money"),
        ({"log": log(types="{d: '%d/%Q'}")}, "how a time is written: expected directives of strptime.*%Q"),
        ({"log": log(csv="{delimiter: ab}")}, "log.csv.delimiter: expected one character, got ab"),
        ({"log": log(csv="{delimiter: ';', quote: ';'}")}, "log.csv.quote: expected one character that is not"),
        ({"log": log(csv="{quote: ','}")}, "log.csv.quote"),
        ({"log": log(csv="{names: [a, b, a]}")}, r"log.csv.names: expected each name once, got \['a'\]"),
        ({"log": log(csv="{decimal: '|'}")}, "log.csv.decimal: expected a point or a comma"),
        ({"log": log(csv="{encoding: gbk}")}, "log.csv.encoding: expected one of.*latin-1.*got gbk"),
        ({"tasks": "tasks: {view: {type: guessed}}"}, "tasks.view.type.*guessed"),
        ({"tasks": "tasks: {buy_7d: {type: followed, trigger: [view], outcome: [buy], days: 7}}"},
         "one task of type sampled"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], negatives: 0}}"}, "negatives.*at least 1"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], negatives: lots}}"}, "whole number.*lots"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], visits: 1.5}}"}, r"visits.*\(0, 1\], got 1.5"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], visits: 0}}"}, r"visits.*\(0, 1\], got 0"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], popularity_power: -1}}"}, "power.*0 or more"),
        ({"tasks": "tasks: {view: {type: sampled, kinds: [view], on_sale_days: -1}}"}, "on_sale_days.*0 or more"),
        ({"tasks": "tasks: {v: {type: sampled, kinds: [view]}, b: {type: followed, trigger: [view], outcome: [buy], "
                   "days: 0}}"}, "days.*at least 1, got 0"),
        ({"tasks": "tasks: {v: {type: sampled, kinds: [view]}, b: {type: followed, trigger: [buy], outcome: [buy], "
                   "days: 7}}"}, "trigger"),
        ({"graph": "graph: {viewed: {type: events, kinds: [view]}}"}, "anchor.*none"),
        ({"graph": "graph: {viewed: {type: events, kinds: [view, buy], anchor: true}}"}, "kinds of one surface"),
        ({"graph": "graph: {v: {type: events, kinds: [view], anchor: true}, w: {type: words, attribute: item_name}}"},
         "item_name"),
        ({"graph": "graph: {v: {type: events, kinds: [view], anchor: true}, "
                   "c: {type: co_occurrence, kinds: [view], within: session}}"}, "no session column"),
        ({"graph": "graph: {v: {type: events, kinds: [view], anchor: true}, "
                   "c: {type: co_occurrence, kinds: [view], top_k: 0}}"}, "top_k"),
        ({"runs": "runs: {a: {pretrain: [2021-01-01, 2021-02-01]}}"}, "windows are incomplete"),
        ({"runs": "runs: {a: {pretrain: [2021-01-01, 2021-02-01], finetune: [2021-01-20, 2021-03-01], "
                  "validation: [2021-03-01, 2021-03-20], test: [2021-03-20, 2021-04-10]}}"}, "leaks the future"),
        ({"runs": "runs: [a"}, "cannot be read"),
        ({"tasks": "tasks:\n  buy: {type: followed}\n  buy: {type: sampled}"}, "line.*'buy' again"),
        ({"again": "name: other"}, "line.*'name' again"),
    ],
)
def test_a_mistake_is_named(load, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidConfig, match=f"(?s)shop.yaml.*{message}"):
        load(**changes)
