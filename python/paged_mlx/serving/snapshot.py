"""What the pages of a model hold now, as plain data: what ``/pages`` sends and a page map draws."""

from __future__ import annotations

from typing import Any

from paged_mlx.pages.page_map import NO_PAGE


def snapshot(paged) -> dict[str, Any]:
    """The pages of a ``PagedModel``.

    Returns:
        A dict that JSON can hold. ``groups`` has one entry for each window: sizes, how many
        pages are free, in use and cached, ``sequences`` (name, tokens and page ids of each, None
        for pages behind the window), and ``pages``, by id: ``[holders, cached]``, how many hold a
        page, the cache included, and whether the cache does. Pages that are not in it are free.
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
    allocator = group.allocator
    counts = allocator.counts.tolist()
    cached = set() if cache is None else set(cache.page_ids)
    pages = {page: [held, page in cached] for page, held in enumerate(counts) if held}
    found = {
        "window": window,
        "layers": group.num_layers,
        "page_size": group.page_size,
        "page_bytes": group.page_bytes,
        "total": allocator.total_pages,
        "free": allocator.num_free,
        "cached": len(cached),
        "evictable": allocator.num_evictable,
        "sequences": [],
        "pages": pages,
    }
    for sequence in sequences:
        table = sequence.tables[window]
        if table.page_ids:
            ids = [None if page == NO_PAGE else page for page in table.page_ids]
            found["sequences"].append(
                {"name": sequence.name, "tokens": table.num_tokens, "pages": ids}
            )
    if cache is not None:
        stats = cache.stats
        names = ("queries", "hits", "query_tokens", "hit_tokens", "stored", "evicted", "forgotten")
        found["cache"] = {name: getattr(stats, name) for name in names}
    return found
