"""Ids that a caller of `get_online_features` may send; over HTTP in tests/feature_repo/test_feature_server.py."""

import asyncio
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from feast import FeatureService

from online.feast_request import RequestRefused
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows

ITEM = int(entity_ids("item", 200)[3])
VIEWS = {"item_kge__v1:row": "row", "item_context:events_7d": "events_7d"}


def known(repository: FeastRepository, reference: str) -> Any:
    return published_rows(repository.workspace, 1, "item.kge")[1][3].tobytes() if reference.endswith("row") else 13.0


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("reference", VIEWS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (ITEM + 0.9, f"{ITEM + 0.9!r}"),
        (float(ITEM), f"{float(ITEM)!r}"),
        (-0.0, "-0.0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "True"),
        (None, "null"),
        (2**63, "9223372036854775808"),
        (-(2**63) - 1, "-9223372036854775809"),
        ("9223372036854775808", "'9223372036854775808'"),
        ("abc", "'abc'"),
        ("", "''"),
        ("7.9", "'7.9'"),
        (" 7", "' 7'"),
        ("-0", "'-0'"),
        ("1_0", "'1_0'"),
        ("\u0667", "'\u0667'"),
        ([7], r"\[7\]"),
        (b"7", "b'7'"),
        (pd.Timestamp(AS_OF), "Timestamp"),
        (np.float32(7.5), "7.5"),
        (np.bool_(True), "True"),
    ],
    ids=repr,
)
def test_what_is_no_64_bit_integer_is_refused(
    workspace_with_versions: FeastRepository, awaited: bool, reference: str, value: Any, said: str
) -> None:
    store = workspace_with_versions.store()
    request = {"features": [reference], "entity_rows": {"item": [ITEM, value]}}
    reason = f"ids of item: expected ids that are 64-bit integers, got .*{said}.* at row 1"
    with pytest.raises(RequestRefused, match=reason) as refused:
        asyncio.run(store.get_online_features_async(**request)) if awaited else store.get_online_features(**request)
    assert refused.value.http_status_code() == 422


@pytest.mark.parametrize("reference", VIEWS)
@pytest.mark.parametrize("value", [ITEM, np.int64(ITEM), str(ITEM)], ids=lambda value: type(value).__name__)
def test_an_integer_is_an_id_however_it_is_written(
    workspace_with_versions: FeastRepository, reference: str, value: Any
) -> None:
    store = workspace_with_versions.store()
    for rows in ({"item": [value]}, [{"item": value}]):
        answer = store.get_online_features(features=[reference], entity_rows=rows)
        assert answer.to_dict()[VIEWS[reference]] == [known(workspace_with_versions, reference)]


@pytest.mark.parametrize("reference", VIEWS)
def test_the_least_and_the_greatest_id_are_ids(workspace_with_versions: FeastRepository, reference: str) -> None:
    ids = [2**63 - 1, -(2**63), str(2**63 - 1), str(-(2**63))]
    answer = workspace_with_versions.store().get_online_features(features=[reference], entity_rows={"item": ids})
    assert answer.to_dict() == {"item": [int(each) for each in ids], VIEWS[reference]: [None] * 4}


def test_ids_under_an_alias_are_looked_at_too(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    view = store.get_feature_view("item_context").with_name("seen").with_join_key_map({"item": "seen_item"})
    service = FeatureService(name="seen", features=[view[["events_7d"]]])
    store.apply([service])
    with pytest.raises(RequestRefused, match=r"ids of seen_item.*7\.9 at row 0"):
        store.get_online_features(features=service, entity_rows={"seen_item": [7.9]})
    answer = store.get_online_features(features=service, entity_rows={"seen_item": [ITEM]})
    assert answer.to_dict()["events_7d"] == [13.0]


def test_what_is_no_id_is_not_looked_at(workspace_with_versions: FeastRepository) -> None:
    """A request may carry other columns, which Feast leaves alone."""
    answer = workspace_with_versions.store().get_online_features(
        features=["item_context:events_7d"], entity_rows={"item": [ITEM], "weight": [7.9]}
    )
    assert answer.to_dict()["events_7d"] == [13.0]
