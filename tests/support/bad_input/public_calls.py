"""The public calls of the page manager, the pool and the operations, with sound arguments."""

from __future__ import annotations

from functools import cached_property, partial

import mlx.core as mx
import paged_mlx
from paged_mlx import (
    BuddyPageAllocator,
    FIFOPageAllocator,
    LRUPageAllocator,
    PageAllocator,
    PageBlock,
    PagePool,
    PageTable,
    PageTableEntry,
    PrefixCache,
    fast,
)
from paged_mlx.course import memory_report, memory_systems
from paged_mlx.machine import memory, threads
from paged_mlx.pages.block_table import BlockTable, pack
from paged_mlx.pages.canary import Canary
from paged_mlx.pages.table import append_batch, copy_on_write, share_prefix
from paged_mlx.pool import SlotMapping
from paged_mlx.prefix.hash import ExtraKey

TOKENS = [1, 2, 3, 4, 5, 6]


class World:
    """A pool and all around it; each is made when a call asks for it."""

    @cached_property
    def allocator(self):
        return PageAllocator(16, 4)

    @cached_property
    def pool(self):
        return PagePool(2, 16, 4, 2, 64, allocator=self.allocator)

    @cached_property
    def table(self):
        table = PageTable(4)
        table.append_tokens(6, self.allocator)
        return table

    @cached_property
    def empty(self):
        return PageTable(4)

    @cached_property
    def cache(self):
        cache = PrefixCache(self.allocator)
        cache.insert(TOKENS, self.table)
        return cache

    @cached_property
    def lru(self):
        lru = LRUPageAllocator(16, 4)
        lru.allocate_pages(2)
        lru.cache_page(0)
        return lru

    @cached_property
    def buddy(self):
        return BuddyPageAllocator(16, 4)

    @cached_property
    def fifo(self):
        return FIFOPageAllocator(16, 4)

    @cached_property
    def plan(self):
        return self.pool.plan([self.table], num_q_heads=4)

    @cached_property
    def watched(self):
        """A pool with a canary."""
        pool = PagePool(2, 16, 4, 2, 64, canary=True)
        slots = self.watched_table.append_tokens(2, pool.allocator).slots
        pool.canary.note([self.watched_table], [[7, 8]], slots)
        for layer in range(2):
            pool[layer].write(_K[:2], _K[:2], slots)
        return pool

    @cached_property
    def watched_table(self):
        return PageTable(4)

    @cached_property
    def not_noted(self):
        """A table of its allocator that nobody has told the canary of."""
        table = PageTable(4)
        table.append_tokens(2, self.watched.allocator)
        return table

    @cached_property
    def quantised(self):
        """A pool with open pages, and a table of one on it."""
        pool = PagePool(2, 16, 64, 2, 64, k_format="q4", v_format="q4")
        self.quantised_table.append_tokens(3, pool.allocator)
        return pool

    @cached_property
    def quantised_table(self):
        return PageTable(64)

    def state(self):
        """All that a refused call must leave alone, of what there is."""
        found = []
        for name, made in vars(self).items():
            if isinstance(made, PageAllocator):
                found.append((name, list(made.counts), made.num_free, made.max_pages))
            elif isinstance(made, PageTable):
                found.append((name, made.num_tokens, made.map.ids.tolist(), made.map.room))
                found.append(None if made.token_hash is None else made.token_hash.tokens.tolist())
            elif isinstance(made, PrefixCache):
                found.append((name, made.page_ids, made.num_evictable))
            elif isinstance(made, PagePool):
                arrays = [id(array) for arrays in made.state for array in arrays]
                found.append((name, made.num_pages, made.num_sealed, arrays))
        return found

    def check(self):
        """Prove that all there is agrees."""
        for made in list(vars(self).values()):
            if isinstance(made, (PageAllocator, PagePool, PrefixCache)):
                made.check()


_Q = mx.ones((1, 4, 64), mx.float16)
_K = mx.ones((6, 2, 64), mx.float16)
_PAGES = mx.ones((16, 2, 4, 64), mx.float16)
_BLOCK = mx.ones((2, 4, 64), mx.float16)
_SIZES = {"num_layers": 1, "page_size": 4, "num_kv_heads": 1, "head_dim": 64}
_TABLES = {"block_tables": [[0, 1]], "context_lens": [6]}


