"""How a translation model scores an edge: stateless functions, apart from the model that holds their parameters.

All have one form and differ only in the projection P_r into the space of relation r:

    f_r(h, t) = -|| P_r(h) + r - P_r(t) ||^2

| scorer          | P_r(e)             | free parameters of a relation, besides r (D,) |
|-----------------|--------------------|-----------------------------------------------|
| transe          | e                  | none                                          |
| transr          | M_r e              | M_r (D, D), from I                            |
| transra         | M_r e; anchors: e  | M_r (D, D), from I                            |
| transra_lowrank | e + U_r V_r^T e; anchors: e | U_r (D, rank) from noise, V_r (D, rank) from 0 |

An anchor relation's projection is the identity and stays so: the rows *are* coordinates of its space, and whoever
takes the rows needs no projection.

TransE (Bordes et al., NeurIPS 2013), TransR (Lin et al., AAAI 2015). TransRA is TransR with anchors (arXiv 2508.02609),
whose exact constraint could not be read: the identity is our choice, and so is its low-rank variant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.contracts.errors import InvalidConfig

__all__ = ["SCORERS", "Scorer", "find_scorer", "pairwise_score", "score"]

Parameters = Mapping[str, Tensor]
"""name -> values by relation, the relation (or group) axis first."""


@dataclass(frozen=True)
class Scorer:
    """A projection and the parameters it needs.

    Attributes:
        start: (relations, dim, rank, generator) -> initial parameters, (R, ...) each.
        project: (rows (G, N, D), parameters (G, ...), anchor bool (G,)) -> (G, N, D).
    """

    start: Callable[[int, int, int, torch.Generator], dict[str, Tensor]]
    project: Callable[[Tensor, Parameters, Tensor], Tensor]


SCORERS: dict[str, Scorer] = {}


def _scorer(name: str, *, start: Callable[..., dict[str, Tensor]]) -> Callable:
    def register(project: Callable) -> Callable:
        SCORERS[name] = Scorer(start, project)
        return project

    return register


def find_scorer(name: str) -> Scorer:
    """The scorer of that name; raises `InvalidConfig` if there is none."""
    if name not in SCORERS:
        raise InvalidConfig("kge.scorer", expected=f"one of {', '.join(SCORERS)}", got=repr(name), remedy="Choose one.")
    return SCORERS[name]


def _no_parameters(relations: int, dim: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def _identities(relations: int, dim: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"matrix": torch.eye(dim).repeat(relations, 1, 1)}


def _low_rank(relations: int, dim: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    # V = 0 starts at the identity; U must not be 0 too, or neither would ever have a gradient.
    return {
        "left": torch.randn(relations, dim, rank, generator=generator) / dim**0.5,
        "right": torch.zeros(relations, dim, rank),
    }


@_scorer("transe", start=_no_parameters)
def _transe(rows: Tensor, parameters: Parameters, anchor: Tensor) -> Tensor:
    return rows


@_scorer("transr", start=_identities)
def _transr(rows: Tensor, parameters: Parameters, anchor: Tensor) -> Tensor:
    return rows @ parameters["matrix"].mT  # (G, N, D): M_r e for every row e


@_scorer("transra", start=_identities)
def _transra(rows: Tensor, parameters: Parameters, anchor: Tensor) -> Tensor:
    return torch.where(anchor[:, None, None], rows, rows @ parameters["matrix"].mT)


@_scorer("transra_lowrank", start=_low_rank)
def _transra_lowrank(rows: Tensor, parameters: Parameters, anchor: Tensor) -> Tensor:
    change = (rows @ parameters["right"]) @ parameters["left"].mT  # (G, N, D): U_r V_r^T e
    return torch.where(anchor[:, None, None], rows, rows + change)


def score(head: Tensor, translation: Tensor, tail: Tensor) -> Tensor:
    """Scores of edges: projected heads and tails (G, B, D), translations (G, D) -> (G, B)."""
    return -(head + translation.unsqueeze(1) - tail).square().sum(-1)


def pairwise_score(query: Tensor, candidate: Tensor) -> Tensor:
    """-||q - c||^2 of every query with every candidate, as one product: (G, B, D), (G, C, D) -> (G, B, C)."""
    lengths = query.square().sum(-1).unsqueeze(2) + candidate.square().sum(-1).unsqueeze(1)
    return 2 * torch.bmm(query, candidate.mT) - lengths
