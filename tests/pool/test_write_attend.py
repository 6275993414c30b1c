"""write_attend and fetch_pages: one node each for what took several, on the CPU and as launches."""

import io

import mlx.core as mx
import numpy as np
import pytest
from first_use_gpu import gpu, wrong
from metal_on_host import metal_on_host
from paged_mlx import fast, operations
from paged_mlx._native import _ext

PAGES, HEADS, PAGE, DIM, V_DIM = 12, 2, 8, 64, 32
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
HELD, TABLES = [19, 6], np.array([[7, 2, 9, 4], [0, 11, -1, -1]], np.int32)


def normal(shape, seed, dtype=mx.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(dtype)


def in_some_layout(x, layout):
    """``x`` [batch, heads, tokens, dim] with other strides, as models come by them."""
    if layout == "token major":
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "dim first":
        return mx.contiguous(x.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    if layout == "a slice":
        return mx.concatenate([x, x + 1], axis=2)[:, :, : x.shape[2]]
    return mx.contiguous(x)


class Step:
    """Two sequences, ``n`` new tokens each, on pages with poison in every slot not written."""

    def __init__(self, n=1, dtype=mx.float32, layout="head major", q_heads=4 * HEADS, seed=0):
        self.n, self.dtype = n, dtype
        self.held, self.ends = np.array(HELD, np.int32), np.array(HELD, np.int32) + n
        positions = self.held[:, None] + np.arange(n)
        pages = np.take_along_axis(TABLES, positions // PAGE, axis=1)
        self.slots = (pages * PAGE + positions % PAGE).astype(np.int32).ravel()
        self.k_pages, self.v_pages = (self._pages(dim, seed + dim) for dim in (DIM, V_DIM))
        shape = (2, HEADS, n)
        self.k, self.v, self.q = (
            in_some_layout(normal(s, seed + i, dtype), layout)
            for i, s in enumerate(((*shape, DIM), (*shape, V_DIM), (2, q_heads, n, DIM)))
        )
        self.plan = fast.plan(
            TABLES, self.ends, num_q_heads=q_heads, num_kv_heads=HEADS, page_size=PAGE,
            cu_seqlens_q=[0, n, 2 * n], dtype=dtype, head_dim=DIM, v_head_dim=V_DIM,
        )  # fmt: skip

    def _pages(self, dim, seed):
        pages = np.full((PAGES, HEADS, PAGE, dim), np.nan, np.float32)
        values = np.random.default_rng(seed).standard_normal(pages.shape)
        for table, held in zip(TABLES, HELD):
            for position in range(held):
                at = table[position // PAGE], slice(None), position % PAGE
                pages[at] = values[at]
        pages = mx.array(pages).astype(self.dtype)
        mx.eval(pages)
        return pages

    def write_attend(self, **options):
        out, *pages = _ext.write_attend(
            self.q, self.k_pages, self.v_pages, self.plan.array, self.k, self.v,
            mx.array(self.slots), 0.3, options.get("sinks"),
        )  # fmt: skip
        return out, *pages

    def operation(self):
        """``write_attend`` through what proves kernels."""
        return operations.write_attend(
            self.q, self.k_pages, self.v_pages, self.plan.array, self.k, self.v,
            mx.array(self.slots), 0.3, None, plan=self.plan,
        )  # fmt: skip

    def one_by_one(self, **options):
        """The same by the separate operations."""
        rows = [
            x.swapaxes(1, 2).reshape(2 * self.n, -1, x.shape[3]) for x in (self.q, self.k, self.v)
        ]
        pages = fast.write_pages(*rows[1:], self.k_pages, self.v_pages, self.slots)
        out = fast.paged_attention(rows[0], *pages, plan=self.plan, scale=0.3, **options)
        return out.reshape(2, self.n, -1, V_DIM).swapaxes(1, 2), *pages

    def tables(self, **changes):
        given = dict(
            block_tables=TABLES, starts=self.held, counts=None, num_tokens=self.n, written=False,
            num_freed=0, page_size=PAGE, length=int(self.ends.max()), skip=0,
            page_starts=None, page_lens=None,
        )  # fmt: skip
        return _ext.FetchTables(**(given | changes))

    def fetch(self, **changes):
        tables = self.tables(**changes)
        pages = self.k_pages, self.v_pages
        return _ext.Fetches().fetch(0, "me", tables, *pages, self.k, self.v)[:2]


def bits(x):
    x = np.array(x.astype(mx.float32))
    return x.view(np.uint32)


LAYOUTS = ["head major", "token major", "dim first", "a slice"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 5])
def test_one_node_has_the_bits_of_a_write_and_an_attention(n, layout, dtype):
    expected = [bits(x) for x in Step(n, dtype, layout).one_by_one()]
    found = [bits(x) for x in Step(n, dtype, layout).write_attend()]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_the_pages_are_written_in_place():
    step = Step(5)
    before = _ext.data_address(step.k_pages), _ext.data_address(step.v_pages)
    _, *pages = step.write_attend()
    mx.eval(pages)
    assert tuple(map(_ext.data_address, pages)) == before


def test_sinks_are_the_attentions():
    sinks = normal((4 * HEADS,), 5)
    (found, *_), (expected, *_) = (f(sinks=sinks) for f in (Step().write_attend, Step().one_by_one))
    assert np.array_equal(bits(found), bits(expected))


def test_without_tokens_the_call_only_attends():
    step, sinks = Step(5), normal((4 * HEADS,), 5)
    out, *pages = step.write_attend(sinks=sinks)
    again, *_ = _ext.write_attend(step.q, *pages, step.plan.array, None, None, None, 0.3, sinks)
    assert np.array_equal(bits(again), bits(out))


def test_tokens_in_another_dtype_are_written_in_the_pages():
    step, expected = Step(dtype=mx.float16), Step(dtype=mx.float16)
    step.k, step.v = step.k.astype(mx.float32), step.v.astype(mx.float32)
    found, wanted = step.write_attend(), expected.write_attend()
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, wanted))


@pytest.mark.native
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=mx.zeros((2, HEADS, 1, DIM + 8))), "k must have shape"),
        (dict(v=mx.zeros((2, HEADS, 2, V_DIM))), "v must have shape"),
        (dict(k=mx.zeros((2, HEADS, 1, DIM), mx.int32)), "k must be float32"),
        (dict(q=mx.zeros((3, 4 * HEADS, 1, DIM))), "plan must be made for tokens = 3"),
        (dict(q=mx.zeros((2, 4 * HEADS, DIM))), "q must have shape"),
        (dict(slots=np.zeros(3, np.int32)), "slots must have one number for each token"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    step = Step()
    vars(step).update(change)
    with pytest.raises(ValueError, match=r"^\[write_attend\] " + message):
        step.write_attend()


@pytest.mark.parametrize("name", ["q", "k"])
def test_an_array_that_is_being_traced_is_refused(name):
    step = Step()
    given = getattr(step, name)

    def traced(x):
        setattr(step, name, x)
        return step.write_attend()[0]

    with pytest.raises(ValueError, match=rf"\[write_attend\] {name} must not be traced"):
        mx.compile(traced)(given)


def test_handles_of_traced_tokens_are_refused():
    step = Step()

    def traced(k):
        step.k = k
        return step.fetch()[0] * 1

    with pytest.raises(ValueError, match=r"\[fetch_pages\] k must not be traced"):
        mx.compile(traced)(step.k)


# Handles


def expected_columns(step):
    """K and V of both sequences, the newest tokens of both in the last columns."""
    _, *pages = step.one_by_one()
    shift = int(step.ends[0] - step.ends[1])
    k, v = fast.gather_pages(*pages, TABLES, step.ends)
    return [mx.stack([x[0], mx.roll(x[1], shift, axis=1)]) for x in (k, v)]


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, skip", [(1, 0), (5, 0), (5, 3)])
def test_handles_are_the_pages_and_the_new_tokens(n, skip, layout, dtype):
    step = Step(n, dtype, layout)
    k, v = step.fetch(skip=skip)
    assert k.source == "me" and (k.is_key, v.is_key) == (True, False)
    for found, expected in zip((k, v), expected_columns(Step(n, dtype, layout))):
        assert np.array_equal(bits(found), bits(expected[:, :, skip:]))
        assert np.array_equal(bits(found * 1), bits(expected[:, :, skip:]))


def test_a_handle_writes_no_page():
    step = Step(5)
    before = bits(step.k_pages)
    mx.eval(step.fetch())
    assert np.array_equal(bits(step.k_pages), before)


def test_padding_is_left_out_of_handles():
    k, _ = Step(5).fetch(counts=np.array([5, 2], np.int32))
    expected, _ = expected_columns(Step(5))
    assert np.array_equal(bits(k[0]), bits(expected[0]))
    assert np.array_equal(bits(k[1, :, :-3]), bits(expected[1, :, :-3]))
    assert not bits(k[1, :, -3:]).any()


@pytest.mark.parametrize("counts", [None, [5, 2]])
def test_tokens_that_are_written_come_from_the_pages(counts):
    counts = None if counts is None else np.array(counts, np.int32)
    step = Step(5)
    expected = step.fetch(counts=counts)
    mx.eval(expected)
    _, *pages = step.write_attend()
    found = _ext.Fetches().fetch(0, "me", step.tables(counts=counts, written=True), *pages)[:2]
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, expected))


