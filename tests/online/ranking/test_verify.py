"""Recomputing answers: right ones pass, every kind of wrong one is counted."""

import dataclasses

import numpy as np
import pytest

from online.ranking.client import RankClient
from online.ranking.context_source import FeastContext
from online.ranking.verify import Answers, OfflineVersion, verify
from pipelines.contracts.context import CONTEXT_FEATURES, context_matrix
from tests.releases import AS_OF, DIMS, entity_ids, float_rows
from tests.waiting import PATIENCE_S

NOW = AS_OF.timestamp() + 3600.0
CANDIDATES = 5


@pytest.fixture(scope="module")
def context(workspace_with_versions):
    return FeastContext(workspace_with_versions.workspace.feature_repo, CONTEXT_FEATURES)


@pytest.fixture(scope="module")
def answers(workspace_with_versions, context) -> Answers:
    """Twenty right answers, ten of each version, the way a ranker would have given them."""
    workspace, random = workspace_with_versions.workspace, np.random.default_rng(0)
    versions = [1, 2] * 10
    users = np.repeat(random.choice(entity_ids("user", 200), len(versions)), CANDIDATES)
    items = random.choice(np.append(entity_ids("item", 200), -9), len(users))
    matrix = context_matrix(
        CONTEXT_FEATURES, context.columns(CONTEXT_FEATURES, users=users, items=items), np.full(len(users), NOW)
    )
    by_version = {number: OfflineVersion(workspace, number) for number in (1, 2)}
    scores = {number: version.scores(users, items, matrix) for number, version in by_version.items()}
    pair_version = np.repeat(versions, CANDIDATES)
    return Answers(
        request=np.repeat(np.arange(len(versions)), CANDIDATES), users=users, items=items,
        now_seconds=np.full(len(users), NOW),
        scores=np.where((pair_version == 1)[:, None], scores[1], scores[2]),
        version=np.array(versions), manifest_sha256=[by_version[number].sha256 for number in versions],
    )


def test_right_answers_pass_and_are_distinguishable(workspace_with_versions, context, answers) -> None:
    verdict = verify(workspace_with_versions.workspace, answers, context)
    assert (verdict.checked, verdict.mixed_version, verdict.distinguishable) == (20, 0, 20)
    assert verdict.max_difference <= 1e-5


@pytest.mark.parametrize("table", DIMS)
def test_offline_rows_are_what_was_quantized(workspace_with_versions, table) -> None:
    offline = OfflineVersion(workspace_with_versions.workspace, 2)
    spec, ids = offline.manifest.table(table), entity_ids(table.partition(".")[0], 200)
    rows, truth = offline.rows(spec, ids[::-1]), float_rows(table, 200, seed=2)[::-1]
    step = (truth.max(axis=1) - truth.min(axis=1)) / 15  # of four bits
    assert (np.abs(rows - truth) <= 0.55 * step[:, None]).all()
    strangers = offline.rows(spec, np.array([-1, -2]))
    assert (strangers[0] == strangers[1]).all() and not (rows == strangers[0]).all(axis=1).any()


def test_answers_of_a_real_ranker_are_right(workspace_with_versions, context, host_cpu_tier, host_ranker) -> None:
    """Which looks rows up in segments and scores them by other code; each version answers once."""
    workspace, items = workspace_with_versions.workspace, np.append(entity_ids("item", 200)[:4], -9)
    tier = host_cpu_tier(workspace, (1, 2))
    ranker = host_ranker(workspace_with_versions, [tier.address], (1, 2), timeout_s=PATIENCE_S)
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    user, answered = int(entity_ids("user", 200)[3]), []
    for version in (1, 2):
        tier.state.promote(version)
        answered.append(client.rank(user, items, now_seconds=NOW))
    client.close()
    pairs = 2 * len(items)
    verdict = verify(workspace, Answers(
        request=np.repeat([0, 1], len(items)), users=np.full(pairs, user), items=np.tile(items, 2),
        now_seconds=np.full(pairs, NOW), scores=np.concatenate([answer.scores for answer in answered]),
        version=np.array([1, 2]), manifest_sha256=[answer.manifest_sha256 for answer in answered],
    ), context)
    assert [answer.version for answer in answered] == [1, 2]
    assert (verdict.checked, verdict.mixed_version, verdict.distinguishable) == (2, 0, 2)


def test_an_answer_of_the_other_version_is_counted(workspace_with_versions, context, answers) -> None:
    swapped = answers.version.copy()
    swapped[:3] = 3 - swapped[:3]
    shas = list(answers.manifest_sha256)
    shas[0], shas[1], shas[2] = shas[1], shas[0], shas[1]
    mixed = dataclasses.replace(answers, version=swapped, manifest_sha256=shas)
    assert verify(workspace_with_versions.workspace, mixed, context).mixed_version == 3


def test_one_wrong_score_or_manifest_or_nan_is_counted(workspace_with_versions, context, answers) -> None:
    scores = answers.scores.copy()
    scores[0, 1] += 0.01  # request 0
    scores[-1, 0] = np.nan  # request 19
    shas = ["0" * 64 if number == 7 else sha for number, sha in enumerate(answers.manifest_sha256)]
    wrong = dataclasses.replace(answers, scores=scores, manifest_sha256=shas)
    verdict = verify(workspace_with_versions.workspace, wrong, context)
    assert (verdict.mixed_version, verdict.wrong_scores) == (3, 2)


def test_another_moment_is_counted(workspace_with_versions, context, answers) -> None:
    later = dataclasses.replace(answers, now_seconds=answers.now_seconds + 400 * 86_400)
    assert verify(workspace_with_versions.workspace, later, context).mixed_version > 0


def test_without_another_version_nothing_tells_answers_apart(workspace_with_versions, context, answers) -> None:
    """A wrong score of the version that is named says nothing of what a mix would have looked like."""
    first = answers.request == 0  # of version 1
    scores = answers.scores[first].copy()
    scores[0, 0] += 0.01
    alone = Answers(
        request=answers.request[first], users=answers.users[first], items=answers.items[first],
        now_seconds=answers.now_seconds[first], scores=scores, version=answers.version[:1],
        manifest_sha256=answers.manifest_sha256[:1],
    )
    verdict = verify(workspace_with_versions.workspace, alone, context)
    assert (verdict.checked, verdict.wrong_scores, verdict.distinguishable) == (1, 1, 0)
