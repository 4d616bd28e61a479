"""Each scorer against its formula, written out edge by edge in numpy."""

import numpy as np
import pytest
import torch

from pipelines.contracts.errors import InvalidConfig
from training.kge.scorers import SCORERS, find_scorer, pairwise_score, score

RELATIONS, DIM, RANK, EDGES = 3, 4, 2, 5
ANCHOR = np.array([True, False, False])


def parameters(name: str) -> dict[str, torch.Tensor]:
    """Parameters as after some training: nothing is an identity or zero any more."""
    start = find_scorer(name).start(RELATIONS, DIM, RANK, torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    return {key: (value + torch.randn(value.shape, generator=noise) * 0.3).double() for key, value in start.items()}


def matrix_of(name: str, values: dict[str, np.ndarray], relation: int) -> np.ndarray:
    """M_r, by the definition of each scorer."""
    if name == "transe" or (name.startswith("transra") and ANCHOR[relation]):
        return np.eye(DIM)
    if name == "transra_lowrank":
        return np.eye(DIM) + values["left"][relation] @ values["right"][relation].T
    return values["matrix"][relation]


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = RELATIONS, EDGES, DIM
    return random.normal(size=shape), random.normal(size=shape), random.normal(size=(RELATIONS, DIM))


@pytest.mark.parametrize("name", sorted(SCORERS))
class TestEveryScorer:
    def test_equals_the_reference(self, name: str, rows) -> None:
        head, tail, translation = rows
        given = parameters(name)
        values = {key: value.numpy() for key, value in given.items()}
        project = find_scorer(name).project
        h, t = (project(torch.tensor(side), given, torch.tensor(ANCHOR)) for side in (head, tail))
        got = score(h, torch.tensor(translation), t)
        pairs = pairwise_score(h + torch.tensor(translation).unsqueeze(1), t)
        for relation in range(RELATIONS):
            matrix = matrix_of(name, values, relation)
            for i in range(EDGES):
                for j in range(EDGES):
                    gap = matrix @ head[relation, i] + translation[relation] - matrix @ tail[relation, j]
                    assert pairs[relation, i, j].item() == pytest.approx(-(gap**2).sum(), abs=1e-9)
                assert got[relation, i].item() == pytest.approx(pairs[relation, i, i].item(), abs=1e-9)

    def test_starts_at_the_identity(self, name: str, rows) -> None:
        start = find_scorer(name).start(RELATIONS, DIM, RANK, torch.Generator().manual_seed(0))
        head = torch.tensor(rows[0]).float()
        assert torch.equal(find_scorer(name).project(head, start, torch.tensor(ANCHOR)), head)

    def test_everything_but_an_anchor_s_projection_has_a_gradient(self, name: str, rows) -> None:
        given = {key: value.requires_grad_() for key, value in parameters(name).items()}
        head, tail, translation = (torch.tensor(values, requires_grad=True) for values in rows)
        project = find_scorer(name).project
        score(*(project(head, given, torch.tensor(ANCHOR)), translation,
                project(tail, given, torch.tensor(ANCHOR)))).sum().backward()
        assert all((side.grad.abs().sum(-1) > 0).all() for side in (head, tail, translation))
        for value in given.values():
            moved = value.grad.abs().flatten(1).sum(1) > 0
            assert moved.tolist() == ([False, True, True] if name.startswith("transra") else [True] * 3)


def test_low_rank_leaves_its_start() -> None:
    scorer = find_scorer("transra_lowrank")
    start = scorer.start(1, DIM, RANK, torch.Generator().manual_seed(0))
    start["right"].requires_grad_()
    scorer.project(torch.randn(1, 3, DIM), start, torch.tensor([False])).square().sum().backward()
    assert start["right"].grad.abs().sum() > 0


def test_an_unknown_scorer_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="transra"):
        find_scorer("rotate")
