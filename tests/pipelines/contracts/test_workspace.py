"""Where everything lies, and where nothing may lie."""

from pathlib import Path

import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.workspace import WILDCARDS, Workspace


@pytest.mark.parametrize("character", WILDCARDS)
def test_a_path_that_would_be_read_as_a_pattern_is_refused(tmp_path, monkeypatch, character) -> None:
    folder = tmp_path / f"a{character}1"
    folder.mkdir()
    (tmp_path / "linked").symlink_to(folder)
    for root in (folder, folder / "var", tmp_path / "linked" / "var"):
        with pytest.raises(InvalidConfig) as refused:
            Workspace(root)
        assert refused.value.got == character and str(folder) in refused.value.problem
    monkeypatch.chdir(folder)
    with pytest.raises(InvalidConfig):
        Workspace(Path("var"))


def test_other_paths_are_none(tmp_path) -> None:
    root = tmp_path / "größe, 100 % (neu) 'a' \"b\" $HOME ~ #1 x=1 day=2"
    assert Workspace(root).root == root
