import click
import pytest

from pipelines import cli
from pipelines.contracts import errors

KINDS = [getattr(errors, name) for name in errors.__all__ if name != "FacetError"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_was_expected_what_came_and_what_to_do(kind: type[errors.FacetError]) -> None:
    error = kind("column 'user'", expected="integers", got="text", remedy="Cast it.")
    assert str(error) == "column 'user': expected integers, got text. Cast it."
    assert isinstance(error, errors.FacetError) and (error.expected, error.remedy) == ("integers", "Cast it.")


@pytest.mark.parametrize("missing", ["expected", "got", "remedy"])
def test_no_part_may_be_left_out(missing: str) -> None:
    parts = {"expected": "a", "got": "b", "remedy": "c"}
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        errors.InvalidConfig("problem", **parts)


def test_the_command_line_prints_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def refuse() -> None:
        raise errors.NotPrepared("it", expected="a", got="b", remedy="Do c.")

    monkeypatch.setattr(cli, "facet", refuse)
    assert cli.run([]) == 2
    assert capsys.readouterr().err.strip() == "error: it: expected a, got b. Do c."
