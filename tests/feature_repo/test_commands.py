"""`feast materialize` from the shell where a file is corrupted; the demo's test sees the stock script do its work."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipelines.publish import publish
from tests.feast_command import FEAST
from tests.releases import FeastRepository, published_rows, write_release
from tests.waiting import PROGRAM_S


@pytest.mark.slow
def test_a_corrupted_version_is_refused_and_the_others_answer_on(own_workspace: FeastRepository, tmp_path) -> None:
    workspace = own_workspace.workspace
    publish(workspace, write_release(tmp_path / "third", seed=3), parents=(2,))
    own_workspace.apply()
    table = workspace.versions.path(3) / "tables" / "item.kge.parquet"
    shutil.copyfile(workspace.versions.path(1) / "tables" / "item.kge.parquet", table)
    refused = subprocess.run(
        [*FEAST, "materialize", "-v", "item_kge__v3", "2010-01-01T00:00:00", "2030-01-01T00:00:00"],
        cwd=own_workspace.path, capture_output=True, text=True, timeout=PROGRAM_S, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert refused.returncode == 1
    assert "versions/3/tables/item.kge.parquet is corrupted" in refused.stderr.splitlines()[-1]
    store = own_workspace.store()
    for version in (1, 2):
        ids, rows = published_rows(workspace, version, "item.kge")
        known = np.random.default_rng(0).permutation(len(ids))[:50]
        answer = store.get_online_features(
            features=[f"item_kge__v{version}:row"], entity_rows={"item": ids[known].tolist()}
        )
        assert answer.to_dict()["row"] == [row.tobytes() for row in rows[known]]
