import pytest

from pipelines.contracts.names import sha256_name, table_name, version_number

OUTSIDE = ["", "..", "../../versions", "/etc", "a/b", "7/..", "7\n", " 7", "7\0"]


@pytest.mark.parametrize("text", ["1", "7", "10", "9" * 18])
def test_version_numbers(text: str) -> None:
    assert str(version_number(text)) == text


@pytest.mark.parametrize("text", [*OUTSIDE, "0", "07", "-7", "+7", "7.0", "1_0", "²", "٧", "７", "9" * 19, 7, None])
def test_what_is_no_version_number(text: str) -> None:
    with pytest.raises(ValueError, match="expected a version number"):
        version_number(text)


@pytest.mark.parametrize("text", ["item.kge", "a_1.b2", "_a._b", "i" * 64 + "." + "k" * 64])
def test_table_names(text: str) -> None:
    assert table_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *OUTSIDE, "item", ".kge", "item.", "item.kge.x", "1item.kge", "item.1", "ítem.kge", "item/.kge", "item.kge\n",
        "i" * 65 + ".k", "..", ".", None,
    ],
)
def test_what_is_no_table_name(text: str) -> None:
    with pytest.raises(ValueError, match="expected a table name"):
        table_name(text)


def test_hashes() -> None:
    assert sha256_name("0123456789abcdef" * 4) == "0123456789abcdef" * 4
    for text in ("", "ab" * 31, "ab" * 33, "AB" * 32, "ag" * 32, "ab" * 32 + "\n", None):
        with pytest.raises(ValueError, match="expected a SHA-256"):
            sha256_name(text)
