"""Who is asked for."""

import numpy as np

from online.load.population import Population


def test_popular_ids_come_more_often_and_a_few_are_unknown() -> None:
    ids = np.arange(1000, 2000)
    population = Population({"item": ids}, seed=1)
    drawn = population.draw("item", 20_000, np.random.default_rng(0))
    unknown = drawn < 0
    assert 0.01 < unknown.mean() < 0.03
    assert np.isin(drawn[~unknown], ids).all()
    _, counts = np.unique(drawn[~unknown], return_counts=True)
    assert counts.max() > 20 * np.median(counts)


def test_exponent_and_unknown_share_are_options() -> None:
    population = Population({"item": np.arange(100)}, seed=1, unknown_share=0.0, zipf_exponent=0.0)
    drawn = population.draw("item", 20_000, np.random.default_rng(0))
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 100 and counts.max() < 2 * counts.min() and drawn.min() >= 0


def test_all_ids_of_a_version_can_be_drawn(workspace_with_versions) -> None:
    population = Population.of_version(workspace_with_versions.workspace, 1, seed=0, zipf_exponent=0.0)
    assert len(np.unique(population.draw("user", 1000, np.random.default_rng(0)))) > 10
