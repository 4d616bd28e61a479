"""Fixtures for every room.

`workspace_with_versions` (one per session, do not change it) is a `tests.releases.FeastRepository` with versions 1 and
2 published, applied and materialized, and context views. It gives

    repository.workspace        pipelines.contracts.workspace.Workspace of its var/
    repository.path             its feature_repo/
    repository.store()          a feast.FeatureStore over it

Every synthetic table of an entity has the ids `tests.releases.entity_ids(entity, 200)`; `published_rows` gives what a
reader must answer. `own_workspace` is a copy of it that a test may break.
"""

import shutil
from datetime import timedelta
from pathlib import Path

import hypothesis
import pytest

from pipelines.contracts.quick_import import import_typeguard_optimized
from tests.releases import AS_OF, FeastRepository, entity_ids, write_context_views, write_release

import_typeguard_optimized()  # as `facet` does; its pytest plugin, which imports it before, is off in pyproject.toml

# machines are shared and kernels compile at their first call: no test asserts a time
hypothesis.settings.register_profile("facet", deadline=None)
hypothesis.settings.load_profile("facet")


@pytest.fixture(scope="session")
def workspace_with_versions(tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    from pipelines.publish import publish

    root = tmp_path_factory.mktemp("published")
    repository = FeastRepository.create(root)
    for version in (1, 2):
        as_of = AS_OF + timedelta(days=30 * (version - 1))
        release = write_release(root / f"release{version}", seed=version, as_of=as_of)
        publish(repository.workspace, release, parents=() if version == 1 else (1,))
    write_context_views(repository.workspace, entity_ids("user", 200), entity_ids("item", 200))
    repository.apply()
    repository.materialize()
    return repository


@pytest.fixture
def own_workspace(workspace_with_versions: FeastRepository, tmp_path: Path) -> FeastRepository:
    """A copy of `workspace_with_versions`, applied anew so that its registry names its own files."""
    root = tmp_path / "own"
    shutil.copytree(workspace_with_versions.root, root)
    repository = FeastRepository(root)
    repository.apply()
    return repository
