"""A pool's memory: fresh and freed pages, growth up to a limit, and whom the pool belongs to."""

import ctypes
import gc
import resource
import sys
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from page_helpers import snapshot, table_of
from paged_mlx import (
    OutOfPages,
    PageAllocator,
    PagePool,
    PrefixCache,
    memory_limit,
    pages_within,
    pool_storage,
)
from paged_mlx._native import _ext
from paged_mlx.machine import memory
from paged_mlx.pages.policies import LRUPageAllocator
from paged_mlx.pages.table import append_batch

HEADS, DIM, PAGE = 2, 8, 4
NAN = float("nan")


def make_pool(num_pages=4, layers=2, dtype=mx.float32, **options):
    return PagePool(layers, num_pages, PAGE, HEADS, DIM, dtype, **options)


def write(pool, value, slots):
    rows = mx.full((len(slots), HEADS, DIM), float(value), pool.dtype)
    for layer in range(pool.num_layers):
        pool.write(layer, rows, rows, slots)


def page(pool, page_id, layer=0):
    """K and V of one page, ``[2, heads, page_size, head_dim]``."""
    block = pool[layer][page_id]
    return np.stack([np.array(block.key_data), np.array(block.value_data)])


# Freed pages.


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_freed_pages_are_wiped_in_every_layer_and_others_are_not(dtype):
    allocator = PageAllocator(4, PAGE)
    pool = make_pool(dtype=dtype, allocator=allocator, wipe_freed=NAN)
    table, other = table_of(allocator, 8), table_of(allocator, 4)
    write(pool, 1, range(12))
    table.truncate(4)
    for layer in range(2):
        assert np.isnan(page(pool, 1, layer)).all()
        assert (page(pool, 0, layer) == 1).all() and (page(pool, 2, layer) == 1).all()
    assert pool.tokens_stored.tolist() == [4, 0, 4, 0]
    table.release()
    allocator.free_page(other.page_ids[0])
    assert all(np.isnan(page(pool, page_id)).all() for page_id in range(3))


def test_a_page_is_wiped_before_it_is_written_again_and_after_it_was_read():
    allocator = PageAllocator(1, PAGE)
    pool = make_pool(num_pages=1, allocator=allocator, wipe_freed=NAN)
    table = table_of(allocator, 4)
    write(pool, 1, range(4))
    read, _ = pool[0].gather([[0]], [PAGE])
    table.release()
    write(pool, 2, table_of(allocator, 3).slots(0, 3))
    again, _ = pool[0].gather([[0]], [PAGE])
    mx.eval(again, read)
    assert mx.all(read == 1)
    assert mx.all(again[0, :, :3] == 2) and mx.all(mx.isnan(again[0, :, 3]))


def test_a_shared_page_is_wiped_when_its_last_holder_lets_go():
    allocator = PageAllocator(4, PAGE)
    pool = make_pool(allocator=allocator, wipe_freed=-7.0)
    table = table_of(allocator, 4)
    write(pool, 1, range(4))
    fork = table.fork()
    table.release()
    assert (page(pool, 0) == 1).all()
    fork.release()
    assert (page(pool, 0) == -7).all()


def test_an_evicted_page_is_wiped():
    allocator = LRUPageAllocator(1, PAGE)
    pool = make_pool(num_pages=1, allocator=allocator, wipe_freed=NAN)
    table = table_of(allocator, 4)
    write(pool, 1, range(4))
    allocator.cache_page(0)
    table.release()
    assert (page(pool, 0) == 1).all()
    assert allocator.allocate_page() == 0
    assert np.isnan(page(pool, 0)).all()


def test_without_wiping_nothing_is_done_when_pages_are_freed():
    allocator = PageAllocator(4, PAGE)
    pool = make_pool(allocator=allocator)
    table = table_of(allocator, 4)
    write(pool, 1, range(4))
    state = list(chain(*pool.state))
    table.release()
    assert all(a is b for a, b in zip(state, chain(*pool.state), strict=True))
    assert not allocator._wants_freed


# Memory.


