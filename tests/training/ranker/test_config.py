"""The ranker's section of the configuration."""

import pytest

from pipelines.contracts.errors import InvalidConfig
from training.config import load_section
from training.ranker.config import RankerConfig


def test_the_defaults_are_complete_and_valid():
    config = load_section("ranker", RankerConfig)
    assert config.epochs >= 1 and not config.freeze
    assert config.to_dict()["hidden"] == list(config.hidden)


@pytest.mark.parametrize(
    ("line", "key"),
    [("epochs: 0", "epochs"), ("id_dropout: 1.0", "id_dropout"), ("row_dropout: -0.1", "row_dropout"),
     ("table_learning_rate: -1", "table_learning_rate"), ("init_std: 0", "init_std"), ("hidden: [8, 0]", "hidden"),
     ("task_weights: {click: -1}", "task_weights"), ("batch_rows: 2.5", "batch_rows"),
     ("learning_rate: 1", "learning_rate")],
)
def test_bad_values_are_refused_by_name(tmp_path, line, key):
    path = tmp_path / "config.yaml"
    path.write_text(f"ranker: {{{line}}}")
    with pytest.raises(InvalidConfig, match=key):
        load_section("ranker", RankerConfig, path)
