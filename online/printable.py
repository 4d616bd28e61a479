"""Text of others, such as a request id, as it may stand in a log or an error: on one line and bounded."""

__all__ = ["one_line", "printable", "shortened"]

MAX_DETAILS_BYTES = 1500
"""Of an error's sentence: in a header a character may take three times its bytes, and clients take headers of 8 KiB."""


def printable(text: str, limit: int = 64) -> str:
    r"""In quotes, with everything escaped that is no visible character; of a long one the first `limit` characters.

    >>> printable("a\nb")
    "'a\\nb'"
    >>> printable("x" * 1000, limit=4)
    "'xxxx'… (1000 characters)"
    """
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}… ({len(text)} characters)"


def one_line(text: str, limit: int = MAX_DETAILS_BYTES) -> str:
    r"""A sentence of others without quotes: what is no visible character is escaped; at most `limit` bytes.

    >>> one_line("größe: two\nlines")
    'größe: two\\nlines'
    """
    return shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in shortened(text, limit)), limit)


def shortened(text: str, limit: int = MAX_DETAILS_BYTES) -> str:
    """At most `limit` bytes of UTF-8, cut in the middle: what was wrong stands first, what to do last.

    >>> shortened("aaaabbbbcccc", limit=9)
    'aaa…ccc'
    """
    raw = text.encode(errors="replace")
    if len(raw) <= limit:
        return text
    half = (limit - len("…".encode())) // 2
    return f"{raw[:half].decode(errors='ignore')}…{raw[-half:].decode(errors='ignore')}"
