"""Whatever a caller passes by mistake, the page manager answers in its one form and changes nothing."""

import mlx.core as mx
import numpy as np
import pytest
from page_helpers import snapshot, table_of
from paged_mlx.errors import OutOfPages
from paged_mlx.pages.block_table import BlockTable, pack
from paged_mlx.pages.policies import BuddyPageAllocator, LRUPageAllocator, PageAllocator
from paged_mlx.pages.table import PageTable, append_batch, copy_on_write, share_prefix
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.hash import ExtraKey

ODD = {
    "True": True,
    "numpy bool": np.bool_(True),
    "float": 1.0,
    "NaN": float("nan"),
    "text": "1",
    "None": None,
    "list": [1],
    "array": np.array([1, 2]),
    "mx.array": mx.array([1, 2]),
    "negative": -1,
    "huge": 2**40,
    "beyond": 10**30,
    "object": object(),
}

# What each call does with one argument that should be a whole number.
NUMBERS = {
    "PageAllocator(total_pages)": lambda w, x: PageAllocator(x, 4),
    "PageAllocator(page_size)": lambda w, x: PageAllocator(4, x),
    "PageAllocator(max_pages)": lambda w, x: PageAllocator(1, 4, max_pages=x),
    "PageAllocator(slab_pages)": lambda w, x: PageAllocator(1, 4, slab_pages=x),
    "allocate_pages": lambda w, x: w.allocator.allocate_pages(x),
    "allocate_run": lambda w, x: w.allocator.allocate_run(x),
    "ref_count": lambda w, x: w.allocator.ref_count(x),
    "share_page": lambda w, x: w.allocator.share_page(x),
    "free_page": lambda w, x: w.allocator.free_page(x),
    "share_pages": lambda w, x: w.allocator.share_pages([x]),
    "free_pages": lambda w, x: w.allocator.free_pages([x]),
    "copy_pages": lambda w, x: w.allocator.copy_pages([(0, x)]),
    "hold": lambda w, x: w.allocator.hold(x, w.cache),
    "let_go": lambda w, x: w.allocator.let_go(x),
    "grow": lambda w, x: w.allocator.grow(x),
    "cache_page": lambda w, x: w.lru.cache_page(x),
    "uncache_page": lambda w, x: w.lru.uncache_page(x),
    "lru.evict": lambda w, x: w.lru.evict(x),
    "lru.forget": lambda w, x: w.lru.forget([x]),
    "PageTable": lambda w, x: PageTable(x),
    "append_tokens": lambda w, x: w.table.append_tokens(x, w.allocator),
    "append_batch": lambda w, x: append_batch([w.table], [x], w.allocator),
    "truncate": lambda w, x: w.table.truncate(x),
    "free_before": lambda w, x: w.table.free_before(x),
    "skip": lambda w, x: PageTable(4).skip(x, w.allocator),
    "adopt(num_tokens)": lambda w, x: PageTable(4).adopt([0], x, w.allocator),
    "adopt(page_ids)": lambda w, x: PageTable(4).adopt([x], 4, w.allocator),
    "logical_to_physical": lambda w, x: w.table.logical_to_physical(x),
    "slots(start)": lambda w, x: w.table.slots(x, 3),
    "slots(stop)": lambda w, x: w.table.slots(0, x),
    "leading_pages": lambda w, x: w.table.leading_pages(x),
    "share_prefix": lambda w, x: share_prefix(w.table, PageTable(4), x),
    "copy_on_write": lambda w, x: copy_on_write(w.table, x, w.allocator),
    "pack(query_lens)": lambda w, x: pack([w.table], [x]),
    "PrefixCache(window)": lambda w, x: PrefixCache(PageAllocator(4, 4), window=x),
    "PrefixCache(max_pages)": lambda w, x: PrefixCache(PageAllocator(4, 4), max_pages=x),
    "PrefixCache(max_events)": lambda w, x: PrefixCache(PageAllocator(4, 4), max_events=x),
    "evict": lambda w, x: w.cache.evict(x),
    "forget": lambda w, x: w.cache.forget([x]),
    "ExtraKey(position)": lambda w, x: w.cache.match([1], [ExtraKey("k", 1, x)]),
    "insert(priority)": lambda w, x: w.cache.insert([7] * 4, w.table, priority=x),
}

OPTIONAL = [
    "PageAllocator(max_pages)",
    "PageAllocator(slab_pages)",
    "slots(stop)",
    "PrefixCache(window)",
    "PrefixCache(max_pages)",
]

