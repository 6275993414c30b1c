"""Events of a prefix cache in the form of vLLM's KV events, which viewers and routers read.

A page is vLLM's block. Names and order of the fields are those of ``vllm.distributed.kv_events``;
its newer releases send each event as a map, older ones as an array that begins with the type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paged_mlx.errors import fail
from paged_mlx.prefix.events import CacheCleared, CacheEvent, PageRemoved, PagesStored
from paged_mlx.prefix.hash import root_hash

FORMS = ("map", "array")
_64_BITS = (1 << 64) - 1


class VllmEvents:
    """Puts the events of one prefix cache into vLLM's form, in the order in which they came.

    Part-filled pages, which vLLM does not cache, are left out. Where events were lost because
    nobody took them in time, ``AllBlocksCleared`` comes first: an index then knows less than is
    cached, and never more.

    Examples:
        >>> import paged_mlx
        >>> from paged_mlx.prefix.vllm_events import VllmEvents
        >>> allocator, table = paged_mlx.PageAllocator(8, 4), paged_mlx.PageTable(4)
        >>> cache = paged_mlx.PrefixCache(allocator, max_events=100)
        >>> appended = table.append_tokens(4, allocator)
        >>> cache.insert([7, 8, 9, 10], table)
        1
        >>> (event,) = VllmEvents(4).convert(cache.take_events())
        >>> event["type"], event["token_ids"], event["block_size"], event["parent_block_hash"]
        ('BlockStored', [7, 8, 9, 10], 4, None)

    Args:
        page_size: Tokens in a page of the cache.
        group: Number of the group of layers, ``group_idx``; None: there is one.
        medium: Where the pages are, as vLLM says it.
        form: ``"map"`` or ``"array"``.
        int_hashes: Hashes as integers, the low 64 bits, instead of bytes.

    Raises:
        ValueError: ``form`` is another.
    """

    def __init__(
        self,
        page_size: int,
        *,
        group: int | None = None,
        medium: str = "GPU",
        form: str = "map",
        int_hashes: bool = False,
    ) -> None:
        if form not in FORMS:
            fail("VllmEvents", f"form must be one of {', '.join(FORMS)}", repr(form))
        self._page_size, self._group, self._medium = page_size, group, medium
        self._is_map, self._int_hashes = form == "map", int_hashes
        self._root = root_hash(page_size)
        self._part_filled: set[bytes] = set()
        self._number = 0

    def convert(self, events: Iterable[CacheEvent]) -> list[Any]:
        """vLLM's events for those that ``PrefixCache.take_events`` gave."""
        found = []
        for event in events:
            if event.number != self._number + 1:
                found.append(self._event("AllBlocksCleared"))
            self._number = event.number
            if isinstance(event, PagesStored):
                found += self._stored(event)
            elif isinstance(event, PageRemoved):
                found += self._removed(event)
            elif isinstance(event, CacheCleared):
                self._part_filled.clear()
                found.append(self._event("AllBlocksCleared"))
        return found

    def _stored(self, event: PagesStored) -> list[Any]:
        full = len(event.tokens) // self._page_size
        self._part_filled.update(event.page_hashes[full:])
        if not full:
            return []
        parent = None if event.parent_hash == self._root else self._hash(event.parent_hash)
        fields = {
            "block_hashes": [self._hash(each) for each in event.page_hashes[:full]],
            "parent_block_hash": parent,
            "token_ids": list(event.tokens[: full * self._page_size]),
            "block_size": self._page_size,
            "lora_id": None,
            "medium": self._medium,
            "lora_name": None,
        }
        keys = [(key,) if key else None for key in event.keys[:full]]
        return [self._event("BlockStored", fields, extra_keys=keys if any(keys) else None)]

    def _removed(self, event: PageRemoved) -> list[Any]:
        if event.page_hash in self._part_filled:
            self._part_filled.discard(event.page_hash)
            return []
        fields = {"block_hashes": [self._hash(event.page_hash)], "medium": self._medium}
        return [self._event("BlockRemoved", fields)]

    def _hash(self, page_hash: bytes) -> int | bytes:
        return int.from_bytes(page_hash, "big") & _64_BITS if self._int_hashes else page_hash

    def _event(self, kind: str, fields: dict[str, Any] | None = None, **optional: Any) -> Any:
        """An event; what is optional is left out where it says nothing, and in arrays."""
        fields = fields or {}
        if not self._is_map:
            return [kind, *fields.values()]
        if fields:
            optional["group_idx"] = self._group
        said = {name: value for name, value in optional.items() if value is not None}
        return {"type": kind, **fields, **said}
