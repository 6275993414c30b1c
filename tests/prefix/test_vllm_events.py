"""Events in vLLM's form: its names, its order, its meaning of a block."""

import pytest
from page_helpers import table_of
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.hash import ExtraKey, page_hashes
from paged_mlx.prefix.vllm_events import VllmEvents


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def cache(allocator):
    return PrefixCache(allocator, max_events=1000)


def test_stored_blocks_have_the_fields_of_vllm_in_its_order(allocator, cache):
    hashes = page_hashes(range(12), 4)
    table = table_of(allocator, 12)
    cache.insert(range(8), table)
    cache.insert(range(12), table)
    first, second = VllmEvents(4).convert(cache.take_events())
    assert list(first) == [
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size",
        "lora_id", "medium", "lora_name",
    ]  # fmt: skip
    assert first["type"] == "BlockStored" and first["block_hashes"] == hashes[:2]
    assert first["parent_block_hash"] is None and first["token_ids"] == list(range(8))
    assert first["block_size"] == 4 and first["medium"] == "GPU"
    assert second["parent_block_hash"] == hashes[1] and second["block_hashes"] == hashes[2:]


def test_removals_and_a_reset_are_told(allocator, cache):
    events = VllmEvents(4, group=1, medium="CPU")
    table = table_of(allocator, 4)
    cache.insert(range(4), table)
    (stored,) = events.convert(cache.take_events())
    assert stored["group_idx"] == 1
    table.release()
    cache.evict(1)
    cache.reset()
    (page_hash,) = page_hashes(range(4), 4)
    assert events.convert(cache.take_events()) == [
        {"type": "BlockRemoved", "block_hashes": [page_hash], "medium": "CPU", "group_idx": 1},
        {"type": "AllBlocksCleared"},
    ]


def test_older_releases_read_arrays_and_integers(allocator, cache):
    cache.insert(range(8), table_of(allocator, 8))
    (event,) = VllmEvents(4, form="array", int_hashes=True).convert(cache.take_events())
    hashes = [int.from_bytes(each[-8:], "big") for each in page_hashes(range(8), 4)]
    assert event == ["BlockStored", hashes, None, list(range(8)), 4, None, "GPU", None]


def test_a_part_filled_page_is_no_block_and_leaves_without_a_word(allocator, cache):
    table = table_of(allocator, 6)
    cache.insert(range(6), table, tail=True)
    events = VllmEvents(4)
    (stored,) = events.convert(cache.take_events())
    assert stored["token_ids"] == [0, 1, 2, 3] and len(stored["block_hashes"]) == 1
    table.release()
    cache.evict(2)
    removed = events.convert(cache.take_events())
    assert [event["block_hashes"] for event in removed] == [page_hashes(range(4), 4)]


def test_extra_keys_of_each_block_are_told(allocator, cache):
    cache.insert(range(8), table_of(allocator, 8), [ExtraKey("adapter", "a")])
    (event,) = VllmEvents(4).convert(cache.take_events())
    (key,), none = event["extra_keys"]
    assert b"adapter" in key and none is None


def test_after_lost_events_an_index_begins_anew(allocator):
    cache = PrefixCache(allocator)
    cache.insert(range(4), table_of(allocator, 4))  # before anybody listens
    cache.record_events(2)
    for start in (0, 50, 100):
        cache.insert(range(start + 1, start + 5), table_of(allocator, 4))
    kinds = [event["type"] for event in VllmEvents(4).convert(cache.take_events())]
    assert kinds == ["AllBlocksCleared", "BlockStored", "BlockStored"]


def test_another_form_is_refused():
    with pytest.raises(ValueError, match=r"\[VllmEvents\] form must be one of map, array"):
        VllmEvents(4, form="xml")
