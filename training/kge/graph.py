"""The graph as arrays: typed nodes in contiguous ranges, relations, edges split in time."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts.errors import InvalidEvents
from training.ids import RunIds

__all__ = ["Graph", "Relation"]


@dataclass(frozen=True)
class Relation:
    """Edges of one meaning, from nodes of one type to nodes of one type.

    Attributes:
        head, tail: node types.
        anchor: its space is the space of the rows (`training.kge.scorers`).
    """

    name: str
    head: str
    tail: str
    anchor: bool


@dataclass(frozen=True)
class Graph:
    """Nodes 0 .. N-1, a contiguous range per type, and edges.

    ```
    users 0..U-1 | items U..U+I-1 | words … | …        ranges["item"] = (U, U + I)
    ```

    Attributes:
        ids: int64 (N,), the stored id of each node.
        relation, head, tail: int64 (E,), the edges to train on.
        held_relation, held_head, held_tail: int64 (H,), later edges between nodes that occur in training.
    """

    ids: np.ndarray
    ranges: dict[str, tuple[int, int]]
    relations: tuple[Relation, ...]
    relation: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    held_relation: np.ndarray
    held_head: np.ndarray
    held_tail: np.ndarray

    @property
    def trained_nodes(self) -> np.ndarray:
        """bool (N,): the node has an edge to train on."""
        trained = np.zeros(len(self.ids), bool)
        trained[self.head] = trained[self.tail] = True
        return trained

    @classmethod
    def read(cls, folder: Path, *, cut: datetime | None, ids: RunIds | None = None) -> "Graph":
        """Read `nodes.parquet`, `edges.parquet` and `relations.json`; edges at `cut` or later are held out.

        Users and items that share a bucket become one node. Of edges that became equal so the first stays, because an
        edge says that something happened, not how often; edges from a node to itself go.

        Args:
            ids: which users and items share a row; by default none do.

        Raises:
            InvalidEvents: no edge to train on, no anchor, or an edge whose ends are not of its relation's types.
        """
        nodes = pq.read_table(folder / "nodes.parquet", columns=["type", "node", "id"])
        order = np.argsort(nodes["node"].to_numpy())
        types = np.asarray(nodes["type"].to_pylist(), dtype=object)[order]
        ranges = {}
        for name in dict.fromkeys(types):
            places = np.flatnonzero(types == name)
            if places[-1] - places[0] + 1 != len(places):
                raise _broken(folder, "a contiguous range of nodes per type", f"type {name} in several pieces")
            ranges[name] = (int(places[0]), int(places[-1]) + 1)
        relations = tuple(
            Relation(raw["name"], raw["head"], raw["tail"], bool(raw["anchor"]))
            for raw in json.loads((folder / "relations.json").read_text())
        )
        if not any(relation.anchor for relation in relations):
            raise _broken(folder, "at least one anchor relation", "none")
        edges = pq.read_table(folder / "edges.parquet", columns=["relation", "head", "tail", "event_timestamp"])
        relation, head, tail = (edges[name].to_numpy().astype(np.int64) for name in ("relation", "head", "tail"))
        for number, meaning in enumerate(relations):
            for ends, kind in ((head, meaning.head), (tail, meaning.tail)):
                begin, end = ranges.get(kind, (0, 0))
                here = ends[relation == number]
                if ((here < begin) | (here >= end)).any():
                    raise _broken(folder, f"ends of type {kind} for '{meaning.name}'", "nodes of another type")
        moments = edges["event_timestamp"].to_numpy().astype("datetime64[us]")
        entities = nodes["id"].to_numpy()[order]
        stored = {kind: (ids or RunIds()).stored(kind, entities[begin:end]) for kind, (begin, end) in ranges.items()}
        if any((stored[kind] != entities[begin:end]).any() for kind, (begin, end) in ranges.items()):
            entities, ranges, node = _merged(stored)
            relation, head, tail, moments = _once(relation, node[head], node[tail], moments)
        late = np.zeros(len(relation), bool)
        if cut is not None:
            late = moments >= np.datetime64(cut.replace(tzinfo=None), "us")  # no time (NaT): not late
        if late.all():
            raise InvalidEvents(
                f"{folder}", expected="at least one edge before the held-out days", got=f"{len(relation)} edges, none",
                remedy="Widen the pretraining window or lower holdout_days.",
            )
        trained = np.zeros(len(entities), bool)
        trained[head[~late]] = trained[tail[~late]] = True
        held = late & trained[head] & trained[tail]
        return cls(
            entities, ranges, relations, relation[~late], head[~late], tail[~late],
            relation[held], head[held], tail[held],
        )


def _merged(stored: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, tuple[int, int]], np.ndarray]:
    """One node per type and stored id: their ids (M,), ranges by type, and the new number (N,) of every old node."""
    entities, ranges, node, begin = [], {}, [], 0
    for kind, values in stored.items():
        distinct, place = np.unique(values, return_inverse=True)
        ranges[kind] = (begin, begin + len(distinct))
        entities.append(distinct)
        node.append(begin + place)
        begin += len(distinct)
    return np.concatenate(entities), ranges, np.concatenate(node)


def _once(
    relation: np.ndarray, head: np.ndarray, tail: np.ndarray, moments: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The earliest of equal edges, and none from a node to itself; all (E,) to (F,), by relation, head and tail."""
    order = np.lexsort((moments, tail, head, relation))
    edges = np.stack([relation, head, tail])[:, order]  # (3, E)
    kept = np.ones(len(order), bool)
    kept[1:] = (edges[:, 1:] != edges[:, :-1]).any(axis=0)
    kept &= edges[1] != edges[2]
    return *edges[:, kept], moments[order][kept]


def _broken(folder: Path, expected: str, got: str) -> InvalidEvents:
    return InvalidEvents(f"{folder}", expected=expected, got=got, remedy="Prepare the run again.")
