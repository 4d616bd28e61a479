"""What every way from ids to rows must do. Each implementation inherits the cases and says how it is asked."""

from abc import ABC, abstractmethod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.releases import DIMS, FeastRepository, entity_ids, published_rows

__all__ = ["RowReaderCases"]

VERSIONS = (1, 2)
EXTREMES = [-(2**63), -1, 2**62 + 1, 2**63 - 1]


class RowReaderCases(ABC):
    """Cases over `workspace_with_versions`; `read` is the implementation."""

    errors: tuple[type[Exception], ...]
    """What asking for a version or table that is not there raises."""

    @pytest.fixture(autouse=True)
    def _repository(self, workspace_with_versions: FeastRepository) -> None:
        self.repository = workspace_with_versions
        self.prepare(workspace_with_versions)

    @abstractmethod
    def prepare(self, repository: FeastRepository) -> None:
        """Called before each case; opens the reader."""

    @abstractmethod
    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        """The packed row of each id, in order; None for an id without one."""

    def truth(self, version: int, table: str) -> dict[int, bytes]:
        ids, rows = published_rows(self.repository.workspace, version, table)
        return {int(key): row.tobytes() for key, row in zip(ids, rows, strict=True)}

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("table", DIMS)
    def test_every_published_row_comes_back_byte_for_byte(self, version: int, table: str) -> None:
        truth = self.truth(version, table)
        assert self.read(version, table, list(truth)) == list(truth.values())

    @pytest.mark.parametrize("table", DIMS)
    def test_versions_answer_with_their_own_rows(self, table: str) -> None:
        ids = entity_ids(table.partition(".")[0], 200)[:20].tolist()
        first, second = (self.read(version, table, ids) for version in VERSIONS)
        assert all(a is not None and b is not None and a != b for a, b in zip(first, second, strict=True))

    def test_unknown_ids_have_no_row(self) -> None:
        known = int(entity_ids("item", 200)[0])
        answer = self.read(1, "item.kge", [*EXTREMES, known])
        assert answer[:-1] == [None] * len(EXTREMES) and answer[-1] == self.truth(1, "item.kge")[known]

    def test_a_batch_of_one(self) -> None:
        for key, row in list(self.truth(2, "user.contrastive").items())[:3]:
            assert self.read(2, "user.contrastive", [key]) == [row]

    # one test, inherited: hypothesis would otherwise warn that two classes run it
    @settings(
        max_examples=20, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(st.data())
    def test_order_repeats_and_strangers_are_kept_apart(self, data: st.DataObject) -> None:
        truth = self.truth(1, "user.kge")
        ids = data.draw(st.lists(st.sampled_from([*truth, *EXTREMES, 3, 5]), min_size=1, max_size=40))
        assert self.read(1, "user.kge", ids) == [truth.get(key) for key in ids]

    def test_a_version_that_is_not_there_is_an_error_not_an_answer(self) -> None:
        with pytest.raises(self.errors, match="99"):
            self.read(99, "item.kge", [1])

    def test_a_table_that_is_not_there_is_an_error_not_an_answer(self) -> None:
        with pytest.raises(self.errors, match=r"pin.kge|pin_kge"):
            self.read(1, "pin.kge", [1])


def rows_or_none(rows: np.ndarray, found: np.ndarray) -> list[bytes | None]:
    """uint8 (B, row_bytes) and bool (B,) as a list."""
    return [row.tobytes() if known else None for row, known in zip(rows, found, strict=True)]
