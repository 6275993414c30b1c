"""The formulas of the formats: those on MLX's arrays, MLX's own, and numpy's agree bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx.formats.page_format import (
    PageFormats,
    formats_of,
    group_size,
    page_arrays,
    page_nbytes,
    rotation_size,
)
from paged_mlx.formats.quantise import (
    dequantise_channels,
    dequantise_tokens,
    quantise_channels,
    quantise_tokens,
)
from paged_mlx.formats.rotation import rotate
from paged_mlx.reference import dtypes, formats
from paged_mlx.testing.backends import from_mlx, to_mlx

DTYPES = dtypes.NAMES


def odd_rows(head_dim: int, dtype: str) -> np.ndarray:
    """Rows that formats go wrong with, float32 values that the dtype holds."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((15, head_dim), np.float32)
    x[0] = 0
    x[1] = 3.25
    x[2] = -7.5
    x[3] = 0
    x[3, 5] = 900.0  # a single outlier
    x[4, 7] = -900.0
    x[5] = dtypes.HUGE[dtype] / 4
    x[6] = np.where(np.arange(head_dim) % 2, 1, -1) * dtypes.HUGE[dtype]
    x[7] = dtypes.TINY[dtype]
    x[8, 3] = np.nan
    x[9, 3] = np.inf
    x[10, 3] = -np.inf
    x[11] = np.abs(x[11]) + 100
    x[12] = -np.abs(x[12]) - 100
    x[13] *= 1e-6
    return dtypes.round_to(x, dtype)


