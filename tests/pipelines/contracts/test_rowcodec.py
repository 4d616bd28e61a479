"""The numpy codecs against FBGEMM's operators, bit for bit, and against the error bound of their format."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.contracts.errors import InvalidConfig, InvalidTable
from pipelines.contracts.rowcodec import CODEC_NAMES, codec

fbgemm_gpu = pytest.importorskip("fbgemm_gpu")

FBGEMM = {
    "int4": lambda rows: torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4),
    "int8": lambda rows: torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows),
    "fp16": lambda rows: rows.half().view(torch.uint8),
}
FBGEMM_DECODE = {
    "int4": lambda packed: torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, 4),
    "int8": lambda packed: torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(packed),
    "fp16": lambda packed: packed.view(torch.float16).float(),
}
SHAPES = st.tuples(st.integers(1, 6), st.sampled_from([4, 8, 12, 32, 64]))  # FBGEMM's int4 takes multiples of 4


def floats(limit: float) -> st.SearchStrategy:
    return st.floats(-limit, limit, width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def rows_of(limit: float) -> st.SearchStrategy:
    """Rows with their own offset and spread, so that constant, tiny and far-off rows all occur."""
    plain = hnp.arrays(np.float32, SHAPES, elements=floats(limit))
    shifted = st.builds(
        lambda rows, offset, spread: (rows * np.float32(spread) + np.float32(offset)).astype(np.float32),
        hnp.arrays(np.float32, SHAPES, elements=floats(1.0)),
        floats(limit / 2),
        st.sampled_from([0.0, 1e-45, 1e-40, 1e-8, 1e-4, 1.0, 100.0]),
    )
    return st.one_of(plain, shifted)


def assert_equals_fbgemm(name: str, rows: np.ndarray) -> None:
    rows = rows + np.float32(0)  # the codec stores negative zero as zero
    packed = codec(name).encode(rows)
    expected = FBGEMM[name](torch.from_numpy(rows)).numpy()
    np.testing.assert_array_equal(packed, expected)
    decoded = codec(name).decode(packed, rows.shape[1])
    from_fbgemm = FBGEMM_DECODE[name](torch.from_numpy(packed)).numpy()
    np.testing.assert_allclose(decoded, from_fbgemm, rtol=3e-7, atol=np.abs(rows).max() * 1e-6 + 1e-44)


@settings(max_examples=300, deadline=None)
@given(rows_of(30_000.0))
@example(np.full((1, 4), 3.14159, np.float32))
@example(np.array([[0.0, 1e-45, 1e-45, 0.0]], np.float32))
@example(np.array([[1e-7, 2e-7, 3e-7, 4e-7]], np.float32))
@example(np.array([[29_999.0, 30_000.0, 30_000.0, 30_000.0]], np.float32))
def test_int4_equals_fbgemm_bit_for_bit(rows):
    assert_equals_fbgemm("int4", rows)


@settings(max_examples=300, deadline=None)
@given(rows_of(2.0**100))
@example(np.full((1, 4), -7.5, np.float32))
@example(np.array([[1e20, 1e20, 1e-20, -1e20]], np.float32))
def test_int8_equals_fbgemm_bit_for_bit(rows):
    assert_equals_fbgemm("int8", rows)


@settings(max_examples=100, deadline=None)
@given(rows_of(60_000.0))
def test_fp16_is_ieee_half(rows):
    assert_equals_fbgemm("fp16", rows)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 31, 33])
def test_int4_of_other_widths_equals_fbgemm_on_the_padded_row(dim):
    rows = np.random.default_rng(dim).normal(size=(50, dim)).astype(np.float32)
    padded = np.concatenate([rows, np.repeat(rows.min(1, keepdims=True), -dim % 4, axis=1)], axis=1)
    expected = FBGEMM["int4"](torch.from_numpy(padded)).numpy()
    if dim % 2:
        expected[:, dim // 2] &= 15  # the high nibble is the padding's
    packed = codec("int4").encode(rows)
    assert packed.shape == (50, codec("int4").row_bytes(dim))
    np.testing.assert_array_equal(packed[:, -4:], expected[:, -4:])
    np.testing.assert_array_equal(packed[:, :-4], expected[:, : (dim + 1) // 2])


def test_the_even_column_lies_in_the_low_nibble_and_scale_before_bias():
    packed = codec("int4").encode(np.array([[0, 1, 2, 15]], np.float32))
    scale, bias = np.float16(1).tobytes(), np.float16(0).tobytes()
    assert packed.tobytes() == bytes([0x10, 0xF2]) + scale + bias


@settings(max_examples=200, deadline=None)
@given(rows_of(1_000.0), st.sampled_from(CODEC_NAMES))
def test_the_error_is_within_half_a_step_and_the_rounding_of_scale_and_bias(rows, name):
    decoded = codec(name).decode(codec(name).encode(rows), rows.shape[1])
    span = rows.max(1) - rows.min(1)
    largest = np.abs(rows).max(1)
    bound = {
        "int4": span / 30 + largest / 1024 + span / 1024 + 1e-6,  # half a step, fp16 bias, 15 steps of fp16 scale
        "int8": span / 510 + largest * 1e-5 + 2e-8,
        "fp16": largest / 2048 + 1e-7,
    }[name]
    assert (np.abs(decoded - rows).max(1) <= bound).all()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, value):
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = value
    with pytest.raises(InvalidTable, match="row 1"):
        codec(name).encode(rows)


@pytest.mark.parametrize(
    ("name", "row"), [("int4", [70_000, 0, 0, 0]), ("int4", [-7e4] * 4), ("int4", [0, 2e6, 0, 0]),
                      ("int8", [-3e38, 3e38, 0, 0]), ("fp16", [70_000, 0, 0, 0])],
)
def test_what_overflows_the_format_is_refused_or_survives(name, row):
    rows = np.array([row], np.float32)
    if name == "int4" and row[0] == 70_000:  # only the bias and the scale must fit fp16: 70,000 / 15 does
        assert abs(codec(name).decode(codec(name).encode(rows), 4) - rows).max() <= 70_000 / 30 + 70_000 / 1024
        return
    with pytest.raises(InvalidTable, match="overflow"):
        codec(name).encode(rows)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_no_rows_and_negative_zero(name):
    assert codec(name).encode(np.empty((0, 8), np.float32)).shape == (0, codec(name).row_bytes(8))
    zeros = np.zeros((1, 8), np.float32)
    np.testing.assert_array_equal(codec(name).encode(-zeros), codec(name).encode(zeros))


def test_a_wrong_width_or_name_is_refused():
    with pytest.raises(InvalidTable, match="8 columns"):
        codec("int4").decode(np.zeros((2, 7), np.uint8), 8)
    with pytest.raises(InvalidTable, match=r"\(N, D\)"):
        codec("int4").encode(np.zeros(8, np.float32))
    with pytest.raises(InvalidConfig, match="int3"):
        codec("int3")
