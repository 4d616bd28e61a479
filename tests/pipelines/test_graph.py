"""Pairs and the graph: each type of relation by hand, dense nodes, and the pretraining window only."""

import json
from datetime import date, timedelta
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.backend import connect
from pipelines.contracts.errors import InvalidEvents
from pipelines.contracts.ids import id_of
from pipelines.contracts.windows import Window
from pipelines.events import SCHEMA
from pipelines.graph import EDGES_SCHEMA, NODES_SCHEMA, build_graph
from pipelines.pairs import PAIRS_SCHEMA, contrastive_pairs
from pipelines.relations import Bands, CoOccurrence, Events, Value, Words
from tests.logs import canonical, day, random_events

JANUARY = Window(date(2021, 1, 1), date(2021, 2, 1))
SURFACES = {"view": "onsite", "buy": "offsite"}


def with_attributes(rows: list[dict]) -> ibis.Table:
    """Canonical events with a session, a title, a price and a country."""
    extra = [pa.field("session", pa.int64()), pa.field("item_title", pa.string()), pa.field("item_price", pa.float64()),
             pa.field("user_country", pa.string())]
    defaults = {"user": 1, "item": 1, "kind": "buy", "surface": "offsite", "event_timestamp": day(1)}
    backend = connect()
    table = pa.Table.from_pylist([defaults | row for row in rows], schema=pa.schema([*SCHEMA, *extra]))
    backend.con.register("events", table)
    return backend.table("events")


def edges(relation, events: ibis.Table) -> dict[tuple, float]:
    rows = relation.edges(events).to_pyarrow().to_pylist()
    found = {(row["head"], row["tail"]): row["weight"] for row in rows}
    assert len(found) == len(rows), "an edge occurs once"
    return found


def test_pairs_are_distinct_days_of_the_window_stamped_with_the_first_event() -> None:
    events = canonical([
        (1, 1, "buy", day(2.5)), (1, 1, "buy", day(2.2)), (1, 1, "buy", day(3)), (2, 1, "view", day(2)),
        (2, 1, "buy", day(31)), (3, 1, "buy", day(30.9)), (4, 1, "buy", day(-1)), (5, 1, "buy", day(0)),
    ])
    rows = contrastive_pairs(events, kinds=["buy"], window=JANUARY).to_pyarrow().cast(PAIRS_SCHEMA).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (5, 1, day(0)), (1, 1, day(2.2)), (1, 1, day(3)), (3, 1, day(30.9))
    ]


def test_events_are_edges_weighted_by_days_and_stamped_with_the_first() -> None:
    events = canonical([(1, 5, "buy", day(2)), (1, 5, "buy", day(1.5)), (1, 5, "buy", day(1)), (2, 5, "view", day(1))])
    assert edges(Events(kinds=("buy",)), events) == {(1, 5): 2}
    assert Events(kinds=("buy",)).edges(events).to_pyarrow()["event_timestamp"].to_pylist() == [day(1)]


def test_co_occurrence_counts_visits_and_keeps_the_most_frequent() -> None:
    baskets = {0: [1, 2, 3], 1: [1, 2], 2: [1, 3], 3: [1, 2], 4: [7, 8, 9, 10]}
    events = canonical(
        [(1, item, "buy", day(d + 0.1 * n)) for d, items in baskets.items() for n, item in enumerate(items)]
    )
    found = edges(CoOccurrence(kinds=("buy",), min_count=2, top_k=5), events)
    assert found == {(1, 2): 3, (2, 1): 3, (1, 3): 2, (3, 1): 2}
    nearest = edges(CoOccurrence(kinds=("buy",), min_count=1, top_k=1, max_size=3), events)
    assert nearest == {(1, 2): 3, (2, 1): 3, (3, 1): 2}


def test_of_companions_that_are_equally_frequent_the_smaller_id_is_kept() -> None:
    events = canonical([(1, item, "buy", day(1)) for item in (3, 1, 2)])
    assert edges(CoOccurrence(kinds=("buy",), min_count=1, top_k=1), events) == {(1, 2): 1, (2, 1): 1, (3, 1): 1}


def test_co_occurrence_within_sessions() -> None:
    events = with_attributes([
        {"item": 1, "session": 1}, {"item": 2, "session": 1, "event_timestamp": day(2)}, {"item": 3, "session": 2},
        {"item": 4}, {"item": 5},
    ])
    assert edges(CoOccurrence(kinds=("buy",), within="session", min_count=1), events) == {(1, 2): 1, (2, 1): 1}


def test_words_of_titles() -> None:
    events = with_attributes([
        {"item": 1, "item_title": "RED Tea-pot, 12 cm"}, {"item": 2, "item_title": "red CUP"},
        {"item": 3, "item_title": None}, {"item": 2, "item_title": "Red cup"},
    ])
    words = Words(attribute="item_title", min_count=1)
    assert words.head == "item"
    assert set(edges(words, events)) == {(1, "red"), (1, "tea"), (1, "pot"), (2, "red"), (2, "cup")}
    assert set(edges(Words(attribute="item_title", min_count=2), events)) == {(1, "red"), (2, "red")}


def test_bands_split_evenly_and_equal_prices_share_one() -> None:
    prices = {1: 1.0, 2: 1.0, 3: 5.0, 4: 9.0}
    events = with_attributes([{"item": item, "item_price": price} for item, price in prices.items()])
    band = dict(edges(Bands(attribute="item_price", bands=2), events).keys())
    assert band == {1: "0", 2: "0", 3: "1", 4: "1"}


