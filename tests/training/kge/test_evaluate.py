import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.kge.evaluate import LinkPrediction, filtered_ranks, rank_quality
from training.kge.graph import Graph, Relation


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0]])
    # Row 0: truth 3, but 0 makes another known edge: 1 and 2 are better. Row 1: two ties, counted half each.
    ranks = filtered_ranks(scores, np.array([3, 0]), [np.array([0, 3]), np.array([0])])
    assert ranks.tolist() == [3.0, 2.0]
    assert rank_quality(ranks) == {"mrr": pytest.approx((1 / 3 + 1 / 2) / 2), "hits@10": 1.0}


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.data())
def test_ranks_are_those_of_sorting(values: list[int], data: st.DataObject) -> None:
    truth = data.draw(st.integers(0, len(values) - 1))
    known = data.draw(st.sets(st.integers(0, len(values) - 1))) | {truth}
    rivals = [value for place, value in enumerate(values) if place not in known]
    expected = 1 + sum(v > values[truth] for v in rivals) + sum(v == values[truth] for v in rivals) / 2
    got = filtered_ranks(torch.tensor([values]).float(), np.array([truth]), [np.array(sorted(known))])
    assert got.tolist() == [expected]


@pytest.fixture
def graph() -> Graph:
    """Users 0, 1; items 2..5; item 5 has no edge to train on."""
    return Graph(
        ids=np.arange(6), ranges={"user": (0, 2), "item": (2, 6)},
        relations=(Relation("bought", "user", "item", True),),
        relation=np.zeros(4, np.int64), head=np.array([0, 0, 1, 1]), tail=np.array([2, 3, 2, 4]),
        held_relation=np.zeros(1, np.int64), held_head=np.array([0]), held_tail=np.array([4]),
    )


def test_only_trained_nodes_that_make_no_known_edge_are_rivals(graph: Graph) -> None:
    prediction = LinkPrediction(graph, edges=10, seed=0)
    # All rivals score higher than the truth: tails 2 and 3 are known, 5 is untrained, so rank 1. Heads: 1 is known.
    quality = prediction.quality(
        lambda relation, side, other, begin, end: -torch.arange(begin, end).expand(1, -1).float()
    )
    assert quality["bought"] == {"mrr": 1.0, "hits@10": 1.0, "edges": 1} == quality["all"]
    assert len(prediction) == 1


def test_degree_is_the_baseline(graph: Graph) -> None:
    later = Graph(**{
        **vars(graph), "held_head": np.array([1]), "held_tail": np.array([3]), "tail": np.array([2, 3, 2, 2]),
        "head": np.array([0, 0, 1, 0]),
    })
    # Tails: 2 is known to user 1, 4 and 5 are untrained: rank 1. Heads: user 0 is known to item 3: rank 1.
    assert LinkPrediction(later, edges=10, seed=0).by_degree()["all"]["mrr"] == 1.0
