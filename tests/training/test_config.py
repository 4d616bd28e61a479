from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.contracts.errors import InvalidConfig
from training.config import load_section
from training.contrastive import ContrastiveConfig
from training.kge.train import KgeConfig
from training.tables import TableOptions

SECTIONS = [("tables", TableOptions), ("contrastive", ContrastiveConfig), ("kge", KgeConfig)]


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_the_defaults_are_complete_and_valid(name: str, section: type) -> None:
    assert isinstance(load_section(name, section), section)


def test_a_file_overrides_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    changed = load_section("contrastive", ContrastiveConfig, written(tmp_path, "contrastive: {dim: 8, margin: 1}"))
    assert changed == replace(load_section("contrastive", ContrastiveConfig), dim=8, margin=1.0)
    assert load_section("tables", TableOptions, tmp_path / "my.yaml") == load_section("tables", TableOptions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contrastive: {dims: 8}", "dims"),
        ("contrastve: {dim: 8}", "contrastve"),
        ("contrastive: {dim: eight}", "contrastive.dim"),
        ("contrastive: {dim: 8.5}", "contrastive.dim"),
        ("contrastive: {logq: 1}", "contrastive.logq"),
        ("contrastive: {dim: 0}", "contrastive.dim"),
        ("contrastive: {dim: -4}", "contrastive.dim"),
        ("contrastive: {temperature: 0.0}", "contrastive.temperature"),
        ("contrastive: {temperature: .nan}", "contrastive.temperature"),
        ("contrastive: {table_learning_rate: .inf}", "contrastive.table_learning_rate"),
        ("contrastive: {holdout_days: -1}", "contrastive.holdout_days"),
        ("contrastive: {loss: hinge}", "sampled_softmax"),
        ("contrastive: {export: unit}", "unit_rows"),
        ("contrastive: {group_rows: 1, uniform_negatives: 0}", "negatives"),
        ("contrastive: 3", "section 'contrastive'"),
        ("- contrastive", "a mapping of keys to values"),
        ("contrastive: {dim: ", "a YAML file"),
        ("contrastive: {dim: 8, dim: 16}", "line 1.*'dim' again"),
        ("contrastive: {dim: 8}\ncontrastive: {margin: 1}", "line 2.*'contrastive' again"),
    ],
)
def test_a_bad_contrastive_section_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load_section("contrastive", ContrastiveConfig, written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kge: {scorer: distmult}", "transra"), ("kge: {loss: nll}", "logistic"), ("kge: {dim: 0}", "kge.dim"),
        ("kge: {rank: 0}", "kge.rank"), ("kge: {group_edges: 1, uniform_negatives: 0}", "negatives"),
        ("kge: {boost: [1]}", "kge.boost"), ("kge: {export: none}", "kge.export"),
    ],
)
def test_a_bad_kge_section_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load_section("kge", KgeConfig, written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="a YAML file"):
        load_section("kge", KgeConfig, tmp_path / "none.yaml")
