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
    "int4": lambda rows: int4_of_any_width(rows),
    "int8": lambda rows: torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows),
    "fp16": lambda rows: rows.half().view(torch.uint8),
}
FBGEMM_DECODE = {
    "int4": lambda packed: torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, 4),
    "int8": lambda packed: torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(packed),
    "fp16": lambda packed: packed.view(torch.float16).float(),
}
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 67))


def int4_of_any_width(rows: torch.Tensor) -> torch.Tensor:
    """FBGEMM's int4 takes multiples of 4: give it more columns that change no row's range, and cut them off again."""
    dim = rows.shape[1]
    padded = torch.cat([rows, rows.min(1, keepdim=True).values.repeat(1, -dim % 4)], dim=1)
    packed = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(padded, 4)
    codes, tail = packed[:, : (dim + 1) // 2].clone(), packed[:, -4:]
    if dim % 2:
        codes[:, -1] &= 15  # the high nibble is the padding's
    return torch.cat([codes, tail], dim=1)


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
    from_fbgemm = FBGEMM_DECODE[name](torch.from_numpy(packed)).numpy()[:, : rows.shape[1]]
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


EDGES = st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 65_504.0])
FINITE_OR_NOT = st.one_of(floats(70_000.0), floats(2.0**127), EDGES)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(CODEC_NAMES), dim=st.integers(1, 9), count=st.integers(0, 12))
def test_finite_says_of_any_bytes_what_decoding_them_says(data, name, dim, count):
    """Also of bytes that no encoder writes: a release may come from a stranger."""
    width = codec(name).row_bytes(dim)
    packed = data.draw(hnp.arrays(np.uint8, (count, width), elements=st.integers(0, 255)))
    width_of_number = 4 if name == "int8" else 2
    for row in range(count):  # random bytes are seldom infinite
        numbers = data.draw(hnp.arrays(np.float32, width // 2 if name == "fp16" else 2, elements=FINITE_OR_NOT))
        with np.errstate(over="ignore"):
            tail = numbers.astype(f"<f{width_of_number}").view(np.uint8)
        if data.draw(st.booleans()):
            packed[row, -len(tail) :] = tail
    decoded = np.isfinite(codec(name).decode(packed, dim)).all(axis=1)
    np.testing.assert_array_equal(codec(name).finite(packed, dim), decoded)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_finite_finds_the_one_row_in_many_chunks(name, monkeypatch):
    monkeypatch.setattr("pipelines.contracts.rowcodec.CHUNK_BYTES", 100)
    packed = codec(name).encode(np.random.default_rng(0).normal(size=(500, 7)).astype(np.float32))
    assert codec(name).finite(packed, 7).all()
    packed[377, -2:] = 0, 0x7E if name != "int8" else 0x7F
    if name == "int8":
        packed[377, -4:] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    assert np.flatnonzero(~codec(name).finite(packed, 7)).tolist() == [377]
    with pytest.raises(InvalidTable, match="row 1377"):
        codec(name).require_no_overflow(packed, 7, first_row=1000)


def test_int8_codes_below_the_largest_decide_where_the_largest_would_overflow():
    scale, bias = np.float32(2e36).tobytes(), np.float32(0).tobytes()
    packed = np.array([list(bytes([code, 0]) + scale + bias) for code in (170, 171, 255)], np.uint8)
    assert codec("int8").finite(packed, 2).tolist() == [True, False, False]


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 6e-8, -3.14159, 1000.1, -65_504.0])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_a_constant_row_comes_back_to_the_precision_of_its_format(name, value, dim):
    rows = np.full((3, dim), value, np.float32)
    decoded = codec(name).decode(codec(name).encode(rows), dim)
    if name == "int8":
        np.testing.assert_array_equal(decoded, rows)
    elif name == "fp16":
        np.testing.assert_array_equal(decoded, rows.astype(np.float16).astype(np.float32))
    else:
        nearest = rows.astype(np.float16).astype(np.float32)
        # what the fp16 bias lost is offered to scale and codes
        assert (np.abs(decoded - rows) <= np.abs(nearest - rows) + 15 * 2.0**-25).all()


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(0, 1, width=32)),
    st.sampled_from([1e-45, 1e-40, 1e-8, 1e-7, 4e-7, 5e-7, 1e-6, 1e-5, 1e-4, 9e-4]),
    st.sampled_from([0.0, 2.0**-20, 0.25]),
)
def test_a_subnormal_scale_is_coarse_but_bounded(rows, spread, offset):
    """int4: a spread below 15 * 2**-14 has a subnormal fp16 scale, rounded by up to 2**-25, or none below 2**-25."""
    rows = rows * np.float32(spread) + np.float32(offset)
    packed = codec("int4").encode(rows)
    assert_equals_fbgemm("int4", rows)
    span = rows.max(1) - rows.min(1)
    decoded = codec("int4").decode(packed, rows.shape[1])
    assert (np.abs(decoded - rows).max(1) <= span / 30 + 15.5 * 2.0**-25 + np.abs(rows).max() * 2.0**-11).all()
    scale = packed[:, -4:-2].copy().view("<f2").ravel()
    assert ((scale != 0) & np.isfinite(scale)).all()


