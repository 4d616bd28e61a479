"""Pretrained facets as first rows: scale, unknown ids, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipelines.contracts.errors import IntegrityError, InvalidTable, NotPrepared
from training.ranker.pretrained import PretrainedTable, load_pretrained, vocabularies_of, warm_rows
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary


def test_pretrained_rows_are_scaled_as_one_and_keep_their_proportions():
    weight = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 7
    table = PretrainedTable("item.kge", np.arange(100, 150), weight)
    vocabulary = Vocabulary(np.arange(100, 160))
    rows = warm_rows(table, vocabulary, scale=0.2, std=0.001, seed=0)
    warm = rows[vocabulary.rows(table.ids)]
    assert np.sqrt((warm**2).mean()) == pytest.approx(0.2, rel=1e-5)
    np.testing.assert_allclose(warm / warm[0, 0], weight / weight[0, 0], rtol=1e-4)
    np.testing.assert_allclose(rows[DEFAULT_ROW], warm.mean(0), rtol=1e-4, atol=1e-6)
    unknown = rows[vocabulary.rows(np.arange(150, 160))]
    assert 0 < np.abs(unknown).max() < 0.01 and len(np.unique(unknown)) == unknown.size


def test_all_arms_share_the_vocabulary_of_every_facet_and_of_the_fold(world):
    pretrained = load_pretrained(world.workspace, world.run, seed=0)
    assert sorted(pretrained) == ["item.contrastive", "item.kge", "user.contrastive", "user.kge"]
    vocabularies = vocabularies_of(pretrained, {"user": np.array([7, 1_000]), "item": np.array([9])})
    assert 7 in vocabularies["user"].ids and 9 in vocabularies["item"].ids
    assert set(pretrained["user.kge"].ids) | {7} == set(vocabularies["user"].ids)


def spoil(path, **tensors):
    save_file({**load_file(path), **tensors}, path)


def test_a_missing_facet_is_named_with_its_command(world):
    (world.run.facet("kge", 0) / "item.safetensors").unlink()
    with pytest.raises(NotPrepared, match="facet pretrain kge --run v1 --seed 0"):
        load_pretrained(world.workspace, world.run, seed=0)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"weight": np.array([[1, np.nan], [1, 1]], np.float32), "ids": np.array([1, 2])}, "NaN or infinity in 1"),
        ({"weight": np.ones((2, 2), np.float32), "ids": np.array([1, 1])}, "distinct ids"),
        ({"weight": np.ones((3, 2), np.float32), "ids": np.array([1, 2])}, "distinct ids"),
        ({"weight": np.ones((0, 2), np.float32), "ids": np.array([], np.int64)}, "at least one row"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(world, tensors, match):
    spoil(world.run.facet("contrastive", 0) / "user.safetensors", **tensors)
    with pytest.raises(InvalidTable, match=match):
        load_pretrained(world.workspace, world.run, seed=0)


def test_a_broken_file_is_refused(world):
    (world.run.facet("contrastive", 0) / "user.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(IntegrityError, match=r"user\.safetensors"):
        load_pretrained(world.workspace, world.run, seed=0)
