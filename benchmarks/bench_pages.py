"""What does the page manager cost? Allocation, decode steps, forks, hashing, reuse.

Each run repeats its work; the printed figure is the CPU time of one unit: a page, a step, a
fork, a token. One thread does everything, so CPU time is the time that it takes.
"""

import random

import numpy as np
from paged_mlx.pages.block_table import BlockTable, pack
from paged_mlx.pages.canary import Canary
from paged_mlx.pages.policies import (
    BuddyPageAllocator,
    FIFOPageAllocator,
    LRUPageAllocator,
    PageAllocator,
)
from paged_mlx.pages.table import PageTable, append_batch
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.hash import page_hashes

from benchmarks.harness import Candidate, Case, run

PAGE_SIZE = 16
ALLOCATORS = (PageAllocator, FIFOPageAllocator, LRUPageAllocator, BuddyPageAllocator)


def case(name, unit, units, candidates, check, rounds=20) -> Case:
    return Case(
        name,
        [Candidate(*c) for c in candidates],
        check,
        rounds=rounds,
        clock="cpu",
        about={"unit": unit, "units": units},
    )


def allocation(kind, pages=10_000):
    """Allocate and free one page at a time, from a pool that is half full in random places."""
    allocator = kind(2 * pages, PAGE_SIZE)
    page_ids = allocator.allocate_pages(2 * pages)
    random.Random(0).shuffle(page_ids)
    allocator.free_pages(page_ids[:pages])

    def work():
        held = [allocator.allocate_page() for _ in range(pages)]
        for page_id in held:
            allocator.free_page(page_id)
        return allocator.num_free

    return kind.__name__, work


def decode_step(batch, incremental, steps=16):
    """Append a token to every sequence and pack the batch, ``steps`` times."""
    tables = [PageTable(PAGE_SIZE) for _ in range(batch)]
    allocator = PageAllocator(batch * 512, PAGE_SIZE)
    append_batch(tables, [1000 + 7 * i for i in range(batch)], allocator)
    block_table, ones = BlockTable(), [1] * batch

    def work():
        for _ in range(steps):
            plan = append_batch(tables, ones, allocator)
            packed = block_table.update(tables) if incremental else pack(tables)
        return len(plan.slots), len(packed.context_lens)

    return ("rows that changed" if incremental else "every row"), work


def forking(tokens=8192, forks=100):
    allocator = PageAllocator(tokens // PAGE_SIZE, PAGE_SIZE)
    table = PageTable(PAGE_SIZE)
    table.append_tokens(tokens, allocator)

    def fork_and_release():
        for child in [table.fork() for _ in range(forks)]:
            child.release()
        return allocator.num_used

    def fork():
        for _ in range(forks):
            table.fork()
        return allocator.num_used

    return [("fork", fork), ("fork and release", fork_and_release)]


def caching(tokens):
    allocator = PageAllocator(2 * len(tokens) // PAGE_SIZE, PAGE_SIZE)
    cache = PrefixCache(allocator)
    table = PageTable(PAGE_SIZE)
    table.append_tokens(len(tokens), allocator)

    def insert():
        cache.reset()
        cache.insert(tokens, table)
        return cache.num_pages

    def reuse():
        found = PageTable(PAGE_SIZE)
        cache.reuse(tokens, found)
        found.release()
        return cache.num_pages

    return [("insert into an empty cache", insert), ("reuse and release", reuse)]


def watching(batch, length=1000, steps=4):
    """Note and verify every token of a decode step's contexts, ``steps`` times."""
    allocator = PageAllocator(batch * 2 * length // PAGE_SIZE, PAGE_SIZE)
    canary = Canary(allocator, 1)
    tables = [PageTable(PAGE_SIZE) for _ in range(batch)]
    for table in tables:
        slots = table.append_tokens(length, allocator).slots
        canary.note([table], [range(length)], slots)
        canary.wrote_layer(0, slots)
    ones = [1] * batch

    def note():
        for _ in range(steps):
            slots = append_batch(tables, ones, allocator).slots
            canary.note(tables, [[1]] * batch, slots)
            canary.wrote_layer(0, slots)

    def verify():
        for _ in range(steps):
            for table in tables:
                canary.verify(table)

    def read():
        for _ in range(steps):
            canary.begin(tables[0], tables[0].token_hash.tokens)  # something has changed
            canary.read(0, tables)

    return [("append and note", note), ("verify one by one", verify), ("read the batch", read)]


def same(outputs: dict) -> None:
    assert len({str(output) for output in outputs.values()}) == 1, outputs


def cases():
    yield case(
        "allocate + free, page by page",
        "page",
        10_000,
        [allocation(kind) for kind in ALLOCATORS],
        same,
    )
    for batch in (1, 32, 256):
        steps = [decode_step(batch, True), decode_step(batch, False)]
        yield case(f"decode step, {batch} sequences: append, plan, pack", "step", 16, steps, same)
    for batch in (8, 256):
        name = f"canary, {batch} sequences of 1000 tokens"
        yield case(name, "step", 4, watching(batch), same)
    yield case("fork of 8192 tokens", "fork", 100, forking(), same)
    array = np.random.default_rng(0).integers(0, 128_000, 32_768).astype(np.int32)
    hashing = [("int32 array", lambda: page_hashes(array, PAGE_SIZE)[-1])]
    tokens = array.tolist()
    hashing.append(("list", lambda: page_hashes(tokens, PAGE_SIZE)[-1]))
    yield case("page hashes", "token", len(tokens), hashing, same)
    yield case("prefix cache, 8192 tokens", "token", 8192, caching(array[:8192]), same)


def main():
    record = run("pages", cases())
    for result in record["cases"]:
        about = result["about"]
        for candidate in result["candidates"]:
            each = f"{candidate['median'] / about['units'] * 1e6:9.3f} us per {about['unit']}"
            print(f"{result['name']:<48} {candidate['name']:<28} {each}")


if __name__ == "__main__":
    main()
