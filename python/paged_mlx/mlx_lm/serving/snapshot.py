"""The pages of a model and their content now, as plain data: ``/pages`` sends it, a page map draws it."""

from __future__ import annotations

from typing import Any

from paged_mlx.pages.pool_map import page_figures


def snapshot(paged) -> dict[str, Any]:
    """The pages of a ``PagedModel``.

    Returns:
        A dict that JSON can hold. ``groups`` has one entry for each window: ``page_figures``, sizes,
        and how many pages are free and cached.
    """
    with paged.passes.lock:
        paged.passes.reclaim()
        sequences = sorted(paged.passes.sequences, key=lambda sequence: sequence.name)
        caches = {} if paged.prefixes is None else paged.prefixes.caches
        groups = [
            _group(window, group, sequences, caches.get(window))
            for window, group in paged.groups.items()
        ]
        found = {
            "model": type(paged.model).__module__.removeprefix("mlx_lm.models."),
            "nbytes": paged.nbytes,
            "groups": groups,
            "routes": paged.routes,
        }
        return found


def _group(window, group, sequences, cache) -> dict[str, Any]:
    named = [(sequence.name, sequence.tables[window]) for sequence in sequences]
    pool = group.pools[0] if group.pools else None
    form, dense = None, ()
    if pool is not None and not pool.formats.are_dense:
        form = str(pool.formats)
        dense = () if pool.open_pages is None else pool.open_pages.page_ids
    cached = () if cache is None else cache.page_ids
    allocator = group.allocator
    found = page_figures(allocator, named, cached, form, dense) | {
        "window": window,
        "layers": group.num_layers,
        "page_bytes": group.page_bytes,
        "free": allocator.num_free,
        "cached": len(cached),
        "evictable": allocator.num_evictable,
    }
    if cache is not None:
        stats = cache.stats
        names = ("queries", "hits", "query_tokens", "hit_tokens", "stored", "evicted", "forgotten")
        found["cache"] = {name: getattr(stats, name) for name in names}
    return found
