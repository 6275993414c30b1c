"""Arrays that are slices, broadcast or turned give what a contiguous copy gives."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PagePool, fast
from paged_mlx._native import _ext
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.reference import oracle

TOKENS, HEADS, KEYS, PAGE, DIM = 3, 4, 20, 4, 64
CU = [0, 1, 3]
TABLES = np.array([[3, 0, 5, -1, -1], [1, 2, 6, 4, 7]], np.int32)
LENS = np.array([10, 20], np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_slice(x, axis):
    """Every second entry along an axis of a larger array."""
    return mx.repeat(x, 2, axis)[tuple([slice(None)] * axis + [slice(None, None, 2)])]


def as_tail(x, axis):
    """The end of a larger array along an axis."""
    start = tuple([slice(None)] * axis + [slice(3, None)])
    width = [(3, 0) if i == axis else (0, 0) for i in range(x.ndim)]
    return mx.pad(x, width)[start]


def as_transposed(x, axis):
    """An array whose axis is moved to the front in memory."""
    return mx.moveaxis(mx.contiguous(mx.moveaxis(x, axis, 0)), 0, axis)


def as_reversed(x, axis):
    """An array that runs backwards in memory along an axis."""
    backwards = tuple([slice(None)] * axis + [slice(None, None, -1)])
    return mx.contiguous(x[backwards])[backwards]


LAYOUTS = [as_slice, as_tail, as_transposed, as_reversed]
OPTIONS = {
    "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
    "sinks": normal(HEADS, seed=3),
    "mask of tokens": normal(TOKENS, KEYS, seed=4) > -0.5,
    "additive mask of tokens": normal(TOKENS, KEYS, seed=5),
    "mask of heads": normal(HEADS, TOKENS, KEYS, seed=6) > -0.5,
    "additive mask of heads": normal(HEADS, TOKENS, KEYS, seed=7),
}


def attend(route="cpu", **change):
    call = dict(
        q=mx.array(normal(TOKENS, HEADS, DIM)),
        k_pages=mx.array(normal(8, 2, PAGE, DIM, seed=1)),
        v_pages=mx.array(normal(8, 2, PAGE, DIM, seed=2)),
        block_tables=TABLES,
        context_lens=LENS,
        cu_seqlens_q=CU,
        return_lse=True,
    )

    def work():
        return [np.array(x) for x in fast.paged_attention(**call | change)]

    if route == "cpu":
        return work()
    with metal_on_host() as launches:
        found = work()
    assert launches.findings == [] and launches.kernels
    return found


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("route", ["cpu", "metal"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_any_layout_is_read_as_its_values(name, route):
    values = mx.array(OPTIONS[name])
    keyword = "mask" if "mask" in name else name
    right = attend(route, **{keyword: values})
    assert not np.array_equal(right[0], attend(route)[0])
    for axis in range(values.ndim):
        for layout in LAYOUTS:
            turned = layout(values, axis)
            assert np.array_equal(np.array(turned), OPTIONS[name])
            assert_same(attend(route, **{keyword: turned}), right)


@pytest.mark.parametrize("route", ["cpu", "metal"])
@pytest.mark.parametrize("kind", [bool, np.float32])
@pytest.mark.parametrize(
    "shape", [(1, KEYS), (TOKENS, 1), (1, 1, KEYS), (HEADS, 1, 1), (1, TOKENS, 1)]
)
def test_a_mask_that_is_broadcast_is_read_as_its_values(shape, kind, route):
    part = normal(*shape, seed=8)
    part = part > -0.5 if kind is bool else part
    whole = (TOKENS, KEYS) if len(shape) == 2 else (HEADS, TOKENS, KEYS)
    mask = mx.broadcast_to(mx.array(part), whole)
    assert_same(attend(route, mask=mask), attend(route, mask=mx.array(np.array(mask))))


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_one_number_broadcast_to_all_heads_is_read_as_its_values(name):
    one = mx.broadcast_to(mx.array([0.75]), (HEADS,))
    assert_same(attend(**{name: one}), attend(**{name: mx.array([0.75] * HEADS)}))


@pytest.mark.parametrize("route", ["cpu", "metal"])
def test_all_options_together_are_each_in_its_place(route):
    options = dict(
        alibi_slopes=OPTIONS["alibi_slopes"], sinks=OPTIONS["sinks"],
        mask=OPTIONS["additive mask of heads"], softcap=2.0, scale=0.3, sliding_window=9,
    )  # fmt: skip
    arrays = {n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    out, lse = attend(route, **arrays)
    exact, exact_lse = oracle.paged_attention(
        normal(TOKENS, HEADS, DIM), normal(8, 2, PAGE, DIM, seed=1), normal(8, 2, PAGE, DIM, seed=2),
        TABLES, LENS, cu_seqlens_q=CU, **options,
    )  # fmt: skip
    np.testing.assert_allclose(out, exact, atol=1e-5)
    np.testing.assert_allclose(lse, exact_lse, atol=1e-5)


def test_a_mask_of_one_head_is_the_mask_of_all():
    one = mx.array(normal(1, TOKENS, KEYS, seed=9))
    assert_same(attend(mask=one), attend(mask=one[0]))
    assert_same(attend(mask=one), attend(mask=mx.repeat(one, HEADS, 0)))


def test_a_mask_may_have_more_keys_than_the_contexts():
    mask = normal(TOKENS, KEYS + 9, seed=10)
    mask[:, KEYS:] = np.nan
    assert_same(attend(mask=mx.array(mask)), attend(mask=mx.array(mask[:, :KEYS].copy())))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_options_of_half_precision_are_read_as_their_values(dtype):
    for name, values in OPTIONS.items():
        if values.dtype != bool:
            keyword = "mask" if "mask" in name else name
            half = mx.array(values).astype(dtype)
            found, right = (attend(**{keyword: x}) for x in (half, half.astype(mx.float32)))
            assert_same(found, right)


@pytest.mark.parametrize("route", ["cpu", "metal"])
@pytest.mark.parametrize("name", ["q", "k_pages", "v_pages"])
def test_q_and_pages_of_any_layout_are_read_as_their_values(name, route):
    values = mx.array(normal(*(TOKENS, HEADS, DIM) if name == "q" else (8, 2, PAGE, DIM), seed=11))
    right = attend(route, **{name: values})
    for axis in range(values.ndim):
        for layout in LAYOUTS:
            assert_same(attend(route, **{name: layout(values, axis)}), right)


@pytest.mark.parametrize("name", ["block_tables", "context_lens", "cu_seqlens_q"])
def test_tables_and_lengths_of_any_layout_are_read_as_their_values(name):
    values = np.asarray({"block_tables": TABLES, "context_lens": LENS, "cu_seqlens_q": CU}[name])
    right = attend()
    assert_same(attend(**{name: values.tolist()}), right)
    assert_same(attend(**{name: values.astype(np.int64)}), right)
    assert_same(attend(**{name: np.asfortranarray(values)}), right)
    assert_same(attend(**{name: np.repeat(values, 2, -1)[..., ::2]}), right)
    for axis in range(values.ndim):
        for layout in LAYOUTS:
            assert_same(attend(**{name: layout(mx.array(values.astype(np.int32)), axis)}), right)


def test_starts_and_lengths_of_pages_of_any_layout_are_read_as_their_values():
    ragged = dict(
        block_tables=np.array([[3, 0, 5, 2], [1, 2, 6, 4]], np.int32),
        context_lens=[10, 12],
    )
    starts = np.array([[0, 3, 6, 9], [0, 2, 6, 10]], np.int32)
    lens = np.array([[3, 3, 3, 1], [2, 4, 4, 2]], np.int32)
    right = attend(**ragged, page_starts=starts, page_lens=lens)
    assert_same(attend(**ragged, page_starts=starts.tolist(), page_lens=lens.tolist()), right)
    for layout in LAYOUTS:
        for axis in range(2):
            turned = dict(
                page_starts=layout(mx.array(starts), axis), page_lens=layout(mx.array(lens), axis)
            )
            assert_same(attend(**ragged, **turned), right)
    columns = dict(page_starts=np.asfortranarray(starts), page_lens=np.repeat(lens, 2, 1)[:, ::2])
    assert_same(attend(**ragged, **columns), right)


def pool_with_tokens():
    pool = PagePool(1, 8, PAGE, 2, DIM, mx.float32)
    k, v = (mx.array(normal(32, 2, DIM, seed=seed)) for seed in (1, 2))
    pool.write(0, k, v, np.arange(32))
    return pool


@pytest.mark.parametrize("name", OPTIONS)
def test_a_pool_reads_options_of_any_layout_as_their_values(name):
    pool, keyword = pool_with_tokens(), "mask" if "mask" in name else name
    plan = fast.plan(
        TABLES, LENS, cu_seqlens_q=CU, num_q_heads=HEADS, num_kv_heads=2, page_size=PAGE,
        head_dim=DIM, dtype=mx.float32,
    )  # fmt: skip
    q, values = mx.array(normal(TOKENS, HEADS, DIM)), mx.array(OPTIONS[name])
    right = np.array(pool[0].attend(q, plan, **{keyword: values}))
    assert not np.array_equal(right, np.array(pool[0].attend(q, plan)))
    for axis in range(values.ndim):
        for layout in LAYOUTS:
            found = pool[0].attend(q, plan, **{keyword: layout(values, axis)})
            np.testing.assert_array_equal(np.array(found), right)


@pytest.mark.parametrize("route", ["cpu", "metal"])
def test_tokens_of_any_layout_are_written_as_their_values(route):
    k, v = mx.array(normal(5, 2, DIM, seed=1)), mx.array(normal(5, 2, DIM, seed=2))
    slots = np.array([3, 17, -1, 30, 8], np.int32)

    def written(k, v, slots):
        pages = (mx.zeros((8, 2, PAGE, DIM)) for _ in range(2))
        return [np.array(x) for x in fast.write_pages(k, v, *pages, slots)]

    right = written(k, v, slots)
    with metal_on_host() if route == "metal" else mx.stream(mx.cpu):
        assert_same(written(k, v, slots), right)
        assert_same(written(k, v, np.repeat(slots, 2)[::2]), right)
        assert_same(written(k, v, as_reversed(mx.array(slots), 0)), right)
        for axis in range(3):
            for layout in LAYOUTS:
                assert_same(written(layout(k, axis), v, slots), right)
                assert_same(written(k, layout(v, axis), slots), right)


@pytest.mark.parametrize("route", ["cpu", "metal"])
def test_parts_of_any_layout_are_merged_as_their_values(route):
    outs = [mx.array(normal(3, 2, DIM, seed=seed)) for seed in (1, 2)]
    lses = [mx.array(normal(3, 2, seed=seed)) for seed in (3, 4)]
    merged = lambda outs, lses: [np.array(x) for x in fast.merge_states(outs, lses)]  # noqa: E731
    with metal_on_host() if route == "metal" else mx.stream(mx.cpu):
        right = merged(outs, lses)
        for layout in LAYOUTS:
            for axis in range(3):
                assert_same(merged([outs[0], layout(outs[1], axis)], lses), right)
            for axis in range(2):
                assert_same(merged(outs, [layout(lses[0], axis), lses[1]]), right)


def test_pages_of_any_layout_are_copied_and_gathered_as_their_values():
    pages = mx.array(normal(8, 2, PAGE, DIM, seed=1))
    pairs = np.array([[0, 5], [2, 6]], np.int32)
    copied = np.array(fast.copy_pages([pages], pairs)[0])
    gathered = [np.array(x) for x in fast.gather_pages(pages, pages, TABLES, LENS)]
    for axis in range(4):
        for layout in LAYOUTS:
            turned = layout(pages, axis)
            assert np.array_equal(np.array(fast.copy_pages([turned], pairs)[0]), copied)
            assert_same(
                [np.array(x) for x in fast.gather_pages(turned, pages, TABLES, LENS)], gathered
            )
    columns = np.asfortranarray(pairs)
    assert np.array_equal(np.array(fast.copy_pages([pages], columns)[0]), copied)


@pytest.mark.parametrize("route", ["cpu", "metal"])
@pytest.mark.parametrize(
    "formats", [PageFormats(), PageFormats("q8", "q4"), PageFormats("q4", "q8")]
)
def test_native_operations_read_page_ids_of_any_layout_as_their_values(formats, route):
    """Without Python's checks before them, which make new arrays of ids."""
    pool = PagePool(1, 8, 8, 2, DIM, mx.float32, k_format=formats.k, v_format=formats.v)
    tokens = [mx.array(normal(5, 2, DIM, seed=seed)) for seed in (1, 2)]
    sources = [mx.array(normal(2, 2, 8, DIM, seed=seed)) for seed in (3, 4)]
    layer, ids = pool.state[0], {
        "slots": [3, 5, -1, 0, 7],
        "pairs": [[1, 5], [2, 6]],
        "tables": [[0, 6, -1], [5, 0, 6]],
        "lens": [10, 17],
        "seals": [[0, 5, 8], [1, 6, 3]],
    }  # fmt: skip
    starts = {"page_starts": [[0, 8, 16], [0, 8, 16]], "page_lens": [[8, 2, 0], [8, 8, 1]]}

    def results(layout):
        made = {
            name: layout(mx.array(values, dtype=mx.int32), 0)
            for name, values in (ids | starts).items()
        }
        pages = _ext.write_pages(tokens, layer, made["slots"], **formats.told)
        if formats.have_open_pages:
            (pages,) = _ext.seal_pages(sources, [pages], made["seals"], formats=formats)
        pages = _ext.copy_pages(pages[:2], made["pairs"]) + pages[2:]
        tables, ragged = (made["tables"], made["lens"], 17), {name: made[name] for name in starts}
        found = [
            *_ext.gather_pages(pages, *tables, **formats.told)[:2],
            *_ext.gather_pages(pages, *tables, **ragged, **formats.told)[:2],
        ]
        return [np.array(x) for x in (*pages, *found)]

    with metal_on_host() if route == "metal" else mx.stream(mx.cpu):
        right = results(lambda ids, axis: ids)
        assert any(x.any() for x in right[-4:])
        for layout in (as_slice, as_reversed):
            assert_same(results(layout), right)