def test_pages_that_were_given_back_take_no_columns():
    step = Step(5)
    k, *_ = _ext.Fetches().fetch(
        0, "me", step.tables(block_tables=TABLES[:1], starts=step.held[:1], num_freed=1, length=16),
        step.k_pages, step.v_pages, step.k[:1], step.v[:1],
    )  # fmt: skip
    expected, _ = expected_columns(Step(5))
    assert np.array_equal(bits(k[0]), bits(expected[0, :, 8:24]))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_handle_in_float32_is_one_still(dtype):
    step = Step(1, dtype)
    k, v = step.fetch()
    wide, narrow = k.astype(mx.float32), k.astype(mx.float16)
    assert type(wide) is type(k) and wide.source == "me" and wide.is_key
    assert type(narrow) is mx.array
    assert _ext.source_of(wide, v.astype(mx.float32)) == "me"
    assert wide.dtype == mx.float32 and np.array_equal(bits(wide), bits(k))


def test_handles_have_the_dtype_of_the_tokens():
    step = Step(dtype=mx.float16)
    step.k = step.k.astype(mx.float32)
    k, v = step.fetch()
    assert (k.dtype, v.dtype) == (mx.float32, mx.float16)
    assert np.array_equal(bits(k), bits(expected_columns(Step(dtype=mx.float16))[0]))


