import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import ids
from pipelines.contracts.errors import InvalidEvents

GOLDEN = [3141760557156334012, 3797230976420062948, 3976460501203677525]


def test_a_golden_id() -> None:
    """Published rows are found by these numbers: they may never change."""
    assert [ids.id_of(name) for name in ("85123A", "", "ü")] == GOLDEN


@given(st.lists(st.text(max_size=5), max_size=30))
def test_text_is_hashed_name_by_name(names: list[str]) -> None:
    expected = [ids.id_of(name) for name in names]
    for column in (pa.array(names, pa.string()), pa.array(names, pa.large_string())):
        assert ids.as_ids(column).tolist() == expected
    assert all(0 <= value < 2**63 for value in expected)


def test_chunks_of_text() -> None:
    column = pa.chunked_array([["a", "b"], ["b", "c"]])
    assert ids.as_ids(column).tolist() == [ids.id_of(name) for name in "abbc"]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.uint32()])
def test_integers_stay_what_they_are(kind: pa.DataType) -> None:
    values = ids.as_ids(pa.chunked_array([pa.array([3, 1, 3], kind)]))
    assert values.dtype == np.int64 and values.tolist() == [3, 1, 3]


@pytest.mark.parametrize("column", [pa.array([1.5]), pa.array([True]), pa.array([b"x"])])
def test_other_types_are_refused(column: pa.Array) -> None:
    with pytest.raises(InvalidEvents, match=str(column.type)):
        ids.as_ids(column)


def test_a_collision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "id_of", len)
    with pytest.raises(InvalidEvents, match="collision"):
        ids.as_ids(pa.array(["ab", "cd"]))


def test_a_batch_is_the_callers_array_which_stays_as_it_is() -> None:
    given = np.array([1, 2])
    batch = ids.batch_of(given)
    assert np.shares_memory(batch, given) and given.flags.writeable and not batch.flags.writeable
    assert np.array_equal(ids.batch_of(given[::-1]), [2, 1])