def test_the_memory_limit_is_a_share_of_the_machine():
    assert 0 < memory_limit(0.5) < memory_limit() <= memory_limit(1)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"^\[memory_limit\] share must be in \(0, 1\]; got"):
            memory_limit(share)


def test_the_memory_limit_heeds_mlxs_own():
    before = mx.set_memory_limit(12_345_678)
    try:
        assert memory_limit() == memory_limit(1) == 12_345_678
    finally:
        mx.set_memory_limit(before)


def test_mlxs_own_limit_is_read_where_mlx_has_no_function_for_it(monkeypatch):
    before = mx.set_memory_limit(123_456_789)
    try:
        monkeypatch.delattr(mx, "get_memory_limit", raising=False)
        assert memory_limit() == 123_456_789
        assert mx.set_memory_limit(before) == 123_456_789  # and it is as it was
    finally:
        mx.set_memory_limit(before)


def test_the_memory_limit_is_of_what_the_gpu_or_the_control_group_may_use(monkeypatch, tmp_path):
    group = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTROL_GROUP", group)
    monkeypatch.setattr(mx, "device_info", lambda: {})
    machine = memory_limit(1)
    group.write_text("max\n")
    assert memory_limit(1) == machine
    group.write_text("1000000\n")
    assert memory_limit(1) == 1_000_000 and memory_limit(0.5) == 500_000
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 3_000_000})
    assert memory_limit(1) == 3_000_000


def test_pages_within_counts_what_a_pool_takes():
    pool = make_pool(num_pages=4)
    sizes = dict(num_layers=2, page_size=PAGE, num_kv_heads=HEADS, head_dim=DIM, dtype=mx.float32)
    assert pages_within(pool.nbytes, **sizes) == pool.pages_within(pool.nbytes) == 4
    assert pages_within(pool.nbytes - 1, **sizes) == 3
    assert pages_within(-1, **sizes) == 0
    assert pages_within(pool.nbytes, **(sizes | {"v_head_dim": 3 * DIM})) == 2
    assert pool.pages_within() == memory_limit() // pool.page_nbytes


def test_a_pool_past_its_memory_limit_is_refused_before_it_is_made():
    gc.collect()  # what earlier tests left is not the pool's
    before = mx.get_active_memory()
    with pytest.raises(OutOfPages, match=r"^\[PagePool\] memory_limit must be at least \d+ bytes"):
        make_pool(num_pages=2**20, memory_limit=before + 2**20)
    with pytest.raises(OutOfPages):
        PagePool(64, 2**20, 64, 64, 512)  # 1 PiB: past any machine's limit
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("kind", [PageAllocator, LRUPageAllocator])
def test_growth_past_the_memory_limit_is_typed_and_changes_nothing(kind):
    allocator = kind(4, PAGE, max_pages=2**20, slab_pages=2**19)
    pool = make_pool(allocator=allocator)
    pool.memory_limit = mx.get_active_memory() + 2**20
    tables = [table_of(allocator, 8), table_of(allocator, 8)]
    write(pool, 1, range(16))
    before = snapshot(allocator, *tables)
    with pytest.raises(OutOfPages, match=r"^\[PagePool.grow\] memory_limit must be at least"):
        append_batch(tables, [1, 1], allocator)
    assert snapshot(allocator, *tables) == before and pool.num_pages == 4
    pool.check(tables)
    assert (page(pool, 3, 1) == 1).all()


