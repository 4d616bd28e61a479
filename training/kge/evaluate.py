"""Filtered link prediction on held-out edges: where does the true node rank among all of its type?"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.kge.graph import Graph
from training.sampling import KnownPairs, generator

__all__ = ["LinkPrediction", "filtered_ranks", "rank_quality"]

BLOCK_EDGES = 256
HITS_AT = 10


def filtered_ranks(scores: Tensor, truth: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """Rank of the true candidate among those that make no other known edge; ties count half.

    Args:
        scores: (B, C), higher is better.
        truth: int64 (B,), column of the true candidate.
        known: per row the columns that make a known edge; they are left out, but for the true one.

    Returns:
        float64 (B,), 1 is best.
    """
    own = scores[torch.arange(len(truth)), torch.from_numpy(truth)].clone().unsqueeze(1)  # (B, 1)
    scores = scores.clone()
    for row, columns in enumerate(known):
        scores[row, torch.from_numpy(columns)] = -torch.inf
    scores[torch.arange(len(truth)), torch.from_numpy(truth)] = -torch.inf
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    return (1 + better + equal / 2).double().numpy()


def rank_quality(ranks: np.ndarray) -> dict[str, float]:
    """Mean reciprocal rank and share of ranks of at most 10."""
    return {"mrr": float((1 / ranks).mean()), f"hits@{HITS_AT}": float((ranks <= HITS_AT).mean())}


class LinkPrediction:
    """Ranks the heads and the tails of held-out edges, relation by relation.

    Args:
        graph: its held-out edges are ranked, against all nodes of the right type that occur in training.
        edges: ranked per relation at most, drawn by seed.
    """

    def __init__(self, graph: Graph, *, edges: int, seed: int) -> None:
        self._graph = graph
        nodes = len(graph.ids)
        relation = np.concatenate([graph.relation, graph.held_relation])
        head = np.concatenate([graph.head, graph.held_head])
        tail = np.concatenate([graph.tail, graph.held_tail])
        pairs = len(graph.relations) * nodes
        self._known = {
            "head": KnownPairs(relation * nodes + tail, head, keys=pairs),
            "tail": KnownPairs(relation * nodes + head, tail, keys=pairs),
        }
        self._trained = graph.trained_nodes
        self._chosen = {}
        for number in range(len(graph.relations)):
            places = np.flatnonzero(graph.held_relation == number)
            if len(places):
                self._chosen[number] = generator(seed, 3, number).permutation(places)[:edges]

    def __len__(self) -> int:
        return sum(map(len, self._chosen.values()))

    def quality(self, score: Callable[[int, str, np.ndarray, int, int], Tensor]) -> dict[str, dict[str, float]]:
        """Relation name -> mrr, hits@10 (heads and tails together), edges; `all` is over every ranked edge.

        Args:
            score: (relation, side, nodes at the other side (B,), begin, end) -> (B, end - begin), the scores of all
                nodes of the range as that side of the edge.
        """
        answer, every = {}, []
        for number, chosen in self._chosen.items():
            ranks = np.concatenate([
                self._ranks(score, number, side, chosen[begin : begin + BLOCK_EDGES])
                for side in ("head", "tail") for begin in range(0, len(chosen), BLOCK_EDGES)
            ])
            answer[self._graph.relations[number].name] = rank_quality(ranks) | {"edges": len(chosen)}
            every.append(ranks)
        if every:
            answer["all"] = rank_quality(np.concatenate(every)) | {"edges": len(self)}
        return answer

    def by_degree(self) -> dict[str, dict[str, float]]:
        """The baseline: every edge's candidates are ranked by how many edges of the relation they have."""

        def degree(relation: int, side: str, other: np.ndarray, begin: int, end: int) -> Tensor:
            ends = getattr(self._graph, side)[self._graph.relation == relation]
            return torch.from_numpy(np.bincount(ends - begin, minlength=end - begin)).float().expand(len(other), -1)

        return self.quality(degree)

    def _ranks(self, score: Callable, relation: int, side: str, edges: np.ndarray) -> np.ndarray:
        graph = self._graph
        begin, end = graph.ranges[getattr(graph.relations[relation], side)]
        own = getattr(graph, f"held_{side}")[edges] - begin
        other = getattr(graph, "held_tail" if side == "head" else "held_head")[edges]
        scores = score(relation, side, other, begin, end).clone()
        scores[:, torch.from_numpy(~self._trained[begin:end])] = -torch.inf
        known = [self._known[side].of(relation * len(graph.ids) + node) - begin for node in other]
        return filtered_ranks(scores, own, known)