def test_values_of_users() -> None:
    events = with_attributes([{"user": 1, "user_country": "PT"}, {"user": 2, "user_country": "PT"}, {"user": 2}])
    assert set(edges(Value(attribute="user_country", tail="country"), events)) == {(1, "PT"), (2, "PT")}


@pytest.fixture
def graph_of(tmp_path: Path):
    def graph_of(events: ibis.Table, relations):
        directory = tmp_path / "graph"
        directory.mkdir(exist_ok=True)
        build_graph(events, relations=relations, window=JANUARY, surfaces=SURFACES).write(directory)
        described = json.loads((directory / "relations.json").read_text())
        return pq.read_table(directory / "nodes.parquet"), pq.read_table(directory / "edges.parquet"), described

    return graph_of


def test_nodes_are_dense_with_one_range_per_type_and_edges_point_to_them(graph_of) -> None:
    events = with_attributes([
        {"user": 30, "item": 9, "item_title": "red pot", "user_country": "PT"},
        {"user": 10, "item": 9, "item_title": "red pot", "user_country": "ES"},
        {"user": 10, "item": 4, "item_title": "blue pot", "kind": "view"},
    ])
    nodes, edges, relations = graph_of(events, {
        "bought": Events(kinds=("buy",), anchor=True),
        "viewed": Events(kinds=("view",)),
        "has_word": Words(attribute="item_title", min_count=1),
        "from_country": Value(attribute="user_country", tail="country"),
    })
    assert nodes.schema.equals(NODES_SCHEMA) and edges.schema.equals(EDGES_SCHEMA)
    assert nodes["node"].to_pylist() == list(range(nodes.num_rows))
    types = nodes["type"].to_pylist()
    assert list(dict.fromkeys(types)) == ["user", "item", "word", "country"] and types == sorted(
        types, key=["user", "item", "word", "country"].index
    )
    described = nodes.to_pylist()
    assert [row["id"] for row in described if row["type"] == "user"] == [10, 30]
    assert {row["name"] for row in described if row["type"] == "word"} == {"red", "blue", "pot"}
    assert all(row["id"] == id_of(row["name"]) for row in described if row["type"] in ("word", "country"))
    assert {row["name"] for row in described if row["type"] == "item"} == {"red pot", "blue pot"}
    assert {
        (relations[edge["relation"]]["name"], described[edge["head"]]["id"], described[edge["tail"]]["name"])
        for edge in edges.to_pylist()
    } == {
        ("bought", 30, "red pot"), ("bought", 10, "red pot"), ("viewed", 10, "blue pot"), ("has_word", 9, "red"),
        ("has_word", 9, "pot"), ("has_word", 4, "blue"), ("has_word", 4, "pot"), ("from_country", 30, "PT"),
        ("from_country", 10, "ES"),
    }
    assert [r["surface"] for r in relations] == ["offsite", "onsite", "structural", "structural"]
    assert [r["anchor"] for r in relations] == [True, False, False, False]
    assert [r["edges"] for r in relations] == np.bincount(edges["relation"].to_numpy()).tolist()


def test_edges_are_sorted_by_relation_head_and_tail(graph_of) -> None:
    _, edges, _ = graph_of(canonical(random_events(5, kinds=("view", "buy"))), RELATIONS)
    places = list(zip(*(edges[name].to_pylist() for name in ("relation", "head", "tail")), strict=True))
    assert len(places) > 500 and places == sorted(places)


def test_an_item_of_several_titles_has_the_greatest(graph_of) -> None:
    events = with_attributes([{"item_title": title} for title in ("blue pot", "red pot", "green pot")])
    nodes, _, _ = graph_of(events, {"bought": Events(kinds=("buy",), anchor=True)})
    assert nodes.filter(pc.equal(nodes["type"], "item"))["name"].to_pylist() == ["red pot"]


RELATIONS = {
    "viewed": Events(kinds=("view",), anchor=True),
    "bought": Events(kinds=("buy",)),
    "seen_together": CoOccurrence(kinds=("view",), min_count=1),
}


def test_what_comes_after_the_window_changes_nothing_and_nor_does_the_order_of_events(graph_of) -> None:
    events = random_events(5, kinds=("view", "buy"))
    shuffled = [events[i] for i in np.random.default_rng(0).permutation(len(events))]
    cut_off = [event for event in shuffled if event[3] < JANUARY.end_time]
    whole, again = graph_of(canonical(events), RELATIONS), graph_of(canonical(cut_off), RELATIONS)
    assert whole[1].num_rows > 500
    assert whole[0].equals(again[0]) and whole[1].equals(again[1]) and whole[2] == again[2]
    pairs = [
        contrastive_pairs(canonical(rows), kinds=["buy"], window=JANUARY).to_pyarrow() for rows in (events, cut_off)
    ]
    assert pairs[0].num_rows > 100 and pairs[0].equals(pairs[1])
    latest = max(time for time in whole[1]["event_timestamp"].to_pylist() if time is not None)
    assert latest < JANUARY.end_time


def test_an_anchor_without_edges_is_refused(graph_of) -> None:
    with pytest.raises(InvalidEvents, match="anchor relation 'viewed'"):
        graph_of(canonical([(1, 1, "buy", day(1)), (1, 1, "view", day(1) + timedelta(days=90))]), RELATIONS)
