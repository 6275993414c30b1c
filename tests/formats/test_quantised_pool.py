"""Pools whose pages are quantised: what they hold is what the oracle of the formats says, for good."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import OutOfPages, PageAllocator, PagePool, PageTable, paged_attention, share_prefix
from paged_mlx.pages.observers import Pool
from paged_mlx.pages.table import append_batch
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.reference import dtypes, formats, oracle, yardstick
from paged_mlx.testing.backends import from_mlx, to_mlx

PAIRS = [
    ("q8", "q8"),
    ("q8", "q4"),
    ("q4", "q4"),
    ("q4", "q8"),
    ("q4", None),
    ("q8", None),
    (None, "q8"),
    (None, "q4"),
]
HEADS, SIZE, DIM, V_DIM = 2, 8, 64, 32


class Follower(Pool):
    """Tells a shadow which pages are copied and freed."""

    page_size, num_pages, wants_freed = SIZE, 2**20, True

    def __init__(self, shadow):
        self.tokens, self.sealed = shadow.tokens, shadow.sealed
        shadow.pool.allocator.attach(self)

    def copied(self, pairs):
        for source, target in pairs:
            self.tokens[target] = [[a.copy() for a in kv] for kv in self.tokens[source]]
            if source in self.sealed:
                self.sealed[target] = self.sealed[source]

    def freed(self, page_ids):
        for page in page_ids:
            self.tokens.pop(page, None)
            self.sealed.pop(page, None)

    def grow(self, num_pages):
        pass

    shrink = grow


class Shadow:
    """A pool, and what its pages should read as, from the oracle of the formats."""

    def __init__(self, formats_of, num_pages=24, dtype="float32", **options):
        k_format, v_format = self.formats = formats_of
        self.dtype = dtype
        self.pool = PagePool(
            2, num_pages, SIZE, HEADS, DIM, getattr(mx, dtype), V_DIM,
            k_format=k_format, v_format=v_format, **options,
        )  # fmt: skip
        self.rng = np.random.default_rng(7)
        self.tokens: dict[int, list] = {}  # page -> [layer][k or v][SIZE, HEADS, dim], as written
        self.sealed: dict[int, list] = {}  # page -> the same, as it reads since it was sealed
        self.follower = Follower(self)

    # Doing

    def append(self, *appends, write=True):
        """Append to tables, write every layer, and attend; ``(table, tokens)`` each."""
        tables, counts = zip(*appends)
        appended = append_batch(tables, counts, self.pool.allocator)
        self.note_sealed()
        if write:
            self.write(appended.slots)
        return appended

    def write(self, slots):
        x = [
            [self.draw(len(slots), dim) for dim in (DIM, V_DIM)]
            for _ in range(self.pool.num_layers)
        ]
        for layer, (k, v) in enumerate(x):
            arrays = (to_mlx(dtypes.encode(a, self.dtype), self.dtype) for a in (k, v))
            self.pool.write(layer, *arrays, slots)
        for i, slot in enumerate(np.asarray(slots).tolist()):
            page, offset = divmod(slot, SIZE)
            if page not in self.tokens:
                shapes = (SIZE, HEADS, DIM), (SIZE, HEADS, V_DIM)
                self.tokens[page] = [[np.zeros(s, np.float32) for s in shapes] for _ in x]
            for layer, kv in enumerate(x):
                for side in (0, 1):
                    self.tokens[page][layer][side][offset] = kv[side][i]
        self.note_sealed()

    def draw(self, count, dim):
        x = self.rng.standard_normal((count, HEADS, dim)).astype(np.float32)
        x[..., 0] *= 20
        return dtypes.round_to(x, self.dtype)

    def note_sealed(self, tokens=SIZE):
        """Pages that were sealed since read as the oracle quantises them from now on."""
        for page in self.pool.allocator.sealed:
            if page in self.tokens and page not in self.sealed:
                self.sealed[page] = [self.quantised(kv, tokens) for kv in self.tokens[page]]

    # Expecting

    def quantised(self, kv, tokens):
        return [self.k_page(kv[0], tokens), self.v_tokens(kv[1])]

    def k_page(self, x, tokens):
        pages = np.moveaxis(x, 0, 1)[None]
        stored = formats.quantise_channels(pages, np.array([tokens]), self.dtype)
        return np.moveaxis(formats.dequantise_channels(*stored, self.dtype)[0], 0, 1)

    def v_tokens(self, x):
        name = self.formats[1]
        if name == "q8":
            return formats.dequantise_tokens(
                *formats.quantise_tokens(x, 8, self.dtype), 8, self.dtype
            )
        if name == "q4":
            stored = formats.quantise_tokens(self.turned(x), 4, self.dtype)
            return formats.rotate(formats.dequantise_tokens(*stored, 4, self.dtype))
        return x

    def turned(self, x):
        return dtypes.round_to(formats.rotate(x), self.dtype)

    def page(self, page, layer):
        """K and V of a page as it should read, float32 ``[SIZE, HEADS, dim]``."""
        k, v = self.tokens[page][layer]
        if self.formats[0] == "q4":
            if page in self.sealed:
                return self.sealed[page][layer]
            return k, formats.rotate(self.turned(v)) if self.formats[1] == "q4" else v
        if self.formats[0] == "q8":
            k = formats.dequantise_tokens(*formats.quantise_tokens(k, 8, self.dtype), 8, self.dtype)
        return k, self.v_tokens(v)

    def context(self, table, layer):
        parts = [
            [
                a[: entry.logical_end - entry.logical_start]
                for a in self.page(entry.physical_page_id, layer)
            ]
            for entry in table.entries
        ]
        return tuple(np.concatenate(side) for side in zip(*parts))

    def check(self, *tables, caches=()):
        """The pool reads, and attends to, what the oracle says; its bookkeeping agrees."""
        self.pool.check(tables, caches)
        for table in tables:
            if not table.num_tokens:
                continue
            for layer in range(self.pool.num_layers):
                self.check_table(table, layer)

    def check_table(self, table, layer):
        k, v = self.context(table, layer)
        pages = [[entry.physical_page_id for entry in table.entries]]
        starts = [[entry.logical_start for entry in table.entries]]
        lens = [[entry.logical_end - entry.logical_start for entry in table.entries]]
        found = self.pool[layer].gather(
            pages, [table.num_tokens], page_starts=starts, page_lens=lens
        )
        for array, expected in zip(found, (k, v)):
            read = dtypes.decode(from_mlx(array), self.dtype)[0].swapaxes(0, 1)
            unit = dtypes.EPSILON[self.dtype] * np.abs(expected).max()
            assert np.abs(read - expected).max() <= max(unit, 1e-6 * np.abs(expected).max())
        q = dtypes.round_to(self.rng.standard_normal((1, 4, DIM)).astype(np.float32), self.dtype)
        out = paged_attention(
            to_mlx(dtypes.encode(q, self.dtype), self.dtype), [table], self.pool[layer]
        )
        exact, own = oracle.attention(q, k, v)[0], yardstick.attention(q, k, v, self.dtype)[0]
        scores = {"largest_score": 20 * DIM, "score_terms": DIM}
        out = dtypes.decode(from_mlx(out), self.dtype)
        verdict = yardstick.judge(out, exact, own, self.dtype, **scores)
        assert verdict, verdict.reason


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_read_as_the_oracle_quantises_them(pair, dtype):
    shadow, table, other = Shadow(pair, dtype=dtype), PageTable(SIZE), PageTable(SIZE)
    for counts in ((3, 1), (8, 17), (16, 1), (1, 1), (4, 2), (1, 1)):
        shadow.append((table, counts[0]), (other, counts[1]))
        shadow.check(table, other)
    assert table.num_tokens == 33 and not table.is_ragged


def test_a_page_that_a_step_fills_is_quantised_as_it_is_written():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    shadow.append((table, 2 * SIZE + 3))
    assert sorted(shadow.pool.allocator.sealed) == table.page_ids[:2]
    assert shadow.pool.open_pages.num_open == 1
    shadow.check(table)


def test_a_page_that_fills_over_several_steps_is_sealed_by_the_next_append():
    shadow, table = Shadow(("q4", None)), PageTable(SIZE)
    shadow.append((table, 5))
    shadow.append((table, 3))
    assert not shadow.pool.allocator.sealed and shadow.pool.open_pages.num_open == 1
    shadow.append((table, 1))
    assert shadow.pool.allocator.sealed == {table.page_ids[0]}
    assert (shadow.pool.open_pages.num_open, shadow.pool.open_pages.num_slots) == (1, 1)
    shadow.check(table)


def test_a_page_is_full_when_every_layer_has_written_it():
    shadow, table, other = Shadow(("q4", None)), PageTable(SIZE), PageTable(SIZE)
    shadow.append((table, 5))
    slots = table.append_tokens(3, shadow.pool.allocator).slots
    k, v = mx.zeros((3, HEADS, DIM)), mx.zeros((3, HEADS, V_DIM))
    shadow.pool.write(0, k, v, slots)
    assert not shadow.pool.open_pages.due() and shadow.pool.open_pages.is_awaiting
    shadow.pool.write(1, k, v, slots)
    assert shadow.pool.open_pages.due() and not shadow.pool.open_pages.is_awaiting
    other.append_tokens(1, shadow.pool.allocator)
    assert shadow.pool.allocator.sealed == set(table.page_ids)


def test_a_rewind_into_a_sealed_page_makes_the_table_ragged_and_quantises_nothing():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    shadow.append((table, SIZE + 2))
    table.truncate(SIZE - 3)
    assert table.is_sealed and shadow.pool.open_pages.num_open == 0
    shadow.append((table, 4))
    assert table.is_ragged and table.num_pages == 2
    shadow.check(table)
    before = [from_mlx(a) for a in shadow.pool.state[0][:3]]
    table.truncate(2)
    shadow.append((table, 9))
    shadow.check(table)
    page = table.page_ids[0]
    for a, b in zip(before, shadow.pool.state[0]):
        np.testing.assert_array_equal(a[page], from_mlx(b)[page])


def test_a_rewind_in_an_open_page_writes_over_it():
    shadow, table, other = Shadow(("q4", "q8")), PageTable(SIZE), PageTable(SIZE)
    shadow.append((table, 5))
    shadow.append((table, 3))  # full, and not sealed yet
    table.truncate(6)
    shadow.append((table, 1))
    assert not shadow.pool.allocator.sealed and table.num_pages == 1
    shadow.append((other, 3))
    assert not shadow.pool.allocator.sealed  # it is not full any more
    shadow.append((table, 1))
    shadow.append((table, 1))
    assert shadow.pool.allocator.sealed == {table.page_ids[0]}
    shadow.check(table, other)


def test_a_fork_of_an_open_page_copies_it_open_and_one_of_sealed_pages_copies_nothing():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    shadow.append((table, SIZE + 3))
    fork = table.fork()
    appended = shadow.append((fork, 2))
    assert appended.copies and shadow.pool.open_pages.num_open == 2
    shadow.append((table, 7), (fork, 7))
    shadow.append((table, 1), (fork, 1))
    shadow.check(table, fork)
    whole = PageTable(SIZE)
    share_prefix(table, whole, SIZE)
    assert not shadow.append((whole, 1)).copies
    shadow.check(table, fork, whole)


def test_a_sealed_page_that_is_copied_is_copied_as_codes():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    shadow.append((table, SIZE))
    shadow.pool.copy([(table.page_ids[0], 20)])
    page = table.page_ids[0]
    for array in shadow.pool.state[1][:6]:
        np.testing.assert_array_equal(from_mlx(array)[20], from_mlx(array)[page])


def test_a_freed_page_is_unknown_again_and_its_slot_another_s():
    shadow, table = Shadow(("q4", None)), PageTable(SIZE)
    shadow.append((table, SIZE + 4))
    table.release()
    assert not shadow.pool.allocator.sealed and shadow.pool.open_pages.num_open == 0
    shadow.append((table, 4))
    shadow.append((table, SIZE + 4))
    shadow.check(table)
    assert shadow.pool.open_pages.num_slots <= 2


def test_pages_that_only_a_cache_holds_are_sealed_when_slots_run_short():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    cache = PrefixCache(shadow.pool.allocator)
    shadow.append((table, SIZE + 3))
    cache.insert(list(range(SIZE + 3)), table, tail=True)
    tail = table.page_ids[1]
    table.release()
    assert shadow.pool.open_pages.is_open(tail)
    other = PageTable(SIZE)
    append_batch([other], [2], shadow.pool.allocator)
    assert tail in shadow.pool.allocator.sealed and shadow.pool.open_pages.num_slots == 1
    shadow.note_sealed(tokens=3)
    shadow.write(other.slots())
    again = PageTable(SIZE)
    assert cache.reuse([*range(SIZE + 3), 99], again) == SIZE + 3
    shadow.append((again, 3))
    shadow.check(other, again, caches=[cache])
    assert again.is_ragged


def test_the_formats_of_a_pool_stay():
    pool = PagePool(1, 4, SIZE, HEADS, DIM, k_format="q8")
    with pytest.raises(ValueError, match=r"^\[PagePool\] formats must stay q8/dense.*another pool"):
        pool.formats = ("q4", "q4")
    assert pool.formats == ("q8", None)


def test_sealing_is_refused_where_it_means_nothing():
    dense = PagePool(1, 4, SIZE, HEADS, DIM)
    with pytest.raises(ValueError, match=r"^\[PagePool.seal\] pool must have k_format"):
        dense.seal()
    shadow, table = Shadow(("q4", None)), PageTable(SIZE)
    shadow.append((table, 3), write=False)
    with pytest.raises(ValueError, match=r"^\[PagePool.seal\] page_ids must wait"):
        shadow.pool.seal(table.page_ids)
    shadow.write(table.slots())
    with pytest.raises(ValueError, match=r"^\[PagePool.seal\] page_ids must be open pages; got 9"):
        shadow.pool.seal([9])
    assert shadow.pool.seal(table.page_ids) == table.page_ids
    shadow.note_sealed(tokens=3)
    shadow.append((table, 2))
    assert table.is_ragged
    shadow.check(table)


def test_a_write_to_a_part_of_a_sealed_page_is_refused():
    shadow, table = Shadow(("q4", None)), PageTable(SIZE)
    appended = shadow.append((table, SIZE), write=False)
    k, v = mx.zeros((3, HEADS, DIM)), mx.zeros((3, HEADS, V_DIM))
    with pytest.raises(ValueError, match=r"^\[write\] slot_mapping must name all 8 slots"):
        shadow.pool.write(0, k, v, appended.slots[:3])
    shadow.write(appended.slots)
    shadow.check(table)


def test_tokens_that_do_not_fit_a_pool_with_open_pages_are_refused():
    pool, table = Shadow(("q4", None)).pool, PageTable(SIZE)
    slots = table.append_tokens(2, pool.allocator).slots
    k, v = mx.zeros((2, HEADS, DIM)), mx.zeros((2, HEADS, V_DIM))
    for wrong in ((k[:1], v), (k, v[..., :8]), (k.astype(mx.float16), v)):
        with pytest.raises(ValueError, match=r"^\[write\] [kv] must have"):
            pool.write(0, *wrong, slots)


def test_full_pages_wait_while_another_step_has_not_been_written():
    shadow = Shadow(("q4", "q4"))
    one, two, three = (PageTable(SIZE) for _ in range(3))
    shadow.append((one, 3), (two, 3))
    shadow.append((one, 5))
    plan_page = one.page_ids[0]
    later = append_batch([two], [1], shadow.pool.allocator)  # its plan is made, its layers wait
    shadow.append((three, 2))
    assert shadow.pool.open_pages.is_open(plan_page)
    shadow.write(later.slots)
    shadow.append((three, SIZE))
    assert not shadow.pool.open_pages.is_open(plan_page)
    shadow.check(one, two, three)


def test_growing_and_shrinking_keep_codes_and_open_pages():
    allocator = PageAllocator(4, SIZE, max_pages=24, slab_pages=3)
    shadow = Shadow(("q4", "q4"), num_pages=4, allocator=allocator)
    tables = [PageTable(SIZE) for _ in range(5)]
    for table in tables:
        shadow.append((table, SIZE + 2))
    assert allocator.total_pages > 4 and shadow.pool.open_pages.num_open == 5
    shadow.check(*tables)
    for table in tables[1:]:
        table.release()
    allocator.shrink()
    assert shadow.pool.num_pages == allocator.total_pages < 10
    assert shadow.pool.open_pages.num_slots == shadow.pool.state[0][-1].shape[0] == 1
    shadow.append((tables[0], SIZE))
    shadow.check(tables[0])


def test_an_append_whose_open_page_finds_no_memory_changes_nothing():
    shadow, table, other = Shadow(("q4", "q4")), PageTable(SIZE), PageTable(SIZE)
    shadow.append((table, 3))
    shadow.pool.memory_limit = 0
    with pytest.raises(OutOfPages, match="memory_limit"):
        other.append_tokens(3, shadow.pool.allocator)
    assert other.num_tokens == 0 and shadow.pool.allocator.num_used == 1
    assert not other.append_tokens(SIZE, shadow.pool.allocator).copies  # a whole page needs none
    shadow.write(other.slots())
    shadow.check(table, other)


@pytest.mark.parametrize("pair", [("q4", "q4"), ("q8", "q8"), (None, "q8"), ("q4", None)])
def test_a_freed_page_is_wiped_in_its_format(pair):
    shadow, table = Shadow(pair, wipe_freed=7.5), PageTable(SIZE)
    shadow.append((table, SIZE + 3))
    full, part = table.page_ids
    slot = shadow.pool.open_pages.slot_of(part) if pair[0] == "q4" else None
    table.release()
    k, v = (np.array(a) for a in shadow.pool[1].gather([[full]], [SIZE]))
    assert np.abs(k - 7.5).max() < 1e-3 and np.abs(v - 7.5).max() < 0.6
    if slot is not None:
        opened = shadow.pool.state[1][-2]
        assert (np.array(opened[slot]) == 7.5).all()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
def test_fresh_pages_read_as_the_fill(pair):
    pool = Shadow(pair, fill=float("nan")).pool
    k, v = pool[0].gather([[3]], [SIZE])
    assert mx.isnan(k).all() and mx.isnan(v).all()
    k, v = Shadow(pair).pool[1].gather([[3]], [SIZE])
    assert not k.any() and not v.any()
    if pair[1] == "q4":
        with pytest.raises(ValueError, match=r"^\[PagePool\] fill must be 0 or NaN"):
            Shadow(pair, fill=1.0)


def test_a_page_of_values_that_are_not_finite_reads_as_nan_there_and_nowhere_else():
    pool, table = (
        PagePool(1, 4, SIZE, HEADS, DIM, mx.float32, k_format="q4", v_format="q4"),
        PageTable(SIZE),
    )
    slots = table.append_tokens(2 * SIZE, pool.allocator).slots
    k, v = (mx.random.normal((2 * SIZE, HEADS, DIM)) for _ in range(2))
    k[3, 1, 5] = mx.nan
    v[3, 1, 5] = mx.inf
    pool.write(0, k, v, slots)
    read_k, read_v = (np.array(a[0]) for a in pool[0].gather([table.page_ids], [2 * SIZE]))
    wrong = np.isnan(read_k)
    assert wrong[1, :SIZE, 5].all() and wrong.sum() == SIZE
    wrong = np.isnan(read_v)
    assert wrong[1, 3].all() and wrong.sum() == DIM


def test_a_compiled_step_reads_open_pages_and_may_not_write_them():
    shadow, table = Shadow(("q4", "q4")), PageTable(SIZE)
    pool = shadow.pool
    shadow.append((table, SIZE + 3))
    plan = pool.plan([table], num_q_heads=4)
    q = mx.random.normal((1, 4, DIM))

    def attend(q, words):
        return pool[0].attend(q, words)

    compiled = mx.compile(attend, inputs=pool.state, outputs=pool.state)
    np.testing.assert_allclose(compiled(q, plan.array), pool[0].attend(q, plan), atol=1e-5)

    def write(k, v, slots):
        pool.write(0, k, v, slots)
        return k

    k, v = mx.zeros((1, HEADS, DIM)), mx.zeros((1, HEADS, V_DIM))
    refused = mx.compile(write, inputs=pool.state, outputs=pool.state)
    with pytest.raises(ValueError, match="slot_mapping must be known when the step is built"):
        refused(k, v, mx.array([SIZE + 3]))
    pool.reset_versions()


def test_a_compiled_step_writes_pages_whose_tokens_are_quantised_one_by_one():
    shadow, table = Shadow(("q8", "q4")), PageTable(SIZE)
    pool = shadow.pool
    shadow.append((table, 3))
    slots = table.append_tokens(1, pool.allocator).slots
    k, v = (mx.random.normal((1, HEADS, dim)) for dim in (DIM, V_DIM))

    def write(k, v, slots):
        pool.write(0, k, v, slots)
        return k

    mx.compile(write, inputs=pool.state, outputs=pool.state)(k, v, mx.array(slots))
    read = pool[0].gather([table.page_ids], [4])
    assert mx.abs(read[0][0, :, 3] - k[0]).max() < 0.05


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "pair", [("q4", "q4"), ("q4", None), ("q8", "q4")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def test_any_order_of_page_operations_keeps_what_pages_read_as(pair, seed):
    rng = np.random.default_rng(seed)
    shadow = Shadow(pair, num_pages=40)
    tables = [PageTable(SIZE) for _ in range(3)]
    for _ in range(30):
        table = tables[rng.integers(len(tables))]
        what = rng.choice(
            ["append", "append", "append", "batch", "truncate", "fork", "release", "share"]
        )
        try:
            if what == "append":
                shadow.append((table, int(rng.integers(1, 12))))
            elif what == "batch":
                shadow.append(*((t, int(rng.integers(1, 4))) for t in tables))
            elif what == "truncate":
                table.truncate(int(rng.integers(0, table.num_tokens + 1)))
            elif what == "fork" and len(tables) < 5:
                tables.append(table.fork())
            elif what == "release":
                table.release()
            elif what == "share" and len(tables) < 5:
                fresh = PageTable(SIZE)
                length = int(rng.integers(0, table.num_tokens + 1))
                share_prefix(table, fresh, length, rng.choice(["copy", "seal"]))
                tables.append(fresh)
        except OutOfPages:
            table.release()
        shadow.note_sealed()
        if rng.random() < 0.3:
            shadow.check_table(table, 0) if table.num_tokens else None
    shadow.check(*tables)
