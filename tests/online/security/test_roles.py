"""Who is known by what."""

import pytest

from online.security.roles import Identity, Roles, token_sha256
from pipelines.contracts.errors import InvalidConfig

# sha256("abc"), as FIPS 180-2 gives it
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_token_is_known_by_its_sha256() -> None:
    assert token_sha256("abc") == ABC
    roles = Roles({"a": Identity(("lookup",), token_sha256=ABC), "b": Identity(("rank",), token_sha256="0" * 64)})
    assert roles.of_token("abc") == "a"
    assert [roles.of_token(token) for token in ("", "ab", "abcd", "ABC", ABC, "\ud800")] == [None] * 6


def test_certificates_are_known_by_any_of_their_names_and_each_identity_once() -> None:
    roles = Roles(
        {
            "z": Identity(("lookup",), certificate="one.example"),
            "a": Identity(("rank",), certificate="two.example"),
            "t": Identity(("admin",), token_sha256=ABC),
        }
    )
    assert roles.of_certificate(["one.example", "none.example", "two.example", "one.example"]) == ["a", "z"]
    assert roles.of_certificate(["ONE.example", "example", "t", ABC, ""]) == []
    assert roles.by_certificate and not Roles({"t": roles.identities["t"]}).by_certificate
    assert Roles({}).of_token("abc") is None and Roles({}).of_certificate(["one.example"]) == []


@pytest.mark.parametrize("digest", ["0" * 63, "0" * 65, "A" * 64, "g" * 64, ""])
def test_a_digest_is_64_digits_of_lowercase_hexadecimal(digest) -> None:
    with pytest.raises(InvalidConfig, match="64 digits"):
        Identity(("lookup",), token_sha256=digest)


def test_two_identities_share_neither_token_nor_certificate() -> None:
    for key in ({"token_sha256": ABC}, {"certificate": "x"}):
        with pytest.raises(InvalidConfig, match=r"shared by \['a', 'b'\]"):
            Roles({"a": Identity(("lookup",), **key), "b": Identity(("rank",), **key)})
    # The text of one may be the other's: they are no two of one kind.
    Roles({"a": Identity(("lookup",), token_sha256=ABC), "b": Identity(("rank",), certificate=ABC)})


def test_an_identity_that_stands_twice_in_the_file_is_refused_without_its_name(tmp_path) -> None:
    path = tmp_path / "roles.yaml"
    entry = f"secret-word: {{token_sha256: {ABC}, roles: [lookup]}}\n"
    path.write_text(entry + entry.replace("lookup", "admin"))
    with pytest.raises(InvalidConfig, match=r"roles\.yaml, line 2") as refused:
        Roles.read(path)
    assert "secret-word" not in str(refused.value)
    path.write_text(f"a: {{token_sha256: {ABC}, roles: [lookup], roles: [admin]}}")
    with pytest.raises(InvalidConfig, match="each key of a mapping once"):
        Roles.read(path)
