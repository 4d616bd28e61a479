from dataclasses import replace

import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.spec import MAX_DIM, MAX_ROWS, TableSpec

SPEC = TableSpec("item.kge", 8, 2, "int4", "vocabulary", "00" * 8)


def test_a_spec_is_read_back() -> None:
    assert TableSpec.from_dict(SPEC.to_dict(), where="here") == SPEC
    assert TableSpec("item.kge", MAX_DIM, MAX_ROWS, "fp16", "vocabulary", "ab" * 2 * MAX_DIM).row_bytes == 2 * MAX_DIM


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x.y"}, {"name": "item"}, {"name": "ítem.kge"}, {"dim": 0}, {"dim": MAX_DIM + 1}, {"dim": 8.0},
        {"dim": True}, {"dim": "8"}, {"rows": -1}, {"rows": MAX_ROWS + 1}, {"rows": None}, {"quantization": "int5"},
        {"id_rule": "other"}, {"default_row": "00" * 7}, {"default_row": "0g" * 8}, {"default_row": "00 " * 8},
        {"default_row": "AB" * 8}, {"default_row": 0}, {"buckets": 1}, {"buckets": -1}, {"hash_seed": -1},
        {"hash_seed": 2**63}, {"more": 1},
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(change: dict) -> None:
    with pytest.raises(InvalidConfig):
        TableSpec.from_dict({**SPEC.to_dict(), **change}, where="here")


@pytest.mark.parametrize("raw", [None, [], "item.kge", 5])
def test_what_is_no_spec_is_named(raw: object) -> None:
    with pytest.raises(InvalidConfig, match="here"):
        TableSpec.from_dict(raw, where="here")


def test_two_tables_are_alike_whatever_their_rows() -> None:
    assert SPEC.is_like(replace(SPEC, rows=5, default_row="ab" * 8))
    assert not SPEC.is_like(replace(SPEC, name="item.contrastive")) and not SPEC.is_like(replace(SPEC, hash_seed=1))
