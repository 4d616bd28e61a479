"""Recomputing answers: right ones pass, every kind of wrong one is counted."""

import dataclasses

import numpy as np
import pytest

from online.ranking.context_source import FeastContext
from online.ranking.verify import Answers, OfflineVersion, verify
from pipelines.contracts.context import CONTEXT_FEATURES, context_matrix
from tests.releases import AS_OF, entity_ids

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
