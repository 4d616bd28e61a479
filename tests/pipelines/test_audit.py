import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.audit import WAYS, audit
from pipelines.cli import facet
from pipelines.contracts.durable import sha256_of
from pipelines.contracts.errors import IntegrityError, NotPrepared, VersionNotFound
from pipelines.publish import publish
from tests.releases import FeastRepository, write_candidate


def forge(segment: Path, row: int) -> None:
    """Change one row of a segment and make its own header agree: only a comparison with the version can tell."""
    rows = np.load(segment / "rows.npy")
    before = sha256_of(segment / "rows.npy")
    rows[row, 0] ^= 1
    np.save(segment / "rows.npy", rows)
    header = (segment / "segment.json").read_text()
    (segment / "segment.json").write_text(header.replace(before, sha256_of(segment / "rows.npy")))


@pytest.mark.parametrize("version", [1, 2])
def test_every_way_gives_the_published_bytes(own_workspace: FeastRepository, version: int) -> None:
    report = audit(own_workspace.workspace, version)
    assert (report["rows_checked"], report["rows_different"]) == (800, 0)
    for table in report["tables"].values():
        assert set(table["sha256"]) == {"published", *WAYS} and len(set(table["sha256"].values())) == 1
    assert json.loads((own_workspace.workspace.root / "audit" / f"{version}.json").read_text()) == report


def test_one_wrong_row_is_found_and_named(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    forge(workspace.segment(1, "item.kge"), 123)
    report = audit(workspace, 1)
    table = report["tables"]["item.kge"]
    wrong = [int(np.load(workspace.segment(1, "item.kge") / "ids.npy")[123])]
    assert (report["rows_checked"], report["rows_different"]) == (800, 1)
    assert table["first_different"] == {"segment": wrong, "lookup": wrong, "online": wrong}
    assert table["sha256"]["offline"] == table["sha256"]["published"] != table["sha256"]["online"]
    result = CliRunner().invoke(facet, ["--workspace", str(workspace.root), "audit", "--version", "1"])
    assert result.exit_code == 1
    assert "800 rows checked, 1 different" in result.output and "not served as it was published" in result.output


def test_an_id_that_a_segment_lacks_counts_as_different(own_workspace: FeastRepository) -> None:
    segment = own_workspace.workspace.segment(1, "item.kge")
    ids, before = np.load(segment / "ids.npy"), sha256_of(segment / "ids.npy")
    missing = int(ids[-1])
    ids[-1] += 1
    np.save(segment / "ids.npy", ids)
    header = (segment / "segment.json").read_text()
    (segment / "segment.json").write_text(header.replace(before, sha256_of(segment / "ids.npy")))
    table = audit(own_workspace.workspace, 1)["tables"]["item.kge"]
    assert table["rows_different"] == 1
    assert table["first_different"] == {way: [missing] for way in ("segment", "lookup", "online")}


def test_a_sample(own_workspace: FeastRepository) -> None:
    report = audit(own_workspace.workspace, 2, sample=30)
    assert (report["rows_checked"], report["rows_different"], report["sample"]) == (120, 0, 30)
    result = CliRunner().invoke(
        facet, ["--workspace", str(own_workspace.workspace.root), "audit", "--version", "2", "--sample", "30"]
    )
    assert result.exit_code == 0 and "120 rows checked, 0 different" in result.output


def test_an_unknown_version(own_workspace: FeastRepository) -> None:
    with pytest.raises(VersionNotFound, match="version 9"):
        audit(own_workspace.workspace, 9)


def test_a_corrupted_version_file(own_workspace: FeastRepository) -> None:
    with (own_workspace.workspace.versions.path(1) / "upper" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"versions/1/upper/config\.json"):
        audit(own_workspace.workspace, 1)


def test_a_version_that_is_not_applied(own_workspace: FeastRepository, tmp_path: Path) -> None:
    publish(own_workspace.workspace, write_candidate(tmp_path / "third", seed=3))
    with pytest.raises((NotPrepared, VersionNotFound), match=r"feast"):
        audit(own_workspace.workspace, 3)