def _attention(world, **change):
    world.plan  # noqa: B018  its pages are written by nobody, and there
    call = {"query": _Q, "page_tables": [world.table], "page_blocks": world.pool[0]}
    return paged_mlx.paged_attention, call | change


def _blocks(world):
    blocks = {i: PageBlock(i, 4, 4, 1, _BLOCK, _BLOCK) for i in range(2)}
    return paged_mlx.paged_attention, {
        "query": _Q,
        "page_tables": [world.table],
        "page_blocks": blocks,
    }


def _raw(**change):
    return fast.paged_attention, {"q": _Q, "k_pages": _PAGES, "v_pages": _PAGES} | change


def _write(world):
    return {"k": _K, "v": _K, "slot_mapping": world.table.slots()}


def _adopt(world):
    world.table  # noqa: B018
    return world.empty.adopt, {"page_ids": [0], "num_tokens": 4, "allocator": world.allocator}


def _held(world):
    if world.lru.ref_count(1) == 1:
        world.lru.hold(1, world.lru)
    return world.lru


def _noted(world):
    table = world.not_noted
    return {"tables": [table], "tokens": [[9, 9]], "slots": table.slots()}


#: ``name: world -> (function, sound arguments)``; arguments that are not named have their defaults.
CALLS = {
    # Attention
    "paged_attention": _attention,
    "paged_attention of a plan": lambda w: _attention(w, plan=w.plan),
    "paged_attention of blocks": _blocks,
    "paged_attention with a canary": lambda w: (
        paged_mlx.paged_attention,
        {"query": _Q, "page_tables": [w.watched_table], "page_blocks": w.watched[1]},
    ),
    "fast.plan": lambda w: (
        fast.plan,
        {**_TABLES, "num_q_heads": 4, "num_kv_heads": 2, "page_size": 4},
    ),
    "fast.paged_attention": lambda w: _raw(**_TABLES),
    "fast.paged_attention of a plan": lambda w: _raw(plan=w.plan),
    "fast.write_pages": lambda w: (
        fast.write_pages,
        {**_write(w), "k_pages": _PAGES, "v_pages": _PAGES},
    ),
    "fast.copy_pages": lambda w: (fast.copy_pages, {"pools": [_PAGES], "pairs": [(0, 1)]}),
    "fast.gather_pages": lambda w: (
        fast.gather_pages,
        {"k_pages": _PAGES, "v_pages": _PAGES, **_TABLES},
    ),
    "fast.merge_states": lambda w: (
        fast.merge_states,
        {"outs": [mx.ones((1, 4, 64))] * 2, "lses": [mx.ones((1, 4))] * 2},
    ),
    "AttentionPlan.advance": lambda w: (
        w.plan.advance,
        {"block_tables": [[0, 1]], "context_lens": [7]},
    ),
    "AttentionPlan.check_agrees": lambda w: (
        w.plan.check_agrees,
        {"op": "attend", "causal": True, "sliding_window": None},
    ),
    # The pool
    "PagePool": lambda w: (PagePool, {**_SIZES, "num_pages": 4}),
    "PagePool.plan": lambda w: (w.pool.plan, {"tables": [w.table], "num_q_heads": 4}),
    "PagePool.write": lambda w: (w.pool.write, {"layer": 0, **_write(w)}),
    "PagePool.slots": lambda w: (w.pool.slots, {"slot_mapping": w.table.slots()}),
    "PagePool.slots of open pages": lambda w: (
        w.quantised.slots,
        {"slot_mapping": w.quantised_table.slots()},
    ),
    "PagePool.copy": lambda w: (w.pool.copy, {"pairs": [(0, 5)]}),
    "PagePool.grow": lambda w: (w.pool.grow, {"num_pages": 17}),
    "PagePool.shrink": lambda w: (w.pool.shrink, {"num_pages": 16}),
    "PagePool.seal": lambda w: (w.quantised.seal, {}),
    "PagePool.pages_within": lambda w: (w.pool.pages_within, {"nbytes": 10**6}),
    "PagePool.map": lambda w: (w.pool.map, {"tables": [w.table], "caches": [w.cache]}),
    "PagePool.check": lambda w: (w.pool.check, {"tables": [w.table], "caches": [w.cache]}),
    "PagePool.check of a canary": lambda w: (w.watched.check, {}),
    "PagePool.__getitem__": lambda w: (partial(PagePool.__getitem__, w.pool), {"layer": 0}),
    "PoolLayer.write": lambda w: (w.pool[0].write, _write(w)),
    "PoolLayer.write with a canary": lambda w: (
        w.watched[0].write,
        {"k": _K[:2], "v": _K[:2], "slot_mapping": w.watched_table.slots()},
    ),
    "PoolLayer.write to open pages": lambda w: (
        w.quantised[0].write,
        {"k": _K[:3], "v": _K[:3], "slot_mapping": w.quantised_table.slots()},
    ),
    "PoolLayer.attend": lambda w: (w.pool[0].attend, {"q": _Q, "plan": w.plan}),
    "PoolLayer.gather": lambda w: (w.pool[0].gather, _TABLES),
    "PoolLayer.__getitem__": lambda w: (
        partial(type(w.pool[0]).__getitem__, w.pool[0]),
        {"page_id": 0},
    ),
    "SlotMapping": lambda w: (SlotMapping, {"slot_mapping": [0], "pages": _PAGES}),
    "PageBlock": lambda w: (
        PageBlock,
        {
            "page_id": 0,
            "tokens_stored": 1,
            "max_tokens": 4,
            "ref_count": 1,
            "key_data": _BLOCK,
            "value_data": _BLOCK,
        },
    ),
    "memory_limit": lambda w: (memory.memory_limit, {}),
    "pages_within": lambda w: (memory.pages_within, {"nbytes": 10**6, **_SIZES}),
    "set_num_threads": lambda w: (threads.set_num_threads, {"n": threads.num_threads()}),
    # Allocators
    "PageAllocator": lambda w: (PageAllocator, {"total_pages": 8, "page_size": 4}),
    "FIFOPageAllocator": lambda w: (FIFOPageAllocator, {"total_pages": 8, "page_size": 4}),
    "LRUPageAllocator": lambda w: (LRUPageAllocator, {"total_pages": 8, "page_size": 4}),
    "BuddyPageAllocator": lambda w: (BuddyPageAllocator, {"total_pages": 8, "page_size": 4}),
    "PageAllocator.allocate_pages": lambda w: (w.allocator.allocate_pages, {"num_pages": 1}),
    "FIFOPageAllocator.allocate_pages": lambda w: (w.fifo.allocate_pages, {"num_pages": 1}),
    "BuddyPageAllocator.allocate_pages": lambda w: (w.buddy.allocate_pages, {"num_pages": 1}),
    "BuddyPageAllocator.allocate_run": lambda w: (w.buddy.allocate_run, {"num_pages": 2}),
    "PageAllocator.ref_count": lambda w: (w.allocator.ref_count, {"page_id": 0}),
    "PageAllocator.share_page": lambda w: (w.lru.share_page, {"page_id": 0}),
    "PageAllocator.share_pages": lambda w: (w.lru.share_pages, {"page_ids": [0, 1]}),
    "PageAllocator.free_page": lambda w: (w.lru.free_page, {"page_id": 1}),
    "PageAllocator.free_pages": lambda w: (w.lru.free_pages, {"page_ids": [1]}),
    "PageAllocator.hold": lambda w: (w.lru.hold, {"page_id": 1, "evictor": w.lru}),
    "PageAllocator.let_go": lambda w: (_held(w).let_go, {"page_id": 1}),
    "PageAllocator.grow": lambda w: (w.allocator.grow, {"num_pages": 1}),
    "PageAllocator.shrink": lambda w: (w.allocator.shrink, {"num_pages": 1}),
    "PageAllocator.attach": lambda w: (w.allocator.attach, {"pool": PagePool(1, 16, 4, 1, 64)}),
    "PageAllocator.detach": lambda w: (w.allocator.detach, {"pool": w.pool}),
    "PageAllocator.copy_pages": lambda w: (w.lru.copy_pages, {"pairs": [(0, 1)]}),
    "PageAllocator.check": lambda w: (
        w.allocator.check,
        {"tables": [w.table], "caches": [w.cache]},
    ),
    "LRUPageAllocator.cache_page": lambda w: (w.lru.cache_page, {"page_id": 1}),
    "LRUPageAllocator.uncache_page": lambda w: (w.lru.uncache_page, {"page_id": 0}),
    "LRUPageAllocator.evict": lambda w: (w.lru.evict, {"num_pages": 1}),
    "LRUPageAllocator.forget": lambda w: (w.lru.forget, {"page_ids": [0]}),
    # Tables
    "PageTable": lambda w: (PageTable, {"page_size": 4}),
    "PageTableEntry": lambda w: (
        PageTableEntry,
        {"logical_start": 0, "logical_end": 1, "physical_page_id": 0, "is_cow": False},
    ),
    "PageTable.append_tokens": lambda w: (
        w.table.append_tokens,
        {"num_tokens": 1, "allocator": w.allocator},
    ),
    "PageTable.skip": lambda w: (w.empty.skip, {"num_tokens": 4, "allocator": w.allocator}),
    "PageTable.adopt": _adopt,
    "PageTable.truncate": lambda w: (w.table.truncate, {"length": 3}),
    "PageTable.free_before": lambda w: (w.table.free_before, {"position": 1}),
    "PageTable.leading_pages": lambda w: (w.table.leading_pages, {"num_tokens": 4}),
    "PageTable.logical_to_physical": lambda w: (w.table.logical_to_physical, {"logical_pos": 1}),
    "PageTable.slots": lambda w: (w.table.slots, {}),
    "append_batch": lambda w: (
        append_batch,
        {"tables": [w.table], "num_tokens": [1], "allocator": w.allocator},
    ),
    "share_prefix": lambda w: (
        share_prefix,
        {"source_table": w.table, "target_table": w.empty, "prefix_length": 4},
    ),
    "copy_on_write": lambda w: (
        copy_on_write,
        {"page_table": w.table, "logical_pos": 1, "page_allocator": w.allocator},
    ),
    "pack": lambda w: (pack, {"tables": [w.table]}),
    "BlockTable.update": lambda w: (BlockTable().update, {"tables": [w.table]}),
    # Prefixes
    "PrefixCache": lambda w: (PrefixCache, {"allocator": w.allocator}),
    "PrefixCache.insert": lambda w: (w.cache.insert, {"tokens": TOKENS, "table": w.table}),
    "PrefixCache.match": lambda w: (w.cache.match, {"tokens": TOKENS}),
    "PrefixCache.reuse": lambda w: (w.cache.reuse, {"tokens": TOKENS, "table": w.empty}),
    "PrefixCache.keep": lambda w: (w.cache.keep, {"tokens": TOKENS[:4], "value": 1}),
    "PrefixCache.kept": lambda w: (w.cache.kept, {"tokens": TOKENS[:4]}),
    "PrefixCache.evict": lambda w: (w.cache.evict, {"num_pages": 1}),
    "PrefixCache.forget": lambda w: (w.cache.forget, {"page_ids": [0]}),
    "PrefixCache.record_events": lambda w: (w.cache.record_events, {"max_events": 1}),
    "ExtraKey": lambda w: (ExtraKey, {"kind": "a", "value": "b"}),
    # Canaries
    "Canary": lambda w: (Canary, {"allocator": w.allocator}),
    "Canary.note": lambda w: (w.watched.canary.note, _noted(w)),
    "Canary.begin": lambda w: (w.watched.canary.begin, {"table": w.not_noted, "tokens": [1, 2]}),
    "Canary.read": lambda w: (w.watched.canary.read, {"layer": 0, "tables": []}),
    "Canary.verify": lambda w: (w.watched.canary.verify, {"table": w.watched_table}),
    "Canary.wrote_layer": lambda w: (
        w.watched.canary.wrote_layer,
        {"layer": 0, "slots": w.watched_table.slots()},
    ),
    # The course
    "analyze_memory_efficiency": lambda w: (
        memory_report.analyze_memory_efficiency,
        {"lengths": (10,), "page_sizes": (8,), "show": False},
    ),
    "benchmark_memory_systems": lambda w: (
        memory_systems.benchmark_memory_systems,
        {"scenarios": [{"name": "a", "lengths": [3]}], "repeats": 1, "show": False},
    ),
    "DecodeStep": lambda w: (memory_systems.DecodeStep, {"lengths": [3]}),
}
