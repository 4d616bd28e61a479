"""YAML that we read: each key once, and errors that name the place but no secret."""

from pathlib import Path

import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.row_store import configured_rows
from pipelines.contracts.strict import read_yaml
from pipelines.contracts.workspace import Workspace


def written(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a"),
        ("a: 1\n'a': 1", 2, "a"),
        ("a: {b: {c: 1,\n  c: 2}}", 2, "c"),
        ("a:\n- {b: 1}\n- b: 1\n  b: 1", 4, "b"),
        ("1: a\n'1': b", 2, "1"),  # both become the text 1
        ("0x1: a\n1: b", 2, "1"),
        ("true: a\nyes: b", 2, "True"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x", 4, "<<"),
        ("a: 1\n? a", 2, "a"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, line, key) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidConfig) as refused:
        read_yaml(path)
    assert refused.value.problem == f"{path}, line {line}" and refused.value.got == f"{key!r} again"
    with pytest.raises(InvalidConfig) as refused:
        read_yaml(path, secret=True)
    assert refused.value.problem == f"{path}, line {line}" and refused.value.got == "a key again"


def test_a_key_may_stand_in_several_mappings_and_override_what_a_merge_brings(tmp_path) -> None:
    text = (
        "base: &b {x: 1, y: 1}\nfirst: {deep: &m {<<: *b, x: 2}}\nsecond: {<<: *m, y: 3}\n=: 1\n"
        "list: [{x: 1}, {x: 2}]"
    )
    assert read_yaml(written(tmp_path, text)) == {
        "base": {"x": 1, "y": 1}, "first": {"deep": {"x": 2, "y": 1}}, "second": {"x": 2, "y": 3}, "=": 1,
        "list": [{"x": 1}, {"x": 2}],
    }


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        (b"a: 2021-13-45", "month must be in 1..12"),
        (b"a: !!int secret-word", "secret-word"),
        (b"a: \xff", "0xff"),
        (b"[" * 100_000, "recursion"),
        (b"? [a]\n: 1", "unhashable"),
        (b"a: !!python/name:os.system", "python/name"),
        (b"a: 1\n---\nb: 2", "single document"),
    ],
)
def test_whatever_is_no_yaml_is_refused_as_such(tmp_path, raw, got) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(raw)
    with pytest.raises(InvalidConfig, match="cannot be read") as refused:
        read_yaml(path)
    assert got in refused.value.got
    with pytest.raises(InvalidConfig, match="cannot be read") as refused:
        read_yaml(path, secret=True)
    assert refused.value.got == "something else" and refused.value.__cause__ is None


def test_a_feature_store_with_two_online_stores_is_refused(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    workspace.feature_repo.mkdir(parents=True)
    path = workspace.feature_repo / "feature_store.yaml"
    path.write_text("online_store: {rows: segments}\nonline_store: {rows: redis://localhost}\n")
    with pytest.raises(InvalidConfig, match=r"feature_store.yaml, line 2.*'online_store' again"):
        configured_rows(workspace)
