"""How a row of floats lies in bytes. The only place that knows.

The bytes are FBGEMM's fused row-wise layouts, little-endian, scale and bias last:

```
int4   | c1 c0 | c3 c2 | ... | fp16 scale | fp16 bias |      ceil(D/2) + 4 bytes, even column in the low nibble
int8   | c0 | c1 | c2 | ...  | fp32 scale | fp32 bias |      D + 8 bytes
fp16   | h0    | h1    | ...                          |      2 D bytes
```

decode: x = scale * code + bias. The encoders here are numpy references that the tests hold to FBGEMM's operators
bit for bit (int4: FloatToFusedNBitRowwiseQuantizedSBHalf, int8: FloatToFused8BitRowwiseQuantized); the trainer
quantizes with FBGEMM, the ranker dequantizes with FBGEMM on its device. Negative zero is stored as zero: which of two
equal zeros is a row's minimum would otherwise hang on the order in which a kernel compares them.
"""

from abc import ABC, abstractmethod

import numpy as np

from pipelines.contracts.errors import InvalidConfig, InvalidTable

__all__ = ["CODEC_NAMES", "RowCodec", "codec", "require_finite"]

_CODECS: dict[str, "RowCodec"] = {}


class RowCodec(ABC):
    """Rows of float32 (N, D) to rows of bytes (N, row_bytes) and back."""

    name: str

    def __init_subclass__(cls) -> None:
        if name := cls.__dict__.get("name"):
            _CODECS[name] = cls()

    @abstractmethod
    def row_bytes(self, dim: int) -> int:
        """Bytes of one row of `dim` columns."""

    @abstractmethod
    def _encode(self, rows: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _decode(self, packed: np.ndarray, dim: int) -> np.ndarray: ...

    @abstractmethod
    def _floats(self, packed: np.ndarray) -> np.ndarray:
        """The fp16 or fp32 numbers among the bytes: scale and bias, or the values themselves."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 (N, D) -> uint8 (N, row_bytes).

        Raises:
            InvalidTable: a value is not finite, or too large for the format.
        """
        rows = require_finite(rows) + np.float32(0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            packed = self._encode(rows)
        self.require_no_overflow(packed)
        return packed

    def require_no_overflow(self, packed: np.ndarray) -> None:
        """Raise `InvalidTable` if a scale, bias or value overflowed its format (fp16 ends at 65,504)."""
        finite = np.isfinite(self._floats(packed)).all(axis=1)
        if not finite.all():
            raise InvalidTable(
                f"rows to store as {self.name}", expected="values that the format can hold",
                got=f"an overflow in row {int(np.flatnonzero(~finite)[0])}",
                remedy="Find out why the table grew, or choose a wider format.",
            )

    def decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        """uint8 (N, row_bytes) -> float32 (N, D); raises `InvalidTable` when the width does not fit `dim`."""
        packed = np.ascontiguousarray(packed)
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != self.row_bytes(dim):
            raise InvalidTable(
                f"packed {self.name} rows", expected=f"uint8 (N, {self.row_bytes(dim)}) for {dim} columns",
                got=f"{packed.dtype} {packed.shape}", remedy="Decode with the table's own codec and dimension.",
            )
        return self._decode(packed, dim)


class _Int4(RowCodec):
    name = "int4"

    def row_bytes(self, dim: int) -> int:
        return (dim + 1) // 2 + 4

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        count, dim = rows.shape
        # fp16 first, and scale from the rounded bias: the decoder sees only the rounded values
        bias = rows.min(axis=1, initial=np.inf).astype(np.float16) if count else np.empty(0, np.float16)
        low = bias.astype(np.float32)
        span = rows.max(axis=1, initial=-np.inf) - low
        scale = (span / np.float32(15)).astype(np.float16)
        scale[scale == 0] = 1
        inverse = np.float32(1) / scale.astype(np.float32)
        overflow = ~np.isfinite(inverse)
        scale[overflow], inverse[overflow] = 1, 1
        codes = np.clip(np.rint((rows - low[:, None]) * inverse[:, None]), 0, 15).astype(np.uint8)
        if dim % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        tail = np.stack([scale, bias], axis=1).astype("<f2").view(np.uint8).reshape(count, 4)
        return np.concatenate([packed, tail], axis=1)

    def _decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        codes, tail = packed[:, :-4], self._floats(packed).astype(np.float32)
        values = np.empty((len(packed), codes.shape[1] * 2), np.float32)
        values[:, 0::2], values[:, 1::2] = codes & 15, codes >> 4
        return values[:, :dim] * tail[:, :1] + tail[:, 1:]

    def _floats(self, packed: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(packed[:, -4:]).view("<f2")


class _Int8(RowCodec):
    name = "int8"

    def row_bytes(self, dim: int) -> int:
        return dim + 8

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        count = len(rows)
        low = rows.min(axis=1, initial=np.inf) if count else np.empty(0, np.float32)
        span = rows.max(axis=1, initial=-np.inf) - low
        scale = span / np.float32(255)
        inverse = np.float32(255) / (span + np.float32(1e-8))  # FBGEMM's epsilon, so that the codes agree
        codes = np.rint((rows - low[:, None]) * inverse[:, None]).astype(np.uint8)
        tail = np.stack([scale, low], axis=1).astype("<f4").view(np.uint8).reshape(count, 8)
        return np.concatenate([codes, tail], axis=1)

    def _decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        tail = self._floats(packed)
        return packed[:, :dim].astype(np.float32) * tail[:, :1] + tail[:, 1:]

    def _floats(self, packed: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(packed[:, -8:]).view("<f4")


class _Fp16(RowCodec):
    name = "fp16"

    def row_bytes(self, dim: int) -> int:
        return 2 * dim

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        return rows.astype("<f2").view(np.uint8).reshape(len(rows), self.row_bytes(rows.shape[1]))

    def _decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        return self._floats(packed).astype(np.float32)

    def _floats(self, packed: np.ndarray) -> np.ndarray:
        return packed.view("<f2")


CODEC_NAMES = tuple(_CODECS)


def require_finite(rows: np.ndarray) -> np.ndarray:
    """`rows` as contiguous float32 (N, D); raises `InvalidTable` on another shape, NaN or infinity.

    Quantizing would hide them: FBGEMM's int4 kernel turns NaN into ordinary numbers.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if rows.ndim != 2:
        raise InvalidTable("rows", expected="shape (N, D)", got=str(rows.shape), remedy="Give a matrix.")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InvalidTable(
            "rows to quantize", expected="finite values",
            got=f"NaN or infinity in row {int(np.flatnonzero(~finite)[0])}",
            remedy="Find out why training diverged; quantizing would hide it.",
        )
    return rows


def codec(name: str) -> RowCodec:
    """The codec of a quantization name; raises `InvalidConfig` for one that is not known."""
    try:
        return _CODECS[name]
    except KeyError:
        raise InvalidConfig(
            "quantization", expected=f"one of {CODEC_NAMES}", got=repr(name), remedy="Choose one of these."
        ) from None
