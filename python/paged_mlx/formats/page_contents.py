"""What the pages of a sequence hold as it is stored: out of a pool, and into pages of another.

Codes and scales stay as they are, so that nothing is quantised twice.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx.pages.page_map import PageMap


def page_contents(pool, layer: int, pages: PageMap, first: int) -> list[mx.array] | None:
    """What a layer's pages hold, those of a sequence from its ``first`` on.

    Returns:
        An array for each of the layer's, ``[pages, ...]``: of those with an entry for each page, and
        of open pages. None: an append of as many tokens would not make such pages.
    """
    split = _split(pool, pages, first)
    if split is None:
        return None
    return [
        array[mx.array(entries)]
        for array, entries in zip(pool.state[layer], _entries(pool, *split))
        if entries.size
    ]


def put_contents(pool, layer: int, pages: PageMap, first: int, contents: list[mx.array]) -> bool:
    """Put what ``page_contents`` gave into the pages of a sequence that has as many tokens.

    Returns:
        Whether that was done; False if the pages are of other sizes or another dtype.
    """
    split = _split(pool, pages, first)
    if split is None:
        return False
    arrays, entries = pool.state[layer], _entries(pool, *split)
    places = [(i, x) for i, x in enumerate(entries) if x.size]
    if [(len(x), *arrays[i].shape[1:], arrays[i].dtype) for i, x in places] != [
        (*x.shape, x.dtype) for x in contents
    ]:
        return False
    given = dict(zip((i for i, _ in places), contents))
    for pair in _pairs(pool):
        if pair[0] in given:
            _write(pool, arrays, pair, entries[pair[0]], [given[i] for i in pair])
    slots = pages.slots(first * pool.page_size, pages.num_tokens)
    if pool.open_pages is not None:
        pool.open_pages.wrote(layer, pool.slots(slots).split)
    if layer == 0:
        pool.remember(slots)
    return True


def _split(pool, pages: PageMap, first: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Pages, and open pages' slots, as an append of all tokens makes them: the last one is open
    if it has room, the others are not."""
    ids = np.array(pages.ids[first:], np.int32)
    if pages.starts is not None or first < pages.num_freed:
        return None
    if pool.open_pages is None:
        return ids, ids[:0]
    is_open = np.array([pool.open_pages.is_open(page_id) for page_id in ids.tolist()], bool)
    if is_open[:-1].any() or is_open[-1:].any() != bool(pages.num_tokens % pool.page_size):
        return None
    slots = [pool.open_pages.slot_of(page_id) for page_id in ids[is_open].tolist()]
    return ids[~is_open], np.array(slots, np.int32)


def _entries(pool, page_ids: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """The entries of each of a layer's arrays."""
    num_open = 2 if pool.formats.have_open_pages else 0
    return [page_ids] * (len(pool.state[0]) - num_open) + [slots] * num_open


def _pairs(pool) -> list[tuple[int, int]]:
    """A layer's arrays by twos that have rows alike: pages or codes, scales and biases, open pages."""
    k, v = pool.formats
    second = 1 if k is None else 3
    pairs = [(0, second)]
    pairs += [(1, 2)] if k is not None else []
    pairs += [(second + 1, second + 2)] if v is not None else []
    last = len(pool.state[0])
    return pairs + ([(last - 2, last - 1)] if pool.formats.have_open_pages else [])


def _write(pool, arrays, pair, entries: np.ndarray, contents: list[mx.array]) -> None:
    """Write whole entries of two arrays, as if the bits were rows of dense pages."""
    shapes = [(*a.shape[:2], -1, a.shape[-1]) for a in (arrays[i] for i in pair)]
    pages = [arrays[i].reshape(shape).view(pool.dtype) for i, shape in zip(pair, shapes)]
    size = pages[0].shape[2]
    tokens = [
        x.reshape(len(entries), *page.shape[1:3], -1).view(pool.dtype).swapaxes(1, 2).flatten(0, 1)
        for x, page in zip(contents, pages)
    ]
    slots = (entries[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
    written = operations.write_pages(
        tokens, pages, mx.array(slots.astype(np.int32)), alias=True, stream=pool.stream
    )
    for i, page in zip(pair, written):
        arrays[i] = page.view(arrays[i].dtype).reshape(arrays[i].shape)
