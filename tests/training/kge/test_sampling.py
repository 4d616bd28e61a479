
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.errors import InvalidConfig
from tests.planted import CUT, planted_run
from training.kge.graph import Graph
from training.kge.sampling import EdgeBatches, relation_shares

GROUPS, EDGES, UNIFORM = 4, 16, 8


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph.read(planted_run(tmp_path_factory.mktemp("planted"))[1].graph, cut=CUT)


def batches(graph: Graph, *, mine: slice = slice(None), mask_known: bool = True, seed: int = 0) -> EdgeBatches:
    return EdgeBatches(
        graph, groups=GROUPS, group_edges=EDGES, uniform=UNIFORM, shares=np.array([0.6, 0.4]), logq=True,
        mask_known=mask_known, seed=seed, mine=mine, device=torch.device("cpu"),
    )


def test_a_group_has_one_relation_and_its_negatives_the_right_types(graph: Graph) -> None:
    edges = set(zip(graph.relation, graph.head, graph.tail, strict=True))
    for relation, head, tail, head_pool, tail_pool, *_ in batches(graph)(0):
        for group, number in enumerate(relation.tolist()):
            assert {(number, int(h), int(t)) for h, t in zip(head[group], tail[group], strict=True)} <= edges
            for nodes, kind in ((head_pool[group], graph.relations[number].head),
                                (tail_pool[group], graph.relations[number].tail)):
                begin, end = graph.ranges[kind]
                assert nodes.min() >= begin and nodes.max() < end and len(nodes) == UNIFORM


def test_every_edge_of_a_relation_comes_before_one_comes_again(graph: Graph) -> None:
    relations, edges = batches(graph).plan(0)
    for number in range(2):
        drawn = edges[relations == number].ravel()
        counts = np.bincount(drawn, minlength=len(graph.head))[graph.relation == number]
        assert counts.max() - counts.min() <= 1 and (graph.relation[drawn] == number).all()


def test_relations_are_drawn_by_their_shares(graph: Graph) -> None:
    drawn = np.concatenate([batches(graph).plan(epoch)[0].ravel() for epoch in range(60)])
    assert (drawn == 0).mean() == pytest.approx(0.6, abs=0.03)


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=5).filter(any), st.floats(0, 1), st.floats(0.1, 9)
)
def test_shares_follow_balance_and_boost(edges: list[int], balance: float, boost: float) -> None:
    names = [f"r{number}" for number in range(len(edges))]
    shares = relation_shares(np.array(edges), names=names, balance=balance, boost={"r0": boost})
    weight = [count**balance * (boost if number == 0 else 1) if count else 0 for number, count in enumerate(edges)]
    np.testing.assert_allclose(shares, np.array(weight) / sum(weight))


def test_a_boost_for_no_relation_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="likes"):
        relation_shares(np.array([3]), names=["bought"], balance=1.0, boost={"likes": 2})


@pytest.mark.parametrize("mask_known", [True, False])
def test_hidden_candidates_are_those_that_make_a_known_edge(graph: Graph, mask_known: bool) -> None:
    edges = set(zip(graph.relation, graph.head, graph.tail, strict=True))
    step = next(batches(graph, mask_known=mask_known)(0))
    relation, head, tail, head_pool, tail_pool, _, _, head_hidden, tail_hidden = step
    heads, tails = torch.cat([head, head_pool], 1), torch.cat([tail, tail_pool], 1)
    for group, row, column in np.ndindex(*tail_hidden.shape):
        r, h, t = int(relation[group]), int(head[group, row]), int(tail[group, row])
        for hidden, other, edge in (
            (head_hidden, heads[group, column] == h, (r, int(heads[group, column]), t)),
            (tail_hidden, tails[group, column] == t, (r, h, int(tails[group, column]))),
        ):
            assert bool(hidden[group, row, column]) == (edge in edges if mask_known else bool(other))


def test_log_q_is_how_often_the_pool_holds_a_node(graph: Graph) -> None:
    seen, expected, pools = np.zeros(len(graph.ids)), np.zeros(len(graph.ids)), 0
    made = batches(graph)
    for epoch in range(80):
        for relation, _, tail, _, tail_pool, _, log_q, *_ in made(epoch):
            for group in np.flatnonzero(relation.numpy() == 0):
                seen += np.bincount(torch.cat([tail[group, 1:], tail_pool[group]]), minlength=len(seen))
                expected[torch.cat([tail[group], tail_pool[group]])] = log_q[group].exp()
                pools += 1
    begin, end = graph.ranges["item"]
    np.testing.assert_allclose(seen[begin:end] / pools, expected[begin:end], rtol=0.2)


def test_two_processes_share_one_process_s_steps(graph: Graph) -> None:
    whole = batches(graph, seed=3)(1)
    halves = [batches(graph, seed=3, mine=part)(1) for part in (slice(0, 2), slice(2, 4))]
    for one, first, second in zip(whole, *halves, strict=True):
        for tensor, a, b in zip(one, first, second, strict=True):
            assert torch.equal(tensor, torch.cat([a, b]))
