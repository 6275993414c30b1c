"""The raw operations as nodes of MLX's graph: pages moved, states merged, errors typed."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import fast
from paged_mlx._native import BUILT, _ext

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
PAGES, HEADS, PAGE, DIM, V_DIM = 6, 2, 4, 8, 16


def pages(dtype=mx.float32, dim=DIM, seed=0):
    x = np.random.default_rng(seed).standard_normal((PAGES, HEADS, PAGE, dim)).astype(np.float32)
    return mx.array(x).astype(dtype)


def rows(count, dtype=mx.float32, dim=DIM, seed=1):
    x = np.random.default_rng(seed).standard_normal((count, HEADS, dim)).astype(np.float32)
    return mx.array(x).astype(dtype)


def attention_call(**change):
    call = dict(
        q=rows(2).astype(mx.float32),
        k_pages=pages(),
        v_pages=pages(seed=2),
        block_tables=[[4, 1], [2, -1]],
        context_lens=[7, 3],
    )
    return call | change


# Pages


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_puts_each_token_in_its_slot_and_touches_nothing_else(dtype):
    k_pages, v_pages = pages(dtype), pages(dtype, V_DIM, seed=3)
    k, v = rows(5, dtype), rows(5, dtype, V_DIM)
    slots = [3, 20, 7, -1, 1]
    expected_k, expected_v = (np.array(x.astype(mx.float32)) for x in (k_pages, v_pages))
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(slot, PAGE)
            expected_k[page, :, offset] = np.array(k[token].astype(mx.float32))
            expected_v[page, :, offset] = np.array(v[token].astype(mx.float32))
    new_k, new_v = fast.write_pages(k, v, k_pages, v_pages, slots)
    assert np.array_equal(np.array(new_k.astype(mx.float32)), expected_k)
    assert np.array_equal(np.array(new_v.astype(mx.float32)), expected_v)


def test_write_leaves_pages_that_somebody_holds_alone():
    k_pages, v_pages = pages(), pages(seed=2)
    before = np.array(k_pages)
    new_k, _ = fast.write_pages(rows(1), rows(1), k_pages, v_pages, [0])
    mx.eval(new_k)
    assert np.array_equal(np.array(k_pages), before)
    assert not np.array_equal(np.array(new_k), before)


def test_copy_moves_whole_pages_in_every_array():
    pools = [pages(seed=i) for i in range(4)]
    copied = fast.copy_pages(pools, [(0, 3), (1, 5)])
    for old, new in zip(pools, copied):
        expected = np.array(old)
        expected[3], expected[5] = expected[0], expected[1]
        assert np.array_equal(np.array(new), expected)


def test_gather_makes_each_context_contiguous_and_zeroes_the_rest():
    k_pages, v_pages = pages(), pages(dim=V_DIM, seed=2)
    k, v = fast.gather_pages(k_pages, v_pages, [[4, 1], [2, -1]], [7, 3])
    assert k.shape == (2, HEADS, 7, DIM) and v.shape == (2, HEADS, 7, V_DIM)
    expected = np.concatenate([np.array(k_pages)[4], np.array(k_pages)[1]], axis=1)[:, :7]
    assert np.array_equal(np.array(k[0]), expected)
    assert np.array_equal(np.array(v[1, :, :3]), np.array(v_pages)[2][:, :3])
    assert not np.array(v[1, :, 3:]).any()


def test_gather_follows_ragged_pages():
    k_pages, v_pages = pages(), pages(seed=2)
    k, _ = fast.gather_pages(
        k_pages, v_pages, [[0, 5]], [5], page_starts=[[0, 3]], page_lens=[[3, 2]]
    )
    expected = np.concatenate([np.array(k_pages)[0][:, :3], np.array(k_pages)[5][:, :2]], axis=1)
    assert np.array_equal(np.array(k[0]), expected)


# States


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_two_halves_equals_one_pass(dtype):
    q, k_pages, v_pages = rows(1, dtype), pages(dtype), pages(dtype, seed=2)
    whole, whole_lse = fast.paged_attention(q, k_pages, v_pages, [[0, 1, 2]], [12], return_lse=True)
    parts = [
        fast.paged_attention(
            q, k_pages, v_pages, [table], [4 * len(table)], causal=False, return_lse=True
        )
        for table in ([0], [1, 2])
    ]
    out, lse = fast.merge_states(*map(list, zip(*parts)))
    tolerance = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    assert out.dtype == dtype
    assert mx.allclose(out.astype(mx.float32), whole.astype(mx.float32), atol=tolerance)
    assert mx.allclose(lse, whole_lse, atol=1e-5)


def test_an_empty_part_changes_no_bit():
    out = rows(3)
    lse = mx.array([[-900.0, 3.0]] * 3)
    empty = mx.zeros_like(out), mx.full((3, HEADS), -mx.inf)
    merged, merged_lse = fast.merge_states([empty[0], out], [empty[1], lse])
    assert mx.array_equal(merged, out) and mx.array_equal(merged_lse, lse)


def test_merging_nothing_but_empty_parts_is_empty():
    out, lse = fast.merge_states([rows(2)] * 2, [mx.full((2, HEADS), -mx.inf)] * 2)
    assert not np.array(out).any() and np.isneginf(np.array(lse)).all()


# The graph


def test_the_plan_made_once_gives_the_bits_of_the_plan_made_inside():
    call = attention_call()
    plan = fast.plan(
        call["block_tables"],
        call["context_lens"],
        num_q_heads=HEADS,
        num_kv_heads=HEADS,
        page_size=PAGE,
    )
    planned = fast.paged_attention(call["q"], call["k_pages"], call["v_pages"], plan=plan)
    assert mx.array_equal(planned, fast.paged_attention(**call))


def test_equal_calls_are_one_node_under_compile():
    call = attention_call()
    plan = fast.plan(
        call["block_tables"],
        call["context_lens"],
        num_q_heads=HEADS,
        num_kv_heads=HEADS,
        page_size=PAGE,
    ).array

    def step(q, k, v, words, scale):
        one = fast.paged_attention(q, k, v, plan=words, scale=0.5)
        two = fast.paged_attention(q, k, v, plan=words, scale=scale)
        return one, two

    arrays = call["q"], call["k_pages"], call["v_pages"], plan
    for scale in (0.5, 0.25):
        plain = step(*arrays, scale)
        compiled = mx.compile(lambda *a: step(*a, scale))(*arrays)  # noqa: B023
        assert all(mx.array_equal(a, b) for a, b in zip(plain, compiled))


@pytest.mark.native
def test_gradients_and_vmap_are_refused_by_mlx():
    call = attention_call()
    q = call.pop("q")
    with pytest.raises(ValueError, match="PagedAttention"):
        mx.grad(lambda x: fast.paged_attention(x, **call).sum())(q)
    with pytest.raises(ValueError, match="PagedAttention"):
        mx.vmap(lambda x: fast.paged_attention(x, **call))(mx.stack([q, q]))


def test_every_operation_takes_a_stream():
    stream = mx.new_stream(mx.cpu)
    call = attention_call()
    k_pages, v_pages = call["k_pages"], call["v_pages"]
    mx.eval(
        fast.paged_attention(**call, stream=stream),
        fast.write_pages(rows(1), rows(1), k_pages, v_pages, [0], stream=stream),
        fast.copy_pages([k_pages], [(0, 1)], stream=stream),
        fast.gather_pages(k_pages, v_pages, [[0]], [1], stream=stream),
        fast.merge_states([rows(1)], [mx.zeros((1, HEADS))], stream=stream),
    )


@pytest.mark.native
def test_nothing_of_the_size_of_the_context_is_allocated():
    num_pages, page_size = 512, 64
    k_pages = mx.zeros((num_pages, HEADS, page_size, DIM))
    v_pages = mx.zeros((num_pages, HEADS, page_size, DIM))
    q = rows(1)
    table, context = [list(range(num_pages))], [num_pages * page_size]
    mx.eval(k_pages, v_pages, q)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(fast.paged_attention(q, k_pages, v_pages, table, context))
    assert mx.get_peak_memory() - before < k_pages.nbytes // 100


def strided(x):
    """The same values, every other element of a larger array."""
    return mx.stack([x, mx.full(x.shape, mx.nan, x.dtype)], axis=-1)[..., 0]


@pytest.mark.parametrize("evaluate", [True, False])
def test_arrays_need_not_be_contiguous(evaluate):
    call = attention_call()
    odd = {name: strided(x) if isinstance(x, mx.array) else x for name, x in call.items()}
    if evaluate:
        mx.eval(odd["q"], odd["k_pages"], odd["v_pages"])
    assert mx.array_equal(fast.paged_attention(**odd), fast.paged_attention(**call))
    k, v = call["k_pages"], call["v_pages"]
    for ours, plain in [
        (
            fast.write_pages(strided(rows(1)), rows(1), odd["k_pages"], odd["v_pages"], [2]),
            fast.write_pages(rows(1), rows(1), k, v, [2]),
        ),
        (fast.copy_pages([odd["k_pages"]], [(0, 1)]), fast.copy_pages([k], [(0, 1)])),
        (
            fast.gather_pages(odd["k_pages"], odd["v_pages"], [[3]], [4]),
            fast.gather_pages(k, v, [[3]], [4]),
        ),
    ]:
        assert all(mx.array_equal(a, b) for a, b in zip(ours, plain))


# Errors


BAD_CALLS = {
    "q of two dimensions": (
        dict(q=mx.zeros((2, 8))),
        r"q must have shape \[tokens, num_q_heads, head_dim\]; got \(2, 8\)",
    ),
    "another head_dim": (
        dict(q=mx.zeros((2, HEADS, 16))),
        r"k_pages must have shape \[num_pages, num_kv_heads, page_size, head_dim\], where head_dim = 16 from q; "
        r"got \(6, 2, 4, 8\)",
    ),
    "v_pages of fewer pages": (
        dict(v_pages=mx.zeros((5, HEADS, PAGE, DIM))),
        "where num_pages = 6 from k_pages",
    ),
    "mixed dtypes": (
        dict(v_pages=pages(mx.float16)),
        "v_pages must be float32, the dtype of q; got float16",
    ),
    "integers": (
        dict(q=mx.zeros((2, HEADS, DIM), mx.int32)),
        "q must be float32, float16 or bfloat16; got int32",
    ),
    "heads that do not divide": (
        dict(q=mx.zeros((2, 3, DIM))),
        "must be a multiple of num_kv_heads = 2 from k_pages; got 3",
    ),
    "an odd head_dim": (
        dict(q=mx.zeros((2, HEADS, 4)), k_pages=mx.zeros((PAGES, HEADS, PAGE, 4))),
        "a multiple of 8 up to 256, or 512; got 4",
    ),
    "too few query tokens": (dict(q=rows(1)), "q must have 2 tokens, one for each sequence; got 1"),
    "too many query tokens": (
        dict(cu_seqlens_q=[0, 1, 3]),
        "q must have 3 tokens, as many as cu_seqlens_q ends with; got 2",
    ),
    "a page outside the pool": (
        dict(block_tables=[[4, 6], [2, -1]]),
        r"page ids in \[0, 6\), the pages of the pool; got 6 at \[0, 1\]",
    ),
    "a length without pages": (dict(context_lens=[9, 3]), "covered by the pages"),
    "a page missing": (dict(context_lens=[7, 5]), "covered by the pages"),
    "a query longer than its context": (
        dict(q=rows(5), cu_seqlens_q=[0, 1, 5]),
        "must not be longer than its context",
    ),
    "offsets that decrease": (dict(cu_seqlens_q=[0, 3, 2]), "cu_seqlens_q must not decrease"),
    "an empty batch": (
        dict(q=mx.zeros((0, HEADS, DIM)), block_tables=np.zeros((0, 1), np.int32), context_lens=[]),
        "at least one sequence",
    ),
    "pages of size 0": (
        dict(k_pages=mx.zeros((PAGES, HEADS, 0, DIM)), v_pages=mx.zeros((PAGES, HEADS, 0, DIM))),
        "page_size of at least 1",
    ),
    "a softcap of 0": (dict(softcap=0.0), "softcap must be finite and greater than 0"),
    "a scale of NaN": (dict(scale=float("nan")), "scale must be finite"),
    "one slope too many": (
        dict(alibi_slopes=mx.zeros(3)),
        r"alibi_slopes must have shape \[num_q_heads\], where num_q_heads = 2",
    ),
    "integer sinks": (
        dict(sinks=mx.zeros(2, mx.int32)),
        "sinks must be float32, float16 or bfloat16",
    ),
    "a short mask": (
        dict(mask=mx.zeros((2, 6))),
        r"a column for each key of the longest context \(7\); got 6",
    ),
    "a mask of other tokens": (
        dict(mask=mx.zeros((3, 7))),
        r"mask must have shape \[tokens, keys\]",
    ),
    "a mask of integers": (
        dict(mask=mx.zeros((2, 7), mx.int32)),
        r"mask \(unless bool\) must be float32",
    ),
    "no tables": (dict(block_tables=None), "must be given, or a plan"),
    "a window of 0": (
        dict(sliding_window=0),
        "sliding_window must be a whole number of at least 1",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_a_typed_error(name):
    change, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=r"^\[paged_attention\] .*" + message):
        fast.paged_attention(**attention_call(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_q_heads=4), "num_q_heads = 2 of q; got 4"),
        (dict(page_size=8), "page_size = 4 of k_pages; got 8"),
        (dict(block_tables=[[4, 1], [9, -1]]), r"page ids in \[0, 6\)"),
        (dict(block_tables=[[4, 1]], context_lens=[7]), "tokens = 2 of q; got 1"),
    ],
)
def test_a_plan_for_other_arrays_is_refused(change, message):
    call = attention_call()
    options = dict(
        block_tables=call["block_tables"],
        context_lens=call["context_lens"],
        num_q_heads=HEADS,
        num_kv_heads=HEADS,
        page_size=PAGE,
    )
    plan = fast.plan(**(options | change))
    arrays = call["q"], call["k_pages"], call["v_pages"]
    with pytest.raises(ValueError, match=message):
        fast.paged_attention(*arrays, plan=plan)
    with pytest.raises(ValueError, match=message):
        fast.paged_attention(*arrays, plan=plan.array)
    if BUILT:
        traced = mx.compile(lambda q, k, v, words: fast.paged_attention(q, k, v, plan=words))
        with pytest.raises(RuntimeError, match=message):
            mx.eval(traced(*arrays, plan.array))
    assert mx.array_equal(fast.paged_attention(**call), fast.paged_attention(**call))


def test_words_that_are_no_plan_are_refused():
    call = attention_call()
    arrays = call["q"], call["k_pages"], call["v_pages"]
    with pytest.raises(ValueError, match="must be the array of an AttentionPlan"):
        fast.paged_attention(*arrays, plan=mx.array([0] * 64, mx.int32))
    with pytest.raises(ValueError, match="must be the array of an AttentionPlan"):
        fast.paged_attention(*arrays, plan=mx.zeros(64, mx.int32))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([rows(2)], []), "one array for each part"),
        (([], []), "one array for each part"),
        (([rows(2)], [mx.zeros((3, HEADS))]), r"lses must have shape \[tokens, num_q_heads\]"),
        (([rows(2)], [mx.zeros((2, HEADS), mx.float16)]), "lses must be float32"),
    ],
)
def test_states_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=r"\[merge_states\] .*" + message):
        fast.merge_states(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=rows(1, dim=V_DIM)), r"k must have shape \[tokens, num_kv_heads, head_dim\]"),
        (dict(v=rows(2)), "where tokens = 1 from k"),
        (dict(k=rows(1, mx.float16)), "k must be float32, the dtype of k_pages; got float16"),
        (dict(slot_mapping=[24]), "less than num_pages \\* page_size = 24; got 24"),
        (dict(slot_mapping=[0, 1]), "where tokens = 1 from k"),
        (dict(k_pages=mx.zeros((6, 8))), r"k_pages must have shape"),
    ],
)
def test_a_bad_write_is_refused(change, message):
    call = dict(k=rows(1), v=rows(1), k_pages=pages(), v_pages=pages(), slot_mapping=[0]) | change
    with pytest.raises(ValueError, match=r"\[write_pages\] .*" + message):
        fast.write_pages(**call)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(block_tables=[[6]]), r"page ids in \[0, 6\)"),
        (dict(context_lens=[5]), "covered by the pages"),
        (dict(context_lens=[-1]), "at least 0; got -1"),
        (dict(block_tables=[0]), "must have shape"),
        (dict(page_starts=[[0]]), "given together"),
        (dict(page_starts=[[0]], page_lens=[[5]], context_lens=[5]), "page_size = 4"),
    ],
)
def test_a_bad_gather_is_refused(change, message):
    call = dict(k_pages=pages(), v_pages=pages(), block_tables=[[0]], context_lens=[1]) | change
    with pytest.raises(ValueError, match=r"\[gather_pages\] .*" + message):
        fast.gather_pages(**call)


@pytest.mark.native
@pytest.mark.parametrize("beyond", [0, 1, 99])
def test_a_traced_slot_outside_the_pool_is_an_error_at_evaluation(beyond):
    num_pages, _, page_size, _ = pages().shape
    slots = mx.array([num_pages * page_size + beyond], mx.int32)
    write = mx.compile(lambda k, pages, slots: _ext.write_pages([k, k], [pages, pages], slots))
    with pytest.raises(RuntimeError, match="slot_mapping must be less than"):
        mx.eval(write(rows(1), pages(), slots))