def same(a, b) -> None:
    """Equal bits; a NaN is as good as another."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.dtype in (np.float32, np.float16):
        nans = np.isnan(a) & np.isnan(b)
        a, b = np.where(nans, 0, a), np.where(nans, 0, b)
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def where_finite(scales: np.ndarray, dtype: str) -> np.ndarray:
    return np.isfinite(dtypes.decode(scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, bits", [("q8", 8), ("q4", 4)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
def test_tokens_are_quantised_as_mlx_quantises_them(dtype, name, bits, head_dim):
    x = odd_rows(head_dim, dtype)
    array = to_mlx(dtypes.encode(x, dtype), dtype)
    with mx.stream(mx.cpu):
        found = [from_mlx(a) for a in quantise_tokens(array, name)]
        own = [from_mlx(a) for a in mx.quantize(array, group_size=group_size(head_dim), bits=bits)]
    expected = formats.quantise_tokens(x, bits, dtype)
    finite = where_finite(expected[1], dtype)
    per_group = found[0].reshape(*finite.shape, -1)
    for i, (a, b, c) in enumerate(zip(found, expected, own)):
        if i == 0:
            a, b, c = (codes.reshape(per_group.shape) for codes in (a, b, c))
        same(a[finite], b[finite])
        same(a[finite], c[finite])
    assert not where_finite(found[1], dtype)[~finite].any()
    assert (~finite).any(axis=1)[8:11].all()  # NaN, inf and -inf
    assert finite[[0, 1, 2, 3, 4, 7, 11, 12, 13, 14]].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, bits", [("q8", 8), ("q4", 4)])
def test_codes_of_tokens_read_as_scale_times_code_and_bias(dtype, name, bits):
    x = odd_rows(64, dtype)
    stored = formats.quantise_tokens(x, bits, dtype)
    arrays = mx.array(stored[0]), *(to_mlx(a, dtype) for a in stored[1:])
    with mx.stream(mx.cpu):
        found = np.array(dequantise_tokens(*arrays, name))
        own = np.array(
            mx.dequantize(arrays[0], *(a.astype(mx.float32) for a in arrays[1:]), bits=bits)
        )
    expected = formats.dequantise_tokens(*stored, bits, dtype)
    same(found, expected)
    same(found, own)
    step = np.abs(dtypes.decode(stored[1], dtype))
    finite = np.isfinite(step[:, 0])
    assert np.isnan(found[~finite]).all()
    normal = finite & (step[:, 0] > 1e-6)  # a scale that is subnormal has few bits
    bound = 1.01 * step + 2 * dtypes.EPSILON[dtype] * np.abs(x).max(-1, keepdims=True)
    assert (np.abs(found - x) <= bound)[normal].all()


def odd_pages(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Pages ``[5, 2, 16, 24]`` and their tokens; what is past them is not finite."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((5, 2, 16, 24), np.float32)
    tokens = np.array([16, 5, 1, 16, 0], np.int32)
    x[0, 0, :, 0] = 0
    x[0, 0, :, 1] = -2.5
    x[0, 0, :, 2] = 1e-30
    x[0, 0, 3, 3] = 500.0
    x[0, 1, 7, 4] = np.nan
    x[0, 1, 7, 5] = np.inf
    x[0, 1, 7, 6] = -np.inf
    x[3, :, :, 0] = np.where(np.arange(16) % 2, 1, -1) * np.float32(dtypes.HUGE[dtype])
    x[3, :, :, 1] += 1000
    x[1, :, 5:] = np.nan
    x[2, :, 1:] = np.inf
    x[4] = np.nan
    return dtypes.round_to(x, dtype), tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_are_quantised_as_the_oracle_quantises_them(dtype):
    x, tokens = odd_pages(dtype)
    with mx.stream(mx.cpu):
        arrays = quantise_channels(to_mlx(dtypes.encode(x, dtype), dtype), mx.array(tokens))
        read = np.array(dequantise_channels(*arrays))
    expected = formats.quantise_channels(x, tokens, dtype)
    for a, b in zip(arrays, expected):
        same(from_mlx(a), b)
    same(read, formats.dequantise_channels(*expected, dtype))
    codes = formats.unpack(expected[0], 4)
    assert not codes[1, :, 5:].any() and not codes[4].any()  # what the pages do not hold
    assert np.isnan(read[0, 1, :, 4:7]).all() and np.isfinite(read[0, 1, :, 7:]).all()
    step = np.abs(dtypes.decode(expected[1], dtype))[:, :, None]
    for page, count in enumerate(tokens):
        error = np.abs(read - x)[page, :, :count]
        bound = (0.51 * step + 2e-2 * np.abs(x))[page, :, :count]
        assert (error <= bound)[np.isfinite(bound)].all()


def hadamard(head_dim: int) -> np.ndarray:
    """The rotation as a matrix, float64: Sylvester's, in blocks of 64 unless a power of two."""
    size = head_dim if head_dim & (head_dim - 1) == 0 else 64
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(head_dim // size), matrix / np.sqrt(size))


@pytest.mark.parametrize("head_dim", [8, 64, 128, 192, 512])
def test_the_rotation_is_a_hadamard_transform_and_its_own_inverse(head_dim):
    x = np.random.default_rng(5).standard_normal((3, 2, head_dim)).astype(np.float32)
    with mx.stream(mx.cpu):
        found = np.array(rotate(mx.array(x)))
        back = np.array(rotate(mx.array(found)))
    same(found, formats.rotate(x))
    np.testing.assert_allclose(found, x @ hadamard(head_dim).T, atol=1e-5)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_bytes_of_a_token_are_those_of_the_table():
    def bytes_of(k, v):
        return page_nbytes(PageFormats(k, v), 1, 64, 128, 128, mx.float16) / 64

    sizes = [bytes_of(*pair) for pair in ((None, None), ("q8", "q8"), ("q8", "q4"), ("q4", "q4"))]
    assert sizes == [512, 272, 208, 144]


def test_arrays_of_a_layer_are_those_that_mlx_quantises_pages_to():
    pages = mx.zeros((3, 2, 16, 96), mx.bfloat16)
    arrays = mx.quantize(pages, group_size=32, bits=8)
    specs = page_arrays(PageFormats("q8", None), 2, 16, 96, 96, mx.bfloat16)
    assert [(a.shape[1:], a.dtype) for a in arrays] == [tuple(spec) for spec in specs[:3]]
    assert specs[3].shape == (2, 16, 96) and len(specs) == 4


@pytest.mark.parametrize(
    "formats, sizes, words",
    [
        (("q9", None), (64, 64, 64), "k_format must be None"),
        ((None, 8), (64, 64, 64), "v_format must be None"),
        (("q8", None), (80, 80, 64), "head_dim must be a multiple of 32"),
        ((None, "q8"), (64, 72, 64), "v_head_dim must be a multiple of 32"),
        ((None, "q4"), (64, 96, 64), "v_head_dim must be a power of two"),
        ((None, "q4"), (64, 16, 64), "v_head_dim must be a multiple of 32"),
        (("q4", None), (64, 64, 4), "page_size must be at least 8"),
    ],
)
def test_formats_that_pages_cannot_have_are_refused(formats, sizes, words):
    with pytest.raises(ValueError, match=rf"^\[PagePool\] {words}.*; got .*\.$"):
        PageFormats(*formats).check("PagePool", *sizes)
    PageFormats("q4", "q8").check("PagePool", 72, 96, 8)


@pytest.mark.parametrize("value", ["q5", ("q8",), ("q8", "q8", "q8"), 8, ("q8", 4)])
def test_an_option_that_names_no_formats_is_refused(value):
    with pytest.raises(ValueError, match=r"^\[enable\] kv_format must be None, \"q8\""):
        formats_of("enable", "kv_format", value)


def test_one_name_is_the_format_of_both_sides():
    assert formats_of("enable", "kv_format", "q4") == PageFormats("q4", "q4")
    assert formats_of("enable", "kv_format", ("q8", None)) == ("q8", None)
    assert formats_of("enable", "kv_format", None).are_dense


def test_head_dims_have_the_groups_and_rotations_of_the_native_code():
    assert [group_size(d) for d in (8, 32, 64, 80, 96, 128, 512)] == [0, 32, 64, 0, 32, 64, 64]
    assert [rotation_size(d) for d in (8, 64, 96, 192, 256)] == [8, 64, 0, 64, 256]
