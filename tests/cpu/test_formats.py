"""Pages of codes on the CPU: what is written is MLX's, what is read is what was written."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx._native import _ext
from paged_mlx.reference import dtypes, formats
from paged_mlx.reference.case import Case

pytestmark = pytest.mark.native

SIDES = (None, "q8", "q4")
PAIRS = [pair for pair in itertools.product(SIDES, SIDES) if pair != (None, None)]
MX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
HEADS = 2


def to_mlx(stored: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(stored)
    return array.view(mx.bfloat16) if stored.dtype == np.uint16 else array


def stored(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def odd_rows(tokens: int, dim: int, dtype: str, seed: int) -> np.ndarray:
    """Rows ``[tokens, HEADS, dim]`` as float32 that ``dtype`` holds: ordinary, constant, 0, spiky."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, HEADS, dim)).astype(np.float32)
    x[1] = 3.25
    x[2] = 0
    x[3, :, 5] = -1e3
    x[4] *= 1e-9
    x[5, 0, 3] = np.nan
    x[5, 1, 7] = np.inf
    x[6] = np.abs(x[6])
    return dtypes.round_to(x, dtype)


def empty_layer(k_format, v_format, dtype, dims, num_pages, page_size, num_open=0):
    """The arrays of a layer, zeros."""
    arrays = []
    for is_key, name, dim in ((True, k_format, dims[0]), (False, v_format, dims[1])):
        rows = (num_pages, HEADS, page_size)
        if name is None:
            arrays.append(mx.zeros((*rows, dim), MX[dtype]))
            continue
        arrays.append(mx.zeros((*rows, dim * int(name[1]) // 32), mx.uint32))
        by_channel = is_key and name == "q4"
        scales = (*rows[:2], dim) if by_channel else (*rows, dim // formats.group_of(dim))
        arrays += [mx.zeros(scales, MX[dtype]) for _ in range(2)]
    if k_format == "q4":
        arrays += [mx.zeros((num_open, HEADS, page_size, dim), MX[dtype]) for dim in dims]
    return arrays


@pytest.mark.parametrize("dtype", MX)
@pytest.mark.parametrize("dims", [(64, 128), (96, 32), (256, 192)])
def test_what_is_written_is_what_mlx_quantises(dtype, dims):
    k, v = (odd_rows(8, dim, dtype, seed=dim) for dim in dims)
    slots = np.array([3, 9, 0, 15, 4, 5, -1, 8], np.int32)
    layer = empty_layer("q8", "q4", dtype, dims, 4, 4)
    tokens = [to_mlx(dtypes.encode(x, dtype), dtype) for x in (k, v)]
    found = _ext.write_pages(tokens, layer, mx.array(slots), formats=("q8", "q4"), alias=True)
    turned = dtypes.round_to(formats.rotate(v), dtype)
    expected = (*formats.quantise_tokens(k, 8, dtype), *formats.quantise_tokens(turned, 4, dtype))
    for array, rows, before in zip(found, expected, layer):
        whole = np.zeros(before.shape, stored(array).dtype)
        for row, slot in zip(rows, slots):
            if slot >= 0:
                whole[slot // 4, :, slot % 4] = row
        bits = np.uint32 if whole.dtype.itemsize == 4 else np.uint16
        either_nan = np.isnan(dtypes.decode(whole, dtype)) if whole.dtype != np.uint32 else False
        same = stored(array).view(bits) == whole.view(bits)
        assert (same | either_nan).all()
    codes, scales, biases = mx.quantize(
        tokens[0][:5], group_size=64 if dims[0] != 96 else 32, bits=8
    )
    for array, rows in zip(found, (codes, scales, biases)):
        assert (stored(array)[0, :, 3] == stored(rows)[0]).all()


@pytest.mark.parametrize("dtype", MX)
@pytest.mark.parametrize("v_format", SIDES)
@pytest.mark.parametrize("dims", [(128, 64), (40, 96)])
def test_pages_are_sealed_as_a_whole(dtype, v_format, dims):
    if v_format == "q4" and dims[1] == 96:
        dims = (40, 128)
    k, v = (odd_rows(24, dim, dtype, seed=dim + 1) for dim in dims)
    k, v = (np.moveaxis(x.reshape(3, 8, HEADS, -1), 2, 1).copy() for x in (k, v))
    turned = dtypes.round_to(formats.rotate(v), dtype) if v_format == "q4" else v
    sources = [to_mlx(dtypes.encode(x, dtype), dtype) for x in (k, v)]
    pairs = np.array([[1, 3, 8], [0, 1, 5], [2, 0, 0]], np.int32)
    layers = [empty_layer("q4", v_format, dtype, dims, 5, 8, num_open=1) for _ in range(2)]
    found = _ext.seal_pages(
        sources * 2, layers, mx.array(pairs), ("q4", v_format), rotated=False
    )  # fmt: skip
    counts = np.zeros(3, np.int64)
    counts[pairs[:, 0]] = pairs[:, 2]
    expected = formats.quantise_channels(k, counts, dtype)
    for layer in found:
        for array, pages in zip(layer, expected):
            for source, target, _ in pairs:
                a, b = stored(array)[target], pages[source]
                nan = np.isnan(dtypes.decode(b, dtype)) if b.dtype != np.uint32 else False
                assert ((a == b) | nan).all()
        if v_format:
            bits = int(v_format[1])
            rows = formats.quantise_tokens(turned[1], bits, dtype)
            assert (stored(layer[3])[3] == rows[0]).all()
        else:
            assert (stored(layer[3])[1, :, :5] == dtypes.encode(v, dtype)[0, :, :5]).all()
    rotated = [sources[0], to_mlx(dtypes.encode(turned, dtype), dtype)]
    again = _ext.seal_pages(rotated, layers[:1], mx.array(pairs), ("q4", v_format), rotated=True)
    for a, b in zip(again[0], found[0]):
        assert (stored(a) == stored(b)).all()


@pytest.mark.parametrize("k_format, v_format", PAIRS)
@pytest.mark.parametrize("dtype", MX)
def test_a_gather_gives_what_the_pages_read_as(k_format, v_format, dtype):
    problem = Case(
        dtype=dtype, head_dim=64, v_head_dim=128, page_size=8, num_q_heads=HEADS,
        num_kv_heads=HEADS, sequences=((1, 30), (1, 9)), ragged=True, k_format=k_format,
        v_format=v_format,
    ).build()  # fmt: skip
    pages = [to_mlx(a, dtype) for a in problem.stored]
    length = int(problem.context_lens.max())
    ragged = {n: mx.array(getattr(problem, n)) for n in ("page_starts", "page_lens")}
    k, v, *_ = _ext.gather_pages(
        pages, mx.array(problem.block_tables), mx.array(problem.context_lens), length,
        formats=(k_format, v_format), **ragged,
    )  # fmt: skip
    for found, contexts in ((k, problem.keys), (v, problem.values)):
        for row, context in zip(found, contexts):
            part = np.moveaxis(np.array(row.astype(mx.float32)), 0, 1)[: len(context)]
            bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
            np.testing.assert_allclose(part, context, atol=bound, rtol=bound)


CASES = {
    "decode": dict(sequences=((1, 200), (1, 64), (1, 3))),
    "two heads": dict(sequences=((1, 150),), num_q_heads=2),
    "verify": dict(sequences=((4, 130), (3, 40)), num_q_heads=4),
    "prefill": dict(sequences=((70, 150), (1, 9))),
    "small pages": dict(sequences=((1, 70), (5, 33)), page_size=4),
    "pages of 16": dict(sequences=((1, 170), (2, 90)), page_size=16),
    "wide heads": dict(sequences=((1, 140),), head_dim=256, v_head_dim=128),
    "narrow heads": dict(sequences=((1, 90),), head_dim=32, v_head_dim=64, num_q_heads=8),
    "a window": dict(sequences=((1, 200), (9, 180)), sliding_window=70),
    "softcap": dict(sequences=((1, 150), (40, 90)), softcap=2.0),
    "ALiBi": dict(sequences=((1, 150), (40, 90)), alibi=1.0),
    "sinks": dict(sequences=((1, 150), (40, 90)), sinks="random"),
    "a mask": dict(sequences=((1, 150), (40, 90)), mask="boolean"),
    "ragged": dict(sequences=((1, 150), (40, 90)), ragged=True),
    "a shared prefix": dict(sequences=((1, 400),) * 5, prefixes=((0, 5, 256),)),
}


def attend(problem, formats, **options):
    """``(out, lse)`` of a problem over the arrays that it stores."""
    q, *pages = (to_mlx(a, problem.dtype) for a in (problem.q, *problem.stored))
    plan = _ext.NativePlan(
        op="plan", block_tables=problem.block_tables, context_lens=problem.context_lens,
        cu_seqlens_q=problem.cu_seqlens_q, page_starts=problem.page_starts,
        page_lens=problem.page_lens, num_pages=-1, num_q_heads=problem.q.shape[1],
        num_kv_heads=problem.stored[0].shape[1], page_size=problem.stored[0].shape[2],
        causal=problem.causal, sliding_window=problem.sliding_window or 0, dtype=MX[problem.dtype],
        head_dim=problem.q.shape[2], v_head_dim=problem.v_pages.shape[3], share_prefixes=True,
        fixed_partition=0, workers=1, kernels=False,
        num_sealed_pages=len(problem.stored[0]) if formats[0] == "q4" else -1, formats=formats,
    )  # fmt: skip
    scoring = {
        {"softcap": "cap"}.get(name, name): mx.array(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in problem.scoring.items()
    }
    out, lse, *_ = _ext.paged_attention(q, pages, plan.array(), formats=formats, **scoring)
    return dtypes.decode(stored(out), problem.dtype), np.array(lse)


def judge(isa, dtype, k_format, v_format, name):
    case = dict(
        dtype=dtype, head_dim=128, page_size=64, num_q_heads=8, num_kv_heads=HEADS,
        k_format=k_format, v_format=v_format, seed=len(name),
    )  # fmt: skip
    problem = Case(**case | CASES[name]).build()
    before = _ext.isa()
    _ext.set_isa(isa)
    try:
        return problem.judge(*attend(problem, (k_format, v_format)))
    finally:
        _ext.set_isa(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k_format, v_format", PAIRS)
def test_attention_over_codes_is_as_exact_as_over_what_they_read_as(k_format, v_format, name):
    for dtype in MX:
        verdict = judge("", dtype, k_format, v_format, name)
        assert verdict.right, (dtype, verdict)


@pytest.mark.parametrize("isa", _ext.isa_names()[:-1])
@pytest.mark.parametrize("k_format, v_format", [("q8", "q4"), ("q4", "q8")])
@pytest.mark.parametrize("name", ["decode", "prefill", "a window"])
def test_every_instruction_set_attends_over_codes(isa, k_format, v_format, name):
    for dtype in MX:
        verdict = judge(isa, dtype, k_format, v_format, name)
        assert verdict.right, (dtype, verdict)
