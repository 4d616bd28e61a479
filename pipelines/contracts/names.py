"""Version numbers, table names and hashes as text: the one place that reads them.

They come from directories, Feast's tags, Redis and manifests, and become parts of paths and keys. What is read here has
no separator, no `..` and one spelling only: `7` is a version, `07`, `²` and `७` are not.
"""

import re

__all__ = ["sha256_name", "table_name", "version_number"]

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_TABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\.[A-Za-z_][A-Za-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def version_number(text: str) -> int:
    """The version that a text names: 1 to 10**18 - 1, in decimal digits; raises ValueError for any other text.

    >>> version_number("7")
    7
    """
    return int(_matched(_VERSION, text, "a version number, such as 7"))


def table_name(text: str) -> str:
    """The text, if it names a table as `entity.facet`; raises ValueError if it does not.

    >>> table_name("item.kge")
    'item.kge'
    """
    return _matched(_TABLE, text, "a table name 'entity.facet', of ASCII letters, digits and _")


def sha256_name(text: str) -> str:
    """The text, if it is a SHA-256 in hexadecimal; raises ValueError if it is not."""
    return _matched(_SHA256, text, "a SHA-256 of 64 hexadecimal digits")


def _matched(pattern: re.Pattern, text: str, what: str) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"expected {what}, got {text!r}")
    return text