def test_a_pool_that_cannot_grow_still_takes_cached_pages():
    allocator = PageAllocator(2, PAGE, max_pages=2**20, slab_pages=2**19)
    pool = make_pool(num_pages=2, allocator=allocator)
    pool.memory_limit = 0
    cache = PrefixCache(allocator)
    table = table_of(allocator, 8)
    cache.insert(range(8), table)
    table.release()
    table = table_of(allocator, 4)
    assert allocator.total_pages == 2 and cache.num_pages == 1
    pool.check([table], [cache])


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_growth_that_fails_half_way_leaves_the_pool_as_it_was(monkeypatch, error):
    allocator = PageAllocator(4, PAGE, max_pages=8)
    pool = make_pool(layers=3, allocator=allocator)
    table = table_of(allocator, 16)
    write(pool, 1, range(16))
    evaluate, calls = mx.eval, []

    def fail_at_the_last_layer(arrays):
        calls.append(arrays)
        if len(calls) == 3:
            raise error("no memory")
        evaluate(arrays)

    monkeypatch.setattr(pool_storage.mx, "eval", fail_at_the_last_layer)
    with pytest.raises(OutOfPages, match=r"^\[PagePool.grow\] the machine must have memory for 8"):
        table.append_tokens(1, allocator)
    assert len(calls) > 3, "layers that were longer have become shorter"
    assert table.num_tokens == 16 and allocator.total_pages == pool.num_pages == 4
    pool.check([table])
    assert all((page(pool, 3, layer) == 1).all() for layer in range(3))
    monkeypatch.undo()
    table.append_tokens(1, allocator)
    assert allocator.total_pages == pool.num_pages == 8
    pool.check([table])


def test_a_pool_without_memory_for_it_is_a_typed_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("Unable to allocate")

    monkeypatch.setattr(pool_storage.mx, "eval", fail)
    with pytest.raises(OutOfPages, match=r"^\[PagePool\] the machine must have memory for 4 pages"):
        make_pool()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_memory_of_a_pool_begins_at_a_page_of_the_machines_and_keeps_what_it_must(dtype):
    pool = make_pool(num_pages=3, layers=1, dtype=dtype, fill=2.5, stream=mx.cpu)
    k = mx.array(np.random.default_rng(0).standard_normal(pool[0].arrays[0].shape)).astype(dtype)
    mx.eval(k)
    more, fewer = (
        _ext.pool_memory(k, (n, *k.shape[1:]), -1.5, dtype, stream=mx.cpu) for n in (5, 2)
    )
    mx.eval(more, fewer)
    for array in (*pool[0].arrays, more, fewer):
        assert _ext.data_address(array) % 4096 == 0
    assert all((pages == 2.5).all() for pages in pool[0].arrays)
    assert mx.array_equal(more[:3], k) and (more[3:] == -1.5).all()
    assert mx.array_equal(fewer, k[:2])


