"""YAML that we read: each key once, and errors that name the place but no secret."""

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.row_store import configured_rows
from pipelines.contracts.strict import build, read_yaml
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
        ("true: a\nTrue: b", 2, "True"),
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
    ("text", "value"),
    [
        *((word, word) for word in ("on", "off", "yes", "no", "On", "NO", "y", "n", "12:30", "12:30:45", "1:2.5", "=")),
        *((word, word) for word in ("007", "0x1F", "0o7", "0b1", "1_000", "+5", "-0", ".", "1e", "e5", "nan")),
        *((word, word) for word in ("tRUE", "2021-01-01 10:00:00", "2021-1-1", "null0", "<<<", "85123A")),
        ("true", True), ("TRUE", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("0", 0), ("-12", -12), ("9007199254740993", 9007199254740993),
        ("1.5", 1.5), ("1e-3", 1e-3), ("-.5", -0.5), ("+1.", 1.0), ("5E2", 500.0), ("-.inf", float("-inf")),
        ("2021-01-31", date(2021, 1, 31)), ("'1'", "1"), ("'true'", "true"), ("1 # a comment", 1),
    ],
)
def test_what_is_written_without_quotes(tmp_path, text, value) -> None:
    """As YAML 1.2 says, except that no number is another text's than its own."""
    read = read_yaml(written(tmp_path, f"a: {text}"))["a"]
    assert read == value and isinstance(read, type(value))


@dataclass(frozen=True)
class Section:
    words: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    size: int = 0
    share: float = 0.0


def test_a_whole_number_is_its_text_where_text_is_expected(tmp_path) -> None:
    raw = read_yaml(written(tmp_path, "words: [0, -7, on, 007]\nkinds: {0: 1, off: 2}\nsize: 3\nshare: 4"))
    section = build(Section, raw, where="here", manual="x.yaml")
    assert section == Section(("0", "-7", "on", "007"), {"0": "1", "off": "2"}, 3, 4.0)
    assert (type(section.size), type(section.share)) == (int, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words: [a, true]", r"here.words\[1\]: expected text, got True. Put it in quotes"),
        ("words: [1.0]", r"here.words\[0\]: expected text, got 1.0"),
        ("kinds: {true: a}", r"here.kinds: a key: expected text, got True"),
        ("kinds: {1.5: a}", r"here.kinds: a key: expected text, got 1.5"),
        ("kinds: {a: 2021-01-01}", r"here.kinds.a: expected text, got datetime.date"),
        ("size: 0x10", r"here.size: expected a whole number, got '0x10'"),
        ("size: true", r"here.size: expected a whole number, got True"),
        ("share: on", r"here.share: expected a number, got 'on'"),
        ("5: 1", r"here: unknown key: .* got \[5\]"),
    ],
)
def test_no_other_value_is_text(tmp_path, text, message) -> None:
    with pytest.raises(InvalidConfig, match=message):
        build(Section, read_yaml(written(tmp_path, text)), where="here", manual="x.yaml")


def test_in_json_a_number_is_no_text() -> None:
    for raw in ({"words": [0]}, {"kinds": {"a": 0}}):
        with pytest.raises(InvalidConfig, match="expected text, got 0"):
            build(Section, raw, where="here", manual="x.json")


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
