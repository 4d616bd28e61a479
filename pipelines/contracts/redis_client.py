"""The way to a Redis server or cluster: a client from a URL, and its errors as ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import redis

from pipelines.contracts.errors import InvalidConfig, Unavailable, VersionConflict

__all__ = ["connect", "reaching", "without_password"]

TIMEOUT_S = 10.0  # for a connection and for one answer, unless the URL says otherwise (?socket_timeout=…)


@lru_cache(maxsize=8)
def connect(url: str) -> Any:
    """A client of the server, or of the cluster that it belongs to; one in a process, for all its threads.

    Raises:
        InvalidConfig: this is no URL of a Redis server.
        Unavailable: it does not answer.
    """
    where, options = without_password(url), {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    try:
        if "@" in url and "@" not in urlsplit(url).netloc:
            raise ValueError("a part of the password would be taken for the server's address, and shown as such")
        client = redis.from_url(url, **options)
    except ValueError:
        raise InvalidConfig(
            "rows", expected="'segments' or a URL such as redis://127.0.0.1:6379/0 or unix:///run/redis.sock",
            got=repr(where), remedy="Correct it; in a password, write @ / ? # and : as %40 %2F %3F %23 and %3A.",
        ) from None  # the client's own error repeats the URL
    with reaching(where):
        if client.info("cluster")["cluster_enabled"]:
            client.close()
            client = redis.RedisCluster.from_url(url, **options)
    return client


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turn what the client raises into errors that name the server.

    Raises:
        Unavailable: the server did not answer, or refused (out of memory, not allowed, loading).
        VersionConflict: a lock is no longer held.
    """
    try:
        yield
    except redis.exceptions.LockError as error:
        raise VersionConflict(
            f"writing to {where}", expected="the table's lock until the end", got=str(error),
            remedy="Another writer took over after this one stood still; look for it, then materialize again.",
        ) from error
    except redis.RedisError as error:
        raise Unavailable(
            f"Redis at {where}", expected="an answer", got=f"{type(error).__name__}: {error}",
            remedy="Start the server, give it memory, or correct `rows`.",
        ) from error


def without_password(url: str) -> str:
    """What anybody may see of a URL: all that is written or printed of it has been through here.

    Nothing of a user, a password or options is left; a password may hold any character, `/`, `?`, `#` and `@` too.

    >>> without_password("redis://user:secret@host:6379/0?password=secret")
    'redis://***@host:6379/0'
    """
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    place, _, options = rest.partition("?")
    if "@" in options:  # of a password or of an option: it cannot be told
        return f"{scheme}{separator}***"
    _, at, host = place.rpartition("@")
    return f"{scheme}{separator}{'***@' if at else ''}{host.partition('#')[0]}"