def forget():
    """Give back what earlier tests have held, so that it is not given back between two readings."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()


def resident_bytes(array):
    """Bytes of an array of a pool that the machine has given memory for."""
    size = resource.getpagesize()
    given = (ctypes.c_ubyte * -(-array.nbytes // size))()
    address, length = ctypes.c_void_p(_ext.data_address(array)), ctypes.c_size_t(array.nbytes)
    assert ctypes.CDLL(None).mincore(address, length, given) == 0
    return size * sum(page & 1 for page in given)


on_linux_alone = pytest.mark.skipif(
    sys.platform != "linux" or mx.is_available(mx.gpu), reason="pools have no reserved addresses"
)


@pytest.mark.native
@on_linux_alone
def test_memory_of_a_pool_is_touched_when_it_is_used():
    pool = make_pool(num_pages=2**17, layers=1)
    assert pool.nbytes == 2**26 <= mx.get_active_memory()
    assert all(resident_bytes(array) < array.nbytes // 8 for array in pool[0].arrays)
    write(pool, 1, range(pool.num_pages * PAGE // 2))
    mx.eval(pool.state)
    assert all(resident_bytes(array) >= array.nbytes // 2 for array in pool[0].arrays)


@pytest.mark.native
@on_linux_alone
def test_a_pool_without_a_limit_leaves_addresses_to_others():
    def addresses():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    before = addresses()
    pool = PagePool(8, 2, 64, 16, 512, memory_limit=2**60)
    assert 2**42 < addresses() - before < 2**44
    assert pool.num_pages == 2


@pytest.mark.native
@on_linux_alone
@pytest.mark.parametrize("fill", [0.0, -1.5])
def test_pages_stay_where_they_are_when_a_pool_grows_and_shrinks(fill):
    forget()
    before = mx.get_active_memory()
    pool = make_pool(num_pages=300, fill=fill)  # of more than a page of the machine's memory
    nbytes = pool.nbytes
    write(pool, 1, range(300 * PAGE))
    mx.eval(pool.state)
    addresses = [_ext.data_address(array) for array in chain(*pool.state)]
    pool.grow(600)
    assert [_ext.data_address(array) for array in chain(*pool.state)] == addresses
    assert mx.get_active_memory() - before >= pool.nbytes == 2 * nbytes
    assert (page(pool, 299, 1) == 1).all() and (page(pool, 300, 1) == fill).all()
    write(pool, 2, range(300 * PAGE, 600 * PAGE))
    versions = [list(arrays) for arrays in pool.state]
    pool.shrink(99)
    assert [_ext.data_address(array) for array in chain(*pool.state)] == addresses
    assert mx.get_active_memory() - before < nbytes
    assert (versions[1][0][98] == 1).all() and (versions[1][0][99:] == 0).all()
    pool.grow(101)
    assert (page(pool, 98) == 1).all() and (page(pool, 99) == fill).all()
    pool.check()


def test_growth_holds_little_twice():
    pool = make_pool(num_pages=1024, layers=16)
    mx.synchronize()
    mx.reset_peak_memory()
    active, size = mx.get_active_memory(), pool.nbytes
    pool.grow(2048)
    assert mx.get_peak_memory() - active <= size + 3 * size // 16
    pool.check()


def test_a_pool_grows_in_slabs_on_demand_and_shrinks_when_idle():
    allocator = PageAllocator(2, PAGE, max_pages=7, slab_pages=3)
    pool = make_pool(num_pages=2, allocator=allocator, fill=NAN)
    table = table_of(allocator, 12)
    write(pool, 1, range(12))
    assert pool.num_pages == allocator.total_pages == 5
    assert (page(pool, 2, 1) == 1).all() and np.isnan(page(pool, 4, 1)).all()
    table.release()
    assert allocator.shrink(3) == 3 and pool.num_pages == 2
    assert table_of(allocator, 28).num_pages == 7 == pool.num_pages
    pool.check()


# Belonging.


@pytest.mark.parametrize("how", ["constructor", "attach"])
def test_an_attached_pool_knows_who_holds_its_pages(how):
    allocator = PageAllocator(4, PAGE)
    pool = make_pool(allocator=allocator if how == "constructor" else None)
    if how == "attach":
        allocator.attach(pool)
    table = table_of(allocator, 4)
    assert [pool[0][page_id].ref_count for page_id in (0, 1)] == [1, 0]
    fork = table.fork()
    assert pool[1][0].ref_count == 2 and fork.entries[0].is_cow
    allocator.detach(pool)
    assert pool.allocator is not allocator and allocator.pools == []


def test_a_pool_belongs_to_one_allocator():
    allocator, other = PageAllocator(4, PAGE), PageAllocator(4, PAGE)
    pool = make_pool(allocator=allocator)
    allocator.attach(pool)
    assert allocator.pools == [pool]
    with pytest.raises(ValueError, match=r"^\[attach\] pool must belong to no other allocator"):
        other.attach(pool)
    assert pool.allocator is allocator and other.pools == []
    other.detach(pool)
    assert pool.allocator is allocator


@pytest.mark.parametrize(
    "planted",
    [
        "leaked page",
        "unknown holder",
        "free list",
        "cache",
        pytest.param("array", marks=pytest.mark.native),
    ],
)
def test_check_sees_each_part_disagree_with_the_others(planted):
    allocator = PageAllocator(4, PAGE)
    pool = make_pool(allocator=allocator)
    cache = PrefixCache(allocator)
    table = table_of(allocator, 8)
    cache.insert(range(8), table)
    pool.check([table], [cache])
    if planted == "leaked page":
        allocator.allocate_page()
    elif planted == "unknown holder":
        table.map.ids[0] = 3
    elif planted == "free list":
        allocator._free.append(0)
    elif planted == "cache":
        cache._tree.by_page[0].tokens = b"\0" * 4 * PAGE
    else:
        pool.state[0][1] = pool.state[0][1] + 0
    with pytest.raises(AssertionError):
        pool.check([table], [cache])
