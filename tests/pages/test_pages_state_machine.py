"""Every page operation in random order, against sequences that are plain lists of tokens.

The model of the arrays is a dict from slot to token: appends write it, announced copies
copy it, freed pages are wiped. So a page that is written while somebody else holds it, a
copy that comes too late or a page reused too early shows as a wrong token.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_mlx.errors import DoubleFree, OutOfPages, UnknownPage, UseAfterFree
from paged_mlx.pages.block_table import BlockTable, pack
from paged_mlx.pages.observers import Pool
from paged_mlx.pages.page_map import NO_PAGE
from paged_mlx.pages.policies import (
    BuddyPageAllocator,
    FIFOPageAllocator,
    LRUPageAllocator,
    PageAllocator,
)
from paged_mlx.pages.table import PageTable, append_batch, copy_on_write, share_prefix
from paged_mlx.pages.tokens import TOKEN_BYTES
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.events import CacheCleared, PagesStored
from paged_mlx.prefix.hash import ExtraKey

WIPED = -7


class SlotPool(Pool):
    """Slots that hold tokens, and a note of who may be right about them."""

    num_pages = 2**31
    wants_freed = True

    def __init__(self, page_size):
        self.page_size = page_size
        self.tokens = {}
        self.told_free = set()

    def write(self, slots, tokens):
        for slot, token in zip(slots.tolist(), tokens):
            self.tokens[slot] = token

    def copied(self, pairs):
        copied = {}
        for source, target in pairs:
            for offset in range(self.page_size):
                copied[target * self.page_size + offset] = self.tokens.get(
                    source * self.page_size + offset, WIPED
                )
        self.tokens.update(copied)

    def freed(self, page_ids):
        self.told_free.update(page_ids)

    def wipe(self, allocator):
        """Forget what free pages hold."""
        for page_id in allocator._free_ids():
            for offset in range(self.page_size):
                self.tokens[page_id * self.page_size + offset] = WIPED


class Sequence:
    """A page table and the tokens that it should hold; those before ``kept`` are gone."""

    def __init__(self, table, tokens=(), kept=0, salt=0):
        self.table, self.tokens, self.kept, self.salt = table, list(tokens), kept, salt

    @property
    def keys(self):
        return [ExtraKey("salt", self.salt)] if self.salt else []


pick = st.integers(0, 11)  # which sequence
part = st.integers(0, 24)  # how far into it
some_tokens = st.lists(st.integers(0, 2), max_size=9)


class PageMachine(RuleBasedStateMachine):
    """All operations on one allocator, its tables, its cache and one block table."""

    @initialize(
        kind=st.sampled_from(
            [PageAllocator, FIFOPageAllocator, LRUPageAllocator, BuddyPageAllocator]
        ),
        total_pages=st.integers(2, 32),
        page_size=st.integers(1, 4),
        growth=st.sampled_from([0, 5]),
        cache_pages=st.sampled_from([None, None, 5]),
        window=st.sampled_from([None, None, 1, 5]),
        lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    )
    def begin(self, kind, total_pages, page_size, growth, cache_pages, window, lengths):
        self.allocator = kind(total_pages, page_size, max_pages=total_pages + growth, slab_pages=2)
        self.pool = SlotPool(page_size)
        self.allocator.attach(self.pool)
        self.window = window
        self.cache = PrefixCache(
            self.allocator, window=window, max_pages=cache_pages, max_events=10000
        )
        self.index = set()  # what the events say is cached
        self.live = []
        self.block_table = BlockTable()
        self.stray = []  # pages held by nobody's table
        self.held = set()  # pages that somebody held after the last step
        self.edited = False  # a token was replaced: a page may follow two different beginnings
        for length in lengths:
            self.append(self.add(Sequence(PageTable(page_size))), [0] * length)

    def add(self, sequence):
        """Take a sequence into the batch; the oldest leaves a batch that is full."""
        self.live.append(sequence)
        if len(self.live) > 12:
            self.live.pop(0).table.release()
        return sequence

    def one(self, pick):
        """One of the sequences, a new one if there is none."""
        if not self.live:
            self.add(Sequence(PageTable(self.allocator.page_size)))
        return self.live[pick % len(self.live)]

    def state(self):
        """All that a failed call must leave alone; evictions are allowed and left out."""
        return [(s.table.entries, s.table.num_tokens, s.table.is_sealed) for s in self.live], dict(
            self.pool.tokens
        )

    def append(self, sequence, tokens):
        before = self.state()
        try:
            plan = sequence.table.append_tokens(len(tokens), self.allocator)
        except OutOfPages:
            assert self.state() == before
            return
        assert len(plan.copies) <= 1
        self.pool.write(plan.slots, tokens)
        sequence.tokens.extend(tokens)

    @rule(pick=pick, tokens=some_tokens)
    def append_some(self, pick, tokens):
        self.append(self.one(pick), tokens)

    @rule(
        batch=st.lists(
            st.tuples(pick, st.lists(st.integers(0, 2), max_size=3)),
            max_size=8,
            unique_by=lambda c: c[0],
        )
    )
    def append_to_a_batch(self, batch):
        chosen = [(self.live[pick], tokens) for pick, tokens in batch if pick < len(self.live)]
        before = self.state()
        try:
            plan = append_batch(
                [s.table for s, _ in chosen], [len(tokens) for _, tokens in chosen], self.allocator
            )
        except OutOfPages:
            assert self.state() == before
            return
        self.pool.write(plan.slots, [token for _, tokens in chosen for token in tokens])
        for sequence, tokens in chosen:
            sequence.tokens.extend(tokens)

    @rule(pick=pick)
    def fork(self, pick):
        sequence, used = self.one(pick), self.allocator.num_used
        child = Sequence(sequence.table.fork(), sequence.tokens, sequence.kept, sequence.salt)
        assert self.allocator.num_used == used
        self.add(child)

    @rule(pick=pick, part=part)
    def truncate(self, pick, part):
        sequence = self.one(pick)
        length = max(0, len(sequence.tokens) - part)
        if 0 < length < sequence.kept:
            with pytest.raises(ValueError, match="were given back"):
                sequence.table.truncate(length)
            return
        sequence.table.truncate(length)
        del sequence.tokens[length:]
        sequence.kept = sequence.kept if length else 0

    @rule(pick=pick)
    def release(self, pick):
        sequence = self.one(pick)
        sequence.table.release()
        assert sequence.table.num_pages == 0
        self.live.remove(sequence)

    @rule(pick=pick, tokens=some_tokens)
    def seal(self, pick, tokens):
        self.one(pick).table.seal()
        self.append(self.one(pick), tokens)

    @rule(pick=pick, part=part)
    def free_before(self, pick, part):
        sequence = self.one(pick)
        position = min(part, len(sequence.tokens))
        ends = [entry.logical_end for entry in sequence.table.entries]
        expected = sum(end <= position for end in ends)
        freed = sequence.table.free_before(position)
        # a tail page with room stays
        assert freed in (expected, expected - 1) and (
            freed == expected or position == len(sequence.tokens)
        )
        if freed:
            sequence.kept = ends[freed - 1]

    @rule(pick=pick, part=part, partial=st.sampled_from(["copy", "seal"]))
    def share(self, pick, part, partial):
        sequence = self.one(pick)
        length = min(part, len(sequence.tokens))
        table = PageTable(self.allocator.page_size)
        if sequence.table.num_freed and length:
            with pytest.raises(ValueError, match="must hold its whole prefix"):
                share_prefix(sequence.table, table, length, partial=partial)
            return
        share_prefix(sequence.table, table, length, partial=partial)
        self.add(Sequence(table, sequence.tokens[:length], salt=sequence.salt))

    @rule(pick=pick, part=part)
    def write_in_place(self, pick, part):
        sequence = self.one(pick)
        position = sequence.kept + part
        if position >= len(sequence.tokens):
            return
        page_id, _ = sequence.table.logical_to_physical(position)
        shared = self.allocator.ref_count(page_id) > 1
        before = self.state()
        try:
            copied = copy_on_write(sequence.table, position, self.allocator)
        except OutOfPages:
            assert shared and self.state() == before
            return
        if not copied and shared:  # the pool was full, and the cache let go of the page
            assert self.state()[1] == before[1] and page_id not in self.allocator.evictors.held
            assert sequence.table.logical_to_physical(position)[0] == page_id
        assert shared or not copied
        page_id, offset = sequence.table.logical_to_physical(position)
        assert self.allocator.ref_count(page_id) == 1
        self.edited = True
        sequence.tokens[position] = (sequence.tokens[position] + 1) % 3
        self.pool.tokens[page_id * self.allocator.page_size + offset] = sequence.tokens[position]

    # The prefix cache.

    @rule(pick=pick, left_out=st.sampled_from([0, 0, 1, 5]), tail=st.booleans())
    def cache_it(self, pick, left_out, tail):
        sequence = self.one(pick)
        length = max(0, len(sequence.tokens) - left_out)
        pages, cached = [s.table.page_ids for s in self.live], self.cache.page_ids
        try:
            self.cache.insert(sequence.tokens[:length], sequence.table, sequence.keys, tail=tail)
        except ValueError:
            assert self.edited and self.cache.page_ids == cached
        assert [s.table.page_ids for s in self.live] == pages

    @rule(pick=pick, part=part, tail=some_tokens, salt=st.sampled_from([0, 0, 0, 1]))
    def reuse(self, pick, part, tail, salt):
        tokens = [*self.one(pick).tokens[:part], *tail]
        sequence = Sequence(PageTable(self.allocator.page_size), salt=salt)
        used, match = self.allocator.num_used, self.cache.match(tokens, sequence.keys)
        saved = self.cache.reuse(tokens, sequence.table, sequence.keys)
        assert match.num_tokens == saved <= max(0, len(tokens) - 1)
        behind = sequence.table.num_freed
        assert match.page_ids == [NO_PAGE] * behind + sequence.table.page_ids
        assert self.allocator.num_used == used
        sequence.kept = behind * self.allocator.page_size
        assert sequence.kept <= (0 if self.window is None else max(0, saved - self.window + 1))
        sequence.tokens = tokens[:saved]
        self.append(self.add(sequence), tokens[saved:])

    @rule(num_pages=st.integers(1, 4))
    def evict(self, num_pages):
        expected, free = min(num_pages, self.cache.num_evictable), self.allocator.num_free
        assert self.cache.evict(num_pages) == expected
        assert self.allocator.num_free == free + expected

    @rule(pick=pick, everything=st.sampled_from([False, False, True]))
    def forget(self, pick, everything):
        if everything:
            self.cache.reset()
            assert self.cache.num_pages == 0
        elif self.cache.num_pages:
            assert self.cache.forget([self.cache.page_ids[pick % self.cache.num_pages]]) >= 1

    # The allocator itself.

    @rule(num_pages=st.integers(0, 4))
    def allocate(self, num_pages):
        available = self.allocator.num_available
        page_ids = self.allocator.allocate_pages(num_pages)
        assert (page_ids is None) == (num_pages > available)
        self.stray.extend(page_ids or [])

    @rule(num_pages=st.integers(1, 5))
    @precondition(lambda self: isinstance(self.allocator, BuddyPageAllocator))
    def allocate_run(self, num_pages):
        page_ids = self.allocator.allocate_run(num_pages)
        if page_ids is not None:
            assert page_ids == list(range(page_ids[0], page_ids[0] + num_pages))
            assert page_ids[0] % (1 << (num_pages - 1).bit_length()) == 0
            self.stray.extend(page_ids)

    @rule(num_pages=st.integers(1, 4), keep=st.booleans())
    @precondition(lambda self: self.stray)
    def free(self, num_pages, keep):
        for page_id in self.stray[:num_pages]:
            if (
                keep
                and isinstance(self.allocator, LRUPageAllocator)
                and page_id not in self.allocator.evictors.held
            ):
                self.allocator.cache_page(page_id)
            self.stray.remove(page_id)
            self.allocator.free_page(page_id)

    @rule(pick=pick)
    def misuse_a_free_page(self, pick):
        free = sorted(self.allocator._free_ids())
        if free:
            page_id = free[pick % len(free)]
            for call, error in [
                (self.allocator.free_page, DoubleFree),
                (self.allocator.share_page, UseAfterFree),
                (lambda page_id: self.allocator.free_pages([page_id]), DoubleFree),
                (lambda page_id: self.allocator.share_pages([page_id]), UseAfterFree),
            ]:
                with pytest.raises(error):
                    call(page_id)
        with pytest.raises(UnknownPage):
            self.allocator.free_page(self.allocator.total_pages)

    @rule(num_pages=st.integers(1, 3))
    def shrink(self, num_pages):
        assert self.allocator.shrink(num_pages) <= num_pages

    # Invariants.

    @invariant()
    def the_books_agree(self):
        if not hasattr(self, "allocator"):
            return
        holders = [sequence.table for sequence in self.live]
        holders += [Held([page_id]) for page_id in self.stray]
        self.allocator.check(holders, [self.cache])
        assert self.allocator.num_free + self.allocator.num_used == self.allocator.total_pages
        held = set(range(self.allocator.total_pages)) - set(self.allocator._free_ids())
        assert self.held - held <= self.pool.told_free
        self.held = held
        self.pool.told_free.clear()
        self.pool.wipe(self.allocator)

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence in getattr(self, "live", ()):
            table = sequence.table
            assert table.num_tokens == len(sequence.tokens)
            read = [self.pool.tokens[slot] for slot in table.slots(sequence.kept).tolist()]
            assert read == sequence.tokens[sequence.kept :]
            entries = table.entries
            assert [e.logical_end for e in entries[:-1]] == [e.logical_start for e in entries[1:]]
            if entries:
                assert (
                    entries[0].logical_start == sequence.kept
                    and entries[-1].logical_end == table.num_tokens
                )

    @invariant()
    def cached_pages_hold_the_tokens_they_are_named_for(self):
        if not hasattr(self, "cache"):
            return
        size = self.allocator.page_size
        for page in self.cache._tree.by_page.values():
            first = page.page_id * size
            slots = range(first, first + len(page.tokens) // TOKEN_BYTES)
            assert [self.pool.tokens[slot] for slot in slots] == np.frombuffer(
                page.tokens, "<i4"
            ).tolist()

    @invariant()
    def events_tell_what_is_cached(self):
        if not hasattr(self, "cache"):
            return
        for event in self.cache.take_events():
            if isinstance(event, PagesStored):
                self.index.update(event.page_hashes)
            elif isinstance(event, CacheCleared):
                self.index.clear()
            else:
                self.index.remove(event.page_hash)
        held = self.cache._tree.by_page.values()
        assert self.index == {page.page_hash for page in held}

    @invariant()
    def the_packed_batch_is_that_of_fresh_tables(self):
        if not getattr(self, "live", ()):
            return
        tables = [sequence.table for sequence in self.live]
        kept, fresh = self.block_table.update(tables), pack(tables)
        width = fresh.block_tables.shape[1]
        assert (kept.block_tables[:, :width] == fresh.block_tables).all()
        assert (kept.block_tables[:, width:] == -1).all()
        assert (kept.context_lens == fresh.context_lens).all()
        for row, sequence in enumerate(self.live):
            assert (
                packed_slots(fresh, row, sequence.kept, self.allocator.page_size)
                == sequence.table.slots(sequence.kept).tolist()
            )

    def teardown(self):
        if hasattr(self, "allocator"):
            for sequence in self.live:
                sequence.table.release()
            for page_id in self.stray:
                self.allocator.free_page(page_id)
            self.cache.close()
            self.allocator.check([], [])


class Held:
    """Somebody who is not a table and holds pages."""

    def __init__(self, page_ids):
        self.page_ids = page_ids


def packed_slots(packed, row, first, page_size):
    """The slots of a row's positions from ``first`` on, read as the kernel reads them."""
    slots = []
    for column, page_id in enumerate(packed.block_tables[row].tolist()):
        start = (
            column * page_size
            if packed.page_starts is None
            else int(packed.page_starts[row, column])
        )
        size = page_size if packed.page_lens is None else int(packed.page_lens[row, column])
        for position in range(max(start, first), min(start + size, int(packed.context_lens[row]))):
            assert page_id >= 0
            slots.append(page_id * page_size + position - start)
    return slots


def machine(examples, steps):
    """A test of ``examples * steps`` operations at most."""
    case = type("Pages", (PageMachine,), {}).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestPages = machine(120, 50)
TestPagesLong = pytest.mark.long(machine(1600, 100))
