"""Steps of edges grouped by relation, and negatives of the right type."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pipelines.contracts.errors import InvalidConfig
from training.kge.graph import Graph
from training.losses import log_expected_count
from training.sampling import KnownPairs, generator

__all__ = ["EdgeBatches", "relation_shares"]


def relation_shares(edges: np.ndarray, *, names: list[str], balance: float, boost: Mapping[str, float]) -> np.ndarray:
    """How often each relation is drawn: edges ** balance * boost, as shares of 1.

    Args:
        edges: int64 (R,), edges per relation; a relation without edges is never drawn.

    Raises:
        InvalidConfig: a boost for a relation the graph does not have.
    """
    if unknown := set(boost) - set(names):
        raise InvalidConfig(
            "kge.boost", expected=f"relations of {names}", got=f"{sorted(unknown)}", remedy="Correct the names."
        )
    weight = np.where(edges > 0, edges.astype(float) ** balance, 0.0) * [float(boost.get(name, 1.0)) for name in names]
    return weight / weight.sum()


class EdgeBatches:
    """The steps of an epoch: G groups of B edges of one relation each, and K uniform negatives for either end.

    The relation of a group is drawn by `relation_shares`; a relation's edges come in random order, all of them before
    one comes again. An epoch has as many edges as the graph. The same steps come out however many processes share them.
    """

    def __init__(
        self, graph: Graph, *, groups: int, group_edges: int, uniform: int, shares: np.ndarray, logq: bool,
        mask_known: bool, seed: int, mine: slice, device: torch.device,
    ) -> None:
        self._graph, self._shares, self._seed, self._mine, self._device = graph, shares, seed, mine, device
        self._groups, self._group_edges, self._uniform, self._mask_known = groups, group_edges, uniform, mask_known
        self.steps = -(-len(graph.head) // (groups * group_edges))
        self._edges = [np.flatnonzero(graph.relation == number) for number in range(len(graph.relations))]
        # Known nodes of an edge's end lie under its other end and its relation.
        nodes = len(graph.ids)
        pairs = len(graph.relations) * nodes
        self._known = {
            "head": KnownPairs(graph.relation * nodes + graph.tail, graph.head, keys=pairs),
            "tail": KnownPairs(graph.relation * nodes + graph.head, graph.tail, keys=pairs),
        }
        self._log_q = {
            side: [self._log_q_of(number, side, logq=logq) for number in range(len(graph.relations))]
            for side in ("head", "tail")
        }

    def _range(self, relation: int, side: str) -> tuple[int, int]:
        return self._graph.ranges[getattr(self._graph.relations[relation], side)]

    def _log_q_of(self, relation: int, side: str, *, logq: bool) -> Tensor:
        begin, end = self._range(relation, side)
        if not logq:
            return torch.zeros(end - begin)
        ends = getattr(self._graph, side)[self._edges[relation]] - begin
        frequency = torch.from_numpy(np.bincount(ends, minlength=end - begin) / max(len(ends), 1))
        return log_expected_count(
            frequency, in_batch=self._group_edges - 1, uniform=self._uniform, population=end - begin
        ).float()

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Relations (steps, G) and edge numbers (steps, G, B) of an epoch, both int64."""
        random = generator(self._seed, 1, epoch)
        relations = random.choice(len(self._shares), size=(self.steps, self._groups), p=self._shares)
        edges = np.empty((self.steps * self._groups, self._group_edges), np.int64)
        flat = relations.reshape(-1)
        for relation in np.unique(flat):
            places = np.flatnonzero(flat == relation)
            needed = len(places) * self._group_edges
            own = self._edges[relation]
            rounds = [random.permutation(own) for _ in range(-(-needed // len(own)))]
            edges[places] = np.concatenate(rounds)[:needed].reshape(len(places), self._group_edges)
        return relations, edges.reshape(self.steps, self._groups, self._group_edges)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Yields, per step: relation (G,), head (G, B), tail (G, B), head_pool (G, K), tail_pool (G, K) int64 nodes;
        head_log_q, tail_log_q fp32 (G, B + K); head_hidden, tail_hidden bool (G, B, B + K)."""
        relations, edges = self.plan(epoch)
        for step in range(self.steps):
            random = generator(self._seed, 2, epoch, step)
            ranges = {
                side: np.array([self._range(relation, side) for relation in relations[step]])  # (G, 2)
                for side in ("head", "tail")
            }
            pools = {
                side: random.integers(bounds[:, :1], bounds[:, 1:], size=(self._groups, self._uniform))
                for side, bounds in ranges.items()
            }
            relation, chosen = relations[step][self._mine], edges[step][self._mine]
            ends = {"head": self._graph.head[chosen], "tail": self._graph.tail[chosen]}
            batch = [relation, ends["head"], ends["tail"]]
            batch += [pools["head"][self._mine], pools["tail"][self._mine]]
            log_q, hidden = [], []
            for side, other in (("head", "tail"), ("tail", "head")):
                candidates = np.concatenate([ends[side], pools[side][self._mine]], 1)  # (G, B + K)
                log_q.append(torch.stack([
                    self._log_q[side][r][torch.from_numpy(c - begin)]
                    for r, c, (begin, _) in zip(relation, candidates, ranges[side][self._mine], strict=True)
                ]))
                hidden.append(torch.from_numpy(np.stack([
                    self._hidden(side, r, own, opposite, c)
                    for r, own, opposite, c in zip(relation, ends[side], ends[other], candidates, strict=True)
                ])))
            tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in batch] + log_q + hidden
            yield tuple(tensor.to(self._device) for tensor in tensors)

    def _hidden(self, side: str, relation: int, own: np.ndarray, opposite: np.ndarray, candidates: np.ndarray):
        if not self._mask_known:
            return own[:, None] == candidates[None, :]
        return self._known[side].hidden(relation * len(self._graph.ids) + opposite, candidates)
