"""Entity ids: 64-bit integers, whatever the log calls its users and items."""

import hashlib

import numpy as np
import pyarrow as pa

from pipelines.contracts.errors import InvalidEvents

__all__ = ["ENTITIES", "as_ids", "batch_of", "id_of"]

ENTITIES = ("user", "item")
"""What has ids. A request names one user and its items, so a table of any other entity could not be looked up."""

_INT64 = np.dtype(np.int64)


def id_of(text: str) -> int:
    """The id of a textual name: 63 bits of BLAKE2b of its UTF-8 bytes; stable across runs, machines and versions.

    >>> id_of("85123A") == id_of("85123A")
    True
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF


def as_ids(names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Ids of a column of names: integers are kept, text is hashed with `id_of`.

    Returns:
        int64, shape (N,).

    Raises:
        InvalidEvents: the column is neither integer nor text, or two texts share an id.
    """
    if pa.types.is_integer(names.type):
        return names.cast(pa.int64()).to_numpy()
    if not (pa.types.is_string(names.type) or pa.types.is_large_string(names.type)):
        raise InvalidEvents(
            "cannot make ids", expected="an integer or text column", got=str(names.type),
            remedy="Cast it in the adapter.",
        )
    encoded = pa.chunked_array([names], names.type) if isinstance(names, pa.Array) else names
    encoded = encoded.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # pyarrow keeps an empty column chunked
        encoded = pa.array([], names.type).dictionary_encode()
    unique = np.fromiter((id_of(text) for text in encoded.dictionary.to_pylist()), np.int64, len(encoded.dictionary))
    if len(np.unique(unique)) != len(unique):
        raise InvalidEvents(
            "two names share one 63-bit id", expected="distinct ids", got="a collision", remedy="Rename one of them."
        )
    return unique[encoded.indices.to_numpy()]


def batch_of(ids: np.ndarray) -> np.ndarray:
    """A batch as compiled kernels take it: int64 (B,), contiguous, and always read-only, as it comes off the wire.

    To Numba an array that may be written to is another type. Of the two kinds, one would be compiled by the first
    request that brings it, which on a new machine waits for seconds.

    >>> batch_of(np.array([1, 2])).flags.writeable
    False
    """
    ids = np.ascontiguousarray(ids, _INT64)
    if ids.flags.writeable:
        ids = ids.view()  # the caller's own array stays as it is
        ids.flags.writeable = False
    return ids
