"""Who gives pages back when none is free, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Evictor(Protocol):
    """Somebody who holds pages only because they might be useful again."""

    @property
    def num_evictable(self) -> int:
        """Pages that ``evict`` could free now."""

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages that no table holds; return how many."""

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        """The evictor is now the only holder of these watched pages."""

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        """Somebody else now holds these watched pages too."""