@pytest.mark.parametrize(
    ("name", "held", "refused"),
    [
        ("int4", [65_519.0] * 4, [65_520.0] * 4),  # the bias: fp16 rounds to 65,504 or to infinity
        ("int4", [-65_519.0] * 4, [-65_520.0] * 4),
        ("int4", [0, 15 * 65_519.0, 0, 0], [0, 15 * 65_521.0, 0, 0]),  # the scale
        ("int8", [-1.7e38, 1.7e38], [-1.8e38, 1.8e38]),  # the spread
        ("int8", [0.0, 3.4028235e38], [6.369616705231754e37, 3.4028235e38]),  # the largest code, by one rounding
        ("fp16", [65_519.0], [65_520.0]),
        ("fp16", [-65_519.0], [-65_520.0]),
    ],
)
def test_the_largest_that_a_format_holds_and_the_first_it_refuses(name, held, refused):
    held, refused = (np.array([row], np.float32) for row in (held, refused))
    decoded = codec(name).decode(codec(name).encode(held), held.shape[1])
    assert np.isfinite(decoded).all() and np.abs(decoded - held).max() <= np.abs(held).max() / 15
    with pytest.raises(InvalidTable, match="overflow in row 1"):
        codec(name).encode(np.concatenate([held, refused]))


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)),
        elements=st.one_of(floats(float(np.finfo(np.float32).max)), st.sampled_from([3.4028235e38, -3.4028235e38])),
    ),
    st.sampled_from(CODEC_NAMES),
)
def test_any_magnitude_is_refused_or_comes_back_finite(rows, name):
    try:
        packed = codec(name).encode(rows)
    except InvalidTable as error:
        assert "overflow" in str(error)
        return
    assert np.isfinite(codec(name).decode(packed, rows.shape[1])).all()
    if name != "fp16":  # the nearest half to a huge number is an overflow, elsewhere the bound is the format's
        assert (np.abs(codec(name).decode(packed, rows.shape[1]) - rows).max(1) <= np.abs(rows).max(1) / 7 + 1e-6).all()


def test_float64_that_fp32_cannot_hold_is_refused():
    with pytest.raises(InvalidTable, match="infinity in row 1"):
        codec("int8").encode(np.array([[0.0], [1e300]]))


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
    for shape in (8, (2, 0), (2, 2, 2)):
        with pytest.raises(InvalidTable, match=r"\(N, D\)"):
            codec("int4").encode(np.zeros(shape, np.float32))
    with pytest.raises(InvalidTable, match="0 columns"):
        codec("int4").decode(np.zeros((2, 4), np.uint8), 0)
    with pytest.raises(InvalidTable, match="float32"):
        codec("int4").finite(np.zeros((2, 8), np.float32), 8)
    with pytest.raises(InvalidConfig, match="int3"):
        codec("int3")
