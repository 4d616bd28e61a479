"""The stock `feast` console script, from the shell, in a copy of `feature_repo/`; the demo's test lists views by it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.publish import publish
from tests.releases import DIMS, FeastRepository, entity_ids, published_rows, write_context_views, write_release
from tests.waiting import PROGRAM_S

FEAST = Path(sys.executable).with_name("feast")


def feast(repository: FeastRepository, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FEAST, *args], cwd=repository.path, capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )


@pytest.mark.slow
def test_apply_materialize_and_a_corrupted_version(tmp_path: Path) -> None:
    repository = FeastRepository.create(tmp_path)
    workspace = repository.workspace
    publish(workspace, write_release(tmp_path / "first", seed=1, rows=1_500))
    write_context_views(workspace, entity_ids("user", 50), entity_ids("item", 50))

    applied = feast(repository, "apply")
    assert applied.returncode == 0, applied.stderr
    materialized = feast(repository, "materialize", "2010-01-01T00:00:00", "2030-01-01T00:00:00")
    assert materialized.returncode == 0, materialized.stderr

    store, rng = repository.store(), np.random.default_rng(0)
    for table in DIMS:
        ids, rows = published_rows(workspace, 1, table)
        truth = {int(key): row.tobytes() for key, row in zip(ids, rows, strict=True)}
        strangers = [key for key in rng.integers(0, 2**62, 200).tolist() if key not in truth]
        asked = rng.permutation([*rng.choice(ids, 1_000 - len(strangers)), *strangers]).tolist()
        entity, reference = table.partition(".")[0], f"{table.replace('.', '_')}__v1:row"
        answer = store.get_online_features(features=[reference], entity_rows={entity: asked})
        assert len(asked) == 1_000 and answer.to_dict()["row"] == [truth.get(key) for key in asked]
        result = answer.proto.results[list(answer.proto.metadata.feature_names.val).index("row")]
        status = type(result).DESCRIPTOR.fields_by_name["statuses"].enum_type.values_by_name
        expected = [status["PRESENT" if key in truth else "NOT_FOUND"].number for key in asked]
        assert list(result.statuses) == expected

    publish(workspace, write_release(tmp_path / "second", seed=2), parents=(1,))
    repository.apply()
    table = workspace.versions.path(2) / "tables" / "item.kge.parquet"
    shutil.copyfile(workspace.versions.path(1) / "tables" / "item.kge.parquet", table)
    refused = feast(repository, "materialize", "-v", "item_kge__v2", "2010-01-01T00:00:00", "2030-01-01T00:00:00")
    assert refused.returncode != 0 and "versions/2/tables/item.kge.parquet is corrupted" in refused.stderr
    ids, rows = published_rows(workspace, 1, "item.kge")
    known = {"item": ids[:9].tolist()}
    answer = repository.store().get_online_features(features=["item_kge__v1:row"], entity_rows=known)
    assert answer.to_dict()["row"] == [row.tobytes() for row in rows[:9]]
