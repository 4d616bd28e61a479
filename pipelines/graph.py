"""The heterogeneous onsite-offsite graph: dense node numbers, typed edges, and what each relation is.

nodes.parquet    type, node (0..n over all types, one contiguous range per type), id, name
edges.parquet    relation (position in relations.json), head and tail (node numbers), event_timestamp, weight
relations.json   name, head and tail (node types), surface, anchor, edges
"""

import json
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.backend import write_parquet
from pipelines.contracts.errors import InvalidEvents
from pipelines.contracts.ids import as_ids
from pipelines.contracts.windows import Window
from pipelines.events import TIME
from pipelines.pairs import within
from pipelines.relations import Relation

__all__ = ["EDGES_SCHEMA", "NODES_SCHEMA", "STRUCTURAL", "Graph", "build_graph"]

NODES_SCHEMA = pa.schema(
    [
        pa.field("type", pa.string(), nullable=False),
        pa.field("node", pa.int64(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string()),
    ]
)
EDGES_SCHEMA = pa.schema(
    [
        pa.field("relation", pa.int32(), nullable=False),
        pa.field("head", pa.int64(), nullable=False),
        pa.field("tail", pa.int64(), nullable=False),
        pa.field("event_timestamp", TIME),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
STRUCTURAL = "structural"
"""Surface of a relation that describes entities instead of recording events."""


@dataclass(frozen=True)
class Graph:
    """Tables of `NODES_SCHEMA` and `EDGES_SCHEMA`, and the entries of relations.json."""

    nodes: pa.Table
    edges: pa.Table
    relations: list[dict]

    def write(self, directory: Path) -> None:
        """Write the three files into a directory that is being staged."""
        write_parquet(self.nodes, directory / "nodes.parquet", NODES_SCHEMA)
        write_parquet(self.edges, directory / "edges.parquet", EDGES_SCHEMA)
        (directory / "relations.json").write_text(json.dumps(self.relations, indent=1))


def build_graph(
    events: ibis.Table, *, relations: dict[str, Relation], window: Window, surfaces: dict[str, str]
) -> Graph:
    """Run every relation over the events of the pretraining window and number the nodes.

    Nodes are the ends of edges, ordered by type (users, items, then the others as they are declared) and id. The id of
    a word, a band or a value is the hash of its text. Edges are sorted by relation, head and tail.

    Args:
        window: the only events that are read.
        surfaces: kind of event -> surface.

    Raises:
        InvalidEvents: the anchor relation has no edge.
    """
    past = within(events, window)
    edges = {name: _identified(relation.edges(past).to_pyarrow()) for name, relation in relations.items()}
    for name, relation in relations.items():
        if getattr(relation, "anchor", False) and not edges[name].num_rows:
            raise InvalidEvents(
                f"the graph's anchor relation '{name}'", expected=f"edges from {window.start} to before {window.end}",
                got="none", remedy="Choose another anchor or another pretraining window in the data set's YAML.",
            )
    ids = _ids_by_type(relations, edges)
    starts = dict(zip(ids, np.cumsum([0, *(len(values) for values in ids.values())]).tolist(), strict=False))
    names = _names(past, relations, edges)
    nodes = [_nodes(kind, values, starts[kind], names.get(kind)) for kind, values in ids.items()]
    numbered, described = [], []
    for position, (name, relation) in enumerate(relations.items()):
        numbered.append(_numbered(edges[name], relation, position, ids, starts))
        kinds = getattr(relation, "kinds", ())
        described.append(
            {
                "name": name,
                "head": relation.head,
                "tail": relation.tail,
                "surface": surfaces[kinds[0]] if kinds else STRUCTURAL,
                "anchor": bool(getattr(relation, "anchor", False)),
                "edges": edges[name].num_rows,
            }
        )
    return Graph(pa.concat_tables(nodes), pa.concat_tables(numbered), described)


def _identified(edges: pa.Table) -> pa.Table:
    """Give text tails their ids; the text stays as `tail_name`."""
    if pa.types.is_integer(edges["tail"].type):
        return edges
    named = edges.append_column("tail_name", edges["tail"])
    return named.set_column(named.column_names.index("tail"), "tail", pa.array(as_ids(edges["tail"])))


def _ids_by_type(relations: dict[str, Relation], edges: dict[str, pa.Table]) -> dict[str, np.ndarray]:
    """Node type -> ascending distinct ids, users and items first."""
    ends: dict[str, list[np.ndarray]] = {"user": [], "item": []}
    for name, relation in relations.items():
        ends.setdefault(relation.head, []).append(edges[name]["head"].to_numpy())
        ends.setdefault(relation.tail, []).append(edges[name]["tail"].to_numpy())
    return {kind: np.unique(np.concatenate(parts)) for kind, parts in ends.items() if parts}


def _names(events: ibis.Table, relations: dict[str, Relation], edges: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Node type -> (id, name): item titles if the log has them, and the texts that became ids."""
    names: dict[str, list[pa.Table]] = {}
    if "item_title" in events.columns:
        titled = events.filter(events.item_title.notnull()).group_by(id="item").agg(name=ibis._.item_title.max())
        names["item"] = [titled.to_pyarrow()]
    for name, relation in relations.items():
        if "tail_name" in edges[name].column_names:
            texts = edges[name].select(["tail", "tail_name"]).group_by(["tail", "tail_name"]).aggregate([])
            names.setdefault(relation.tail, []).append(texts.rename_columns(["id", "name"]))
    return {kind: pa.concat_tables(parts) for kind, parts in names.items()}


def _nodes(kind: str, ids: np.ndarray, start: int, names: pa.Table | None) -> pa.Table:
    if names is None:
        name = pa.nulls(len(ids), pa.string())
    else:
        name = names["name"].combine_chunks().take(pc.index_in(pa.array(ids), names["id"].combine_chunks()))
    node = np.arange(start, start + len(ids))
    return pa.table({"type": pa.repeat(kind, len(ids)), "node": node, "id": ids, "name": name}).cast(NODES_SCHEMA)


def _numbered(
    edges: pa.Table, relation: Relation, position: int, ids: dict[str, np.ndarray], starts: dict[str, int]
) -> pa.Table:
    """Edges with node numbers, sorted by head and tail."""
    head = starts[relation.head] + np.searchsorted(ids[relation.head], edges["head"].to_numpy())
    tail = starts[relation.tail] + np.searchsorted(ids[relation.tail], edges["tail"].to_numpy())
    order = np.lexsort((tail, head))
    columns = {
        "relation": pa.repeat(pa.scalar(position, pa.int32()), len(order)),
        "head": head[order],
        "tail": tail[order],
        "event_timestamp": edges["event_timestamp"].combine_chunks().cast(TIME).take(pa.array(order)),
        "weight": edges["weight"].to_numpy()[order],
    }
    return pa.table(columns).cast(EDGES_SCHEMA)
