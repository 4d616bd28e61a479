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

What each format does with numbers at its edges:

```
NaN, infinity    refused before encoding
overflow         refused: a scale or bias past fp16 (int4) or fp32 (int8), a value past fp16 (fp16: 65,504), a code that
                 decodes to infinity (int8)
constant row     int4 gives back the value in fp16, give or take 15 steps of the smallest scale; int8 exactly
small spread     int4: under 15 * 2**-14 the fp16 scale is subnormal and its steps coarse, at most 15 * 2**-25 further
                 off; under 15 * 2**-25 there is no scale, every value becomes the bias
                 int8: FBGEMM adds 1e-8 to the spread, so values less than that apart become one
```
"""

from abc import ABC, abstractmethod

import numpy as np

from pipelines.contracts.errors import InvalidConfig, InvalidTable

__all__ = ["CODEC_NAMES", "RowCodec", "codec", "require_finite"]

_CODECS: dict[str, "RowCodec"] = {}

CHUNK_BYTES = 1 << 18
"""Packed bytes looked at in one go by `RowCodec.finite`: its temporaries stay in the second-level cache."""


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
    def _finite(self, packed: np.ndarray) -> np.ndarray:
        """`finite` of one chunk."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 (N, D) -> uint8 (N, row_bytes).

        Raises:
            InvalidTable: a value is not finite, or too large for the format.
        """
        rows = require_finite(rows) + np.float32(0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            packed = self._encode(rows)
        self.require_no_overflow(packed, rows.shape[1])
        return packed

    def decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        """uint8 (N, row_bytes) -> float32 (N, D); raises `InvalidTable` when the width does not fit `dim`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._decode(self._checked(packed, dim), dim)

    def finite(self, packed: np.ndarray, dim: int) -> np.ndarray:
        """Whether all values that a row decodes to are finite: uint8 (N, row_bytes) -> bool (N,).

        Exactly what `np.isfinite(decode(packed, dim)).all(axis=1)` says, without decoding: a row's values lie between
        those of its smallest and its largest code, so that scale and bias decide.

        >>> codec("int4").finite(np.array([[0, 0, 60, 0, 0], [0, 0, 124, 0, 0]], np.uint8), dim=2).tolist()
        [True, False]
        """
        packed = self._checked(packed, dim)
        finite, step = np.empty(len(packed), bool), max(1, CHUNK_BYTES // packed.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(packed), step):
                finite[start : start + step] = self._finite(packed[start : start + step])
        return finite

    def require_no_overflow(self, packed: np.ndarray, dim: int, *, first_row: int = 0) -> None:
        """Raise `InvalidTable` if a row does not decode to finite values: one that was, before it was packed.

        Args:
            first_row: number of `packed[0]` in its table, for the message.
        """
        finite = self.finite(packed, dim)
        if not finite.all():
            raise InvalidTable(
                f"rows to store as {self.name}", expected="values that the format can hold",
                got=f"an overflow in row {first_row + int(np.argmin(finite))}",
                remedy="Find out why the table grew, or choose a wider format.",
            )

    def _checked(self, packed: np.ndarray, dim: int) -> np.ndarray:
        packed = np.ascontiguousarray(packed)
        if dim < 1 or packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != self.row_bytes(dim):
            raise InvalidTable(
                f"packed {self.name} rows", expected=f"uint8 (N, {self.row_bytes(dim)}) for {dim} columns",
                got=f"{packed.dtype} {packed.shape}", remedy="Decode with the table's own codec and dimension.",
            )
        return packed


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
        codes, tail = packed[:, :-4], packed[:, -4:].view("<f2").astype(np.float32)
        values = np.empty((len(packed), codes.shape[1] * 2), np.float32)
        values[:, 0::2], values[:, 1::2] = codes & 15, codes >> 4
        return values[:, :dim] * tail[:, :1] + tail[:, 1:]

    def _finite(self, packed: np.ndarray) -> np.ndarray:
        scale, bias = packed[:, -4:].view("<f2").T  # 15 times the largest fp16 is no problem for fp32
        return np.isfinite(scale) & np.isfinite(bias)


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
        tail = packed[:, -8:].view("<f4")
        return packed[:, :dim].astype(np.float32) * tail[:, :1] + tail[:, 1:]

    def _finite(self, packed: np.ndarray) -> np.ndarray:
        scale, bias = packed[:, -8:].view("<f4").T
        finite = np.isfinite(bias) & np.isfinite(scale * np.float32(255) + bias)
        # the largest code of a row may be smaller: of the few rows that this is about, look at the codes
        doubtful = np.flatnonzero(~finite & np.isfinite(bias) & np.isfinite(scale))
        finite[doubtful] = np.isfinite(self._decode(packed[doubtful], packed.shape[1] - 8)).all(axis=1)
        return finite


class _Fp16(RowCodec):
    name = "fp16"

    def row_bytes(self, dim: int) -> int:
        return 2 * dim

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        return rows.astype("<f2").view(np.uint8).reshape(len(rows), self.row_bytes(rows.shape[1]))

    def _decode(self, packed: np.ndarray, dim: int) -> np.ndarray:
        return packed.view("<f2").astype(np.float32)

    def _finite(self, packed: np.ndarray) -> np.ndarray:
        return ((packed.view("<u2") & np.uint16(0x7C00)) != 0x7C00).all(axis=1)  # an exponent of ones


CODEC_NAMES = tuple(_CODECS)


def require_finite(rows: np.ndarray, *, first_row: int = 0) -> np.ndarray:
    """`rows` as contiguous float32 (N, D); raises `InvalidTable` on another shape, NaN or infinity.

    Quantizing would hide them: FBGEMM's int4 kernel turns NaN into ordinary numbers.

    Args:
        first_row: number of `rows[0]` in its table, for the message.
    """
    if rows.ndim != 2 or not rows.shape[1]:
        raise InvalidTable("rows", expected="shape (N, D), D at least 1", got=str(rows.shape), remedy="Give a matrix.")
    with np.errstate(over="ignore"):  # a float64 that fp32 cannot hold becomes infinite, and is refused
        rows = np.ascontiguousarray(rows, np.float32)
    # NaN and infinity both show in the extremes, which take no memory to find
    if len(rows) and not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
        finite = np.isfinite(rows).all(axis=1)
        raise InvalidTable(
            "rows to quantize", expected="finite values",
            got=f"NaN or infinity in row {first_row + int(np.argmin(finite))}",
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
