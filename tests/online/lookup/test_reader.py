import numpy as np
import pytest

from online.lookup.reader import VersionReader
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.sealed import write_sealed
from tests.cases import RowReaderCases, rows_or_none
from tests.releases import FeastRepository


class TestVersionReader(RowReaderCases):
    errors = (VersionNotFound,)

    def prepare(self, repository: FeastRepository) -> None:
        self.readers: dict[int, VersionReader] = {}

    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        if version not in self.readers:
            self.readers[version] = VersionReader.open(self.repository.workspace, version)
        return rows_or_none(*self.readers[version].lookup(table, np.array(ids, np.int64)))


def test_an_unknown_id_gets_the_default_row(workspace_with_versions: FeastRepository) -> None:
    reader = VersionReader.open(workspace_with_versions.workspace, 1)
    rows, found = reader.lookup("item.kge", np.array([-1]))
    assert not found[0] and rows[0].tobytes() == reader.manifest.table("item.kge").default_row_bytes
    assert reader.version == 1 and list(reader.tables) == [spec.name for spec in reader.manifest.tables]


def test_an_empty_batch(workspace_with_versions: FeastRepository) -> None:
    rows, found = VersionReader.open(workspace_with_versions.workspace, 1).lookup("item.kge", np.empty(0, np.int64))
    assert rows.shape == (0, 10) and found.shape == (0,)


def test_a_version_that_is_not_materialized(own_workspace: FeastRepository) -> None:
    (own_workspace.workspace.segment(1, "user.kge") / "segment.json").unlink()
    with pytest.raises(VersionNotFound, match="feast materialize"):
        VersionReader.open(own_workspace.workspace, 1)
    VersionReader.open(own_workspace.workspace, 2)


@pytest.mark.parametrize("name", ["rows.npy", "parts.npy", "pilots.npy"])
def test_an_altered_segment_is_not_opened(own_workspace: FeastRepository, name: str) -> None:
    path = own_workspace.workspace.segment(1, "user.kge") / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        VersionReader.open(own_workspace.workspace, 1)


def test_a_segment_of_another_manifest_is_not_opened(own_workspace: FeastRepository) -> None:
    header = own_workspace.workspace.segment(1, "user.kge") / "segment.json"
    sha = own_workspace.workspace.versions.manifest(1).sha256
    write_sealed(header, header.read_text().replace(sha, "0" * 64))
    with pytest.raises(IntegrityError, match=sha):
        VersionReader.open(own_workspace.workspace, 1)
