"""Context from Feast's online store."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from online.context_source import FeastContext
from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import NotPrepared
from tests.releases import AS_OF


def test_columns_are_the_views_latest_rows_and_nan_where_there_is_none(workspace_with_versions) -> None:
    workspace = workspace_with_versions.workspace
    context = FeastContext(workspace.feature_repo, CONTEXT_FEATURES)
    pairs = pq.read_table(workspace.views / "user_item_context.parquet").to_pandas()
    latest = pairs[pairs.event_timestamp == AS_OF].reset_index(drop=True)
    users, items = latest.user.to_numpy()[[4, 9, 4]], latest.item.to_numpy()[[4, 4, 9]]
    users[2] = -5
    got = context.columns(CONTEXT_FEATURES, users=users, items=items)
    assert set(got) == {feature.key for feature in CONTEXT_FEATURES}
    assert all(column.dtype == np.float64 and column.shape == (3,) for column in got.values())
    np.testing.assert_array_equal(got["user_item_context__events"], [latest.events[4], np.nan, np.nan])
    for view, key, asked in (("user_context", "user", users), ("item_context", "item", items)):
        table = pq.read_table(workspace.views / f"{view}.parquet").to_pandas()
        table = table[table.event_timestamp == AS_OF].set_index(key)
        for feature in CONTEXT_FEATURES:
            if feature.view == view:
                np.testing.assert_array_equal(got[feature.key], table[feature.column].reindex(asked).to_numpy())


def test_without_views_it_says_what_to_run(tmp_path) -> None:
    with pytest.raises(NotPrepared, match="feast apply"):
        FeastContext(tmp_path, CONTEXT_FEATURES)