# And with one that should be something else.
OTHERS = {
    "append_tokens(allocator)": lambda w, x: w.table.append_tokens(1, x),
    "append_batch(tables)": lambda w, x: append_batch(x, [1], w.allocator),
    "append_batch(a table)": lambda w, x: append_batch([x], [1], w.allocator),
    "append_batch(num_tokens)": lambda w, x: append_batch([w.table], x, w.allocator),
    "share_pages": lambda w, x: w.allocator.share_pages(x),
    "free_pages": lambda w, x: w.allocator.free_pages(x),
    "copy_pages": lambda w, x: w.allocator.copy_pages(x),
    "copy_pages(a pair)": lambda w, x: w.allocator.copy_pages([x]),
    "attach": lambda w, x: w.allocator.attach(x),
    "evictors.add": lambda w, x: w.allocator.evictors.add(x),
    "evictors.remove": lambda w, x: w.allocator.evictors.remove(x),
    "hold(evictor)": lambda w, x: w.allocator.hold(0, x),
    "on_evict": lambda w, x: LRUPageAllocator(4, 4, on_evict=x),
    "share_prefix(source)": lambda w, x: share_prefix(x, PageTable(4), 1),
    "share_prefix(target)": lambda w, x: share_prefix(w.table, x, 1),
    "share_prefix(partial)": lambda w, x: share_prefix(w.table, PageTable(4), 1, partial=x),
    "copy_on_write(table)": lambda w, x: copy_on_write(x, 0, w.allocator),
    "copy_on_write(allocator)": lambda w, x: copy_on_write(w.table, 0, x),
    "skip(allocator)": lambda w, x: PageTable(4).skip(4, x),
    "adopt(page_ids)": lambda w, x: PageTable(4).adopt(x, 4, w.allocator),
    "adopt(allocator)": lambda w, x: PageTable(4).adopt([0], 4, x),
    "pack": lambda w, x: pack(x),
    "pack(a table)": lambda w, x: pack([w.table, x]),
    "pack(query_lens)": lambda w, x: pack([w.table], x),
    "update": lambda w, x: BlockTable().update(x),
    "PrefixCache(allocator)": lambda w, x: PrefixCache(x),
    "reuse(tokens)": lambda w, x: w.cache.reuse(x, PageTable(4)),
    "reuse(table)": lambda w, x: w.cache.reuse([1, 2], x),
    "insert(table)": lambda w, x: w.cache.insert([1, 2], x),
    "insert(tokens)": lambda w, x: w.cache.insert(x, w.table),
    "match(keys)": lambda w, x: w.cache.match([1], x),
    "match(a key)": lambda w, x: w.cache.match([1], [x]),
    "ExtraKey(value)": lambda w, x: w.cache.match([1], [ExtraKey("k", x)]),
    "ExtraKey(kind)": lambda w, x: w.cache.match([1], [ExtraKey(x, 1)]),
    "forget": lambda w, x: w.cache.forget(x),
    "policy": lambda w, x: PrefixCache(PageAllocator(4, 4), policy=x),
}


class World:
    def __init__(self):
        self.allocator = BuddyPageAllocator(32, 4)
        self.table = table_of(self.allocator, 6)
        self.cache = PrefixCache(self.allocator)
        self.cache.insert([7] * 4, self.table)
        self.lru = LRUPageAllocator(4, 4)
        self.lru.cache_page(self.lru.allocate_page())

    def counts(self):
        held = list(self.allocator.counts), list(self.lru.counts)
        return held, self.table.entries, self.cache.page_ids

    def state(self):
        return snapshot(self.allocator, self.table), snapshot(self.lru), self.cache.page_ids


def refused(call, value):
    """Whether a call refuses the value in the one form; anything else that it raises is an error."""
    world = World()
    before = world.state()
    try:
        call(world, value)
    except (ValueError, OutOfPages) as error:
        assert str(error).startswith("[") and "; got " in str(error) and str(error).endswith(".")
        assert world.state() == before
        world.allocator.check([world.table], [world.cache])
        return True
    return False


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_a_count_that_is_none_is_refused(call, value):
    name = next(name for name, one in NUMBERS.items() if one is call)
    taken = [("adopt(page_ids)", -1), ("insert(priority)", -1)]  # NO_PAGE; any whole number
    taken += [("allocate_pages", 2**40), ("allocate_pages", 10**30)]  # there are not so many
    taken += [(name, None) for name in OPTIONAL]
    fine = [odd for one, odd in taken if one == name and type(odd) is type(value)]
    assert refused(call, value) != (value in fine if fine else False)


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "value",
    [3, 1.5, "text", None, object(), [None], mx.array([1])],
    ids=lambda value: type(value).__name__,
)
def test_nothing_but_the_one_form_of_error_comes_out(call, value):
    refused(call, value)


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
def test_a_numpy_integer_is_as_good_as_an_int(call):
    outcomes = []
    for value in (1, np.int32(1), np.uint8(1), np.int64(1)):
        world = World()
        try:
            result = repr(call(world, value))
        except ValueError as error:
            result = str(error).replace(repr(value), "1")
        outcomes.append((result, world.counts()))
    assert all(outcome == outcomes[0] for outcome in outcomes)
