from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError

TAGS = {"version": "7", "table": "item.kge", "manifest_sha256": "ab" * 32, "as_of": "2011-07-01T00:00:00+00:00"}


def test_tags_become_a_view() -> None:
    view = EmbeddingView.from_tags({**TAGS, "owner": "ads"})
    assert view == EmbeddingView(7, "item.kge", "ab" * 32, datetime(2011, 7, 1, tzinfo=UTC))


def test_an_ordinary_view_is_none() -> None:
    assert EmbeddingView.from_tags({"version": "7", "table": "../.."}) is None


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        *(("version", text) for text in ("", "../..", "/", "²", "07", "-1", "0", "1e3")),
        *(("table", text) for text in ("", "..", "../../versions", "/var/versions", "item", "item.kge/..", "x.y\n")),
        *(("manifest_sha256", text) for text in ("", "ab", "../..", "AB" * 32)),
        *(("as_of", text) for text in ("", "yesterday", "2011-07-01", "2011-07-01T00:00:00")),
    ],
)
def test_tags_that_name_something_else_are_refused(tag: str, text: str) -> None:
    with pytest.raises(IntegrityError, match=r"tags of an embedding view.*feast apply"):
        EmbeddingView.from_tags({**TAGS, tag: text})


@pytest.mark.parametrize("tag", ["version", "table", "as_of"])
def test_a_tag_that_is_missing(tag: str) -> None:
    with pytest.raises(IntegrityError, match=f"{tag}"):
        EmbeddingView.from_tags({name: text for name, text in TAGS.items() if name != tag})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"version": 0}, "version number"),
        ({"version": -1}, "version number"),
        ({"table": "../../versions"}, "table name"),
        ({"manifest_sha256": "../.."}, "SHA-256"),
        ({"as_of": datetime(2011, 7, 1)}, "a time with its zone"),
    ],
)
def test_a_view_is_made_of_nothing_else(wrong: dict, message: str) -> None:
    """However it is made: not only of tags."""
    with pytest.raises(ValueError, match=message):
        replace(EmbeddingView(7, "item.kge", "ab" * 32, datetime(2011, 7, 1, tzinfo=UTC)), **wrong)