@pytest.mark.native
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(starts=np.zeros(3, np.int32)), r"\[FetchTables\] starts must have 2 lengths"),
        (dict(skip=99), r"\[FetchTables\] starts must have 2 lengths.* and skip be at most"),
        (
            dict(num_tokens=0),
            r"\[fetch_pages\] k and v must be given if the tables have new tokens",
        ),
        (dict(num_tokens=2), r"\[fetch_pages\] k must have 2 tokens of 2 sequences"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match="^" + message):
        Step().fetch(**change)


# As Metal launches


@pytest.mark.native
@pytest.mark.parametrize("n, moved", [(1, 0), (5, 2)])
def test_kernels_are_given_contiguous_tokens(n, moved):
    def count(*arrays):
        dot = io.StringIO()
        mx.export_to_dot(dot, *arrays)
        return [dot.getvalue().count(f'"{name}"') for name in ("Contiguous", "Transpose")]

    step = Step(n, layout="dim first")
    mx.eval(step.q, step.k, step.v)
    assert count(step.write_attend()[0]) == count(*step.fetch()) == [0, 0]
    with metal_on_host():
        assert count(step.write_attend()[0]) == [3, 3 * moved]
        assert count(*step.fetch()) == [2, 2 * moved]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("traced", [True, False], ids=["built for kernels", "built for the CPU"])
def test_one_node_launches_a_write_and_an_attention(n, layout, traced):
    expected = Step(n, mx.float16, layout).one_by_one()
    mx.eval(expected)
    step = Step(n, mx.float16, layout)
    built = None if traced else step.write_attend(sinks=None)
    with metal_on_host() as launches:
        found = step.write_attend() if traced else built
        mx.eval(found)
    assert launches.kernels == {"write_pages": 1, "attend_tile": 1} and launches.findings == []
    np.testing.assert_allclose(
        *(np.array(x[0].astype(mx.float32)) for x in (found, expected)), atol=2e-3
    )
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found[1:], expected[1:]))


@pytest.mark.parametrize("layout", ["head major", "dim first"])
@pytest.mark.parametrize("n, skip", [(1, 0), (5, 3)])
def test_handles_launch_a_gather_and_their_tokens(n, skip, layout):
    expected = expected_columns(Step(n, mx.float16, layout))
    mx.eval(expected)
    with metal_on_host() as launches:
        k, v = Step(n, mx.float16, layout).fetch(skip=skip)
        mx.eval(k, v)
    assert launches.kernels == {"gather_pages": 2, "write_pages": 2} and launches.findings == []
    for found, wanted in zip((k, v), expected):
        assert np.array_equal(bits(found), bits(wanted[:, :, skip:]))


def test_a_ragged_gather_is_launched_with_its_starts_and_lengths():
    starts = np.array([[0, 5, 8, 14]], np.int32)
    lens = np.array([[5, 3, 6, 5]], np.int32)

    def fetched():
        step = Step(1)
        tables = step.tables(
            block_tables=TABLES[:1], starts=step.held[:1], page_starts=starts, page_lens=lens
        )
        pages = [mx.nan_to_num(x, 7.0) for x in (step.k_pages, step.v_pages)]
        k, v, *_ = _ext.Fetches().fetch(0, "me", tables, *pages, step.k[:1], step.v[:1])
        mx.eval(k, v)
        return [bits(x) for x in (k, v)]

    expected = fetched()
    assert expected[0].any()
    with metal_on_host() as launches:
        found = fetched()
    assert launches.kernels["gather_pages"] == 2 and launches.findings == []
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_first_use_proves_what_the_nodes_launch(tmp_path):
    step = Step(1, mx.float16)
    with gpu(tmp_path) as launches:
        for _ in range(2):
            mx.eval(step.operation())
        assert launches.kernels["attend_tile"] == 3  # the proof, and the two calls
        tokens = step.k_pages, step.v_pages, step.k, step.v
        mx.eval(operations.fetch_pages(_ext.Fetches(), 0, "me", step.tables(), *tokens))
    (path,) = tmp_path.glob("*.json")
    assert all(op in path.read_text() for op in ("write_pages", "paged_attention", "gather_pages"))


@pytest.mark.parametrize("kernel", ["write_pages", "attend_vector"])
def test_a_node_with_a_wrong_kernel_runs_on_the_cpu(tmp_path, kernel):
    expected = Step(q_heads=2).one_by_one()
    mx.eval(expected)
    with gpu(tmp_path, change=wrong(kernel)), pytest.warns(RuntimeWarning, match="doctor"):
        found = Step(q_heads=2).operation()
        mx.eval(found)
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, expected))
