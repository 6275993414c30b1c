"""The routes that attention of a model's layers has taken, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paged_mlx.forward.group import FRESH_PROMPT, LayerGroup

PAGES = "pages"
FRESH = "fresh prompt"
GATHER = "gather: "  # and the reason


def route_of(reason: str | None) -> str:
    """The name of a route: "pages", "fresh prompt", or "gather: " and why pages were not read."""
    if reason is None:
        return PAGES
    return FRESH if reason == FRESH_PROMPT else GATHER + reason


def routes_of(groups: Iterable[LayerGroup], layer: int | None = None) -> dict[str, int]:
    """Attention calls so far by route.

    Args:
        groups: Of the model, or the one of the layer.
        layer: Of one layer; None: of all.
    """
    found: Counter[str] = Counter()
    for group in groups:
        for (called, reason), count in list(group.calls.items()):
            if layer in (None, called):
                found[route_of(reason)] += count
    return dict(found)
