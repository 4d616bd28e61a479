import json
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts.errors import InvalidEvents
from tests.planted import CLUSTERS, CUT, ITEMS, USERS, item_ids, planted_run, user_ids
from training.kge.graph import Graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_run(tmp_path_factory.mktemp("planted"))[1].graph


def test_later_edges_are_held_out_and_timeless_ones_kept(folder: Path) -> None:
    graph = Graph.read(folder, cut=CUT)
    edges = pq.read_table(folder / "edges.parquet").to_pandas()
    kept = edges[~(edges.event_timestamp >= CUT)]
    assert list(zip(graph.relation, graph.head, graph.tail, strict=True)) == list(
        zip(kept.relation, kept["head"], kept["tail"], strict=True)
    )
    assert (graph.relation == 1).sum() == ITEMS and not (graph.held_relation == 1).any()
    trained = set(graph.head) | set(graph.tail)
    late = edges[edges.event_timestamp >= CUT]
    late = late[late["head"].isin(trained) & late["tail"].isin(trained)]
    assert len(graph.held_head) == len(late) > 0


def test_nodes_lie_in_ranges_by_type(folder: Path) -> None:
    graph = Graph.read(folder, cut=None)
    assert graph.ranges == {
        "user": (0, USERS), "item": (USERS, USERS + ITEMS), "category": (USERS + ITEMS, USERS + ITEMS + CLUSTERS)
    }
    assert graph.ids[:USERS].tolist() == user_ids().tolist()
    assert graph.ids[USERS : USERS + ITEMS].tolist() == item_ids().tolist()
    assert [relation.anchor for relation in graph.relations] == [True, False]
    assert len(graph.held_head) == 0


def broken(folder: Path, tmp_path: Path, what: str) -> Path:
    copy = tmp_path / "graph"
    shutil.copytree(folder, copy)
    relations = json.loads((copy / "relations.json").read_text())
    if what == "edges":
        pq.write_table(pq.read_table(copy / "edges.parquet").slice(0, 0), copy / "edges.parquet")
    elif what == "type":
        relations[1]["head"] = "user"
    elif what == "anchor":
        relations[0]["anchor"] = False
    elif what == "ranges":
        nodes = pq.read_table(copy / "nodes.parquet")
        types = np.asarray(nodes["type"].to_pylist(), dtype=object)
        types[[0, -1]] = types[[-1, 0]]
        pq.write_table(nodes.set_column(0, "type", pa.array(types.tolist())), copy / "nodes.parquet")
    (copy / "relations.json").write_text(json.dumps(relations))
    return copy


@pytest.mark.parametrize(
    ("what", "message"),
    [("edges", "at least one edge"), ("type", "ends of type user"), ("anchor", "anchor"), ("ranges", "contiguous")],
)
def test_a_broken_graph_is_refused(folder: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(InvalidEvents, match=message):
        Graph.read(broken(folder, tmp_path, what), cut=CUT)


def test_a_graph_with_all_timed_edges_held_out_still_has_the_timeless(folder: Path) -> None:
    graph = Graph.read(folder, cut=CUT - timedelta(days=400))
    assert set(graph.relation) == {1} and len(graph.held_head) == 0  # no user occurs in training
