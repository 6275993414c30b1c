"""Prompt caches to and from mlx-lm's own, in memory and in its files.

A file holds the tokens of one sequence, not the pool: ``mlx_lm.models.cache`` reads it, and
``load`` reads what mlx-lm has written.
"""

import copy

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.layout import CachePlace


def to_stock(prompt_cache: list) -> list:
    """mlx-lm's own prompt cache of the same tokens, contiguous; nothing is shared with it."""
    return [_to_stock(cache) for cache in prompt_cache]


def _to_stock(cache):
    if isinstance(cache, PagedKVCache):
        return cache.to_stock()
    if isinstance(cache, stock.CacheList):
        return stock.CacheList(*to_stock(cache.caches))
    return copy.deepcopy(cache)


def from_stock(paged, prompt_cache: list) -> list:
    """A prompt cache on pages of the tokens of mlx-lm's own, which stays as it is.

    Raises:
        ValueError: It is not of this model.
    """
    ours = paged.make_cache()
    pairs = list(_pairs(paged.layout.places, ours, prompt_cache))
    for cache, plain in pairs:
        _check_fits(cache, plain)
    _check_same_length([plain for _, plain in pairs])
    _skip_what_is_not_there(pairs)
    for cache, plain in pairs:
        _fill(cache, plain)
    # Here and now: the thread that goes on may be another, which cannot compute it.
    mx.eval([cache.state for cache, _ in pairs])
    return _with_the_rest(paged.layout.places, ours, prompt_cache)


def _check_same_length(plains: list) -> None:
    lengths = {int(plain.offset) for plain in plains}
    if len(lengths) > 1:
        must = "prompt_cache must hold equally many tokens in all layers"
        fail("from_stock", must, sorted(lengths))


def _skip_what_is_not_there(pairs) -> None:
    """Begin tables of windows with pages that are behind the window."""
    lens: dict = {}
    for cache, plain in pairs:
        row = cache.rows[0]
        if row.name not in lens:
            size = row.table.page_size
            row.first_token = int(plain.offset) - _num_held(plain)
            row.table.skip(row.first_token // size * size, cache.group.allocator)
            lens[row.name] = np.array([row.table.num_tokens], np.int32)
        cache.lens = lens[row.name]


def _num_held(plain) -> int:
    """Tokens whose K and V a stock cache holds."""
    return 0 if plain.keys is None else min(int(plain.offset), _in_order(plain)[0].shape[2])


def _pairs(places, ours, theirs):
    """(our cache, theirs) wherever ours is paged."""
    if len(ours) != len(theirs):
        fail(
            "from_stock", f"prompt_cache must have {len(ours)} caches, as the model's", len(theirs)
        )
    for place, cache, plain in zip(places, ours, theirs):
        if isinstance(place, CachePlace):
            yield cache, plain
        elif isinstance(place, list):
            parts = plain.caches if isinstance(plain, stock.CacheList) else []
            yield from _pairs(place, cache.caches, parts)


def _with_the_rest(places, ours, theirs) -> list:
    """``ours`` where it is paged, copies of ``theirs`` elsewhere."""
    joined = []
    for place, cache, plain in zip(places, ours, theirs):
        if isinstance(place, list):
            parts = _with_the_rest(place, cache.caches, plain.caches)
            joined.append(stock.CacheList(*parts))
        else:
            joined.append(cache if isinstance(place, CachePlace) else copy.deepcopy(plain))
    return joined


def _check_fits(cache, plain) -> None:
    group = cache.group
    kind = stock.KVCache if group.window is None else stock.RotatingKVCache
    if type(plain) is not kind or (group.window is not None and plain.max_size != group.window):
        wanted = kind.__name__ if group.window is None else f"{kind.__name__} of {group.window}"
        must = f"prompt_cache must have a {wanted} for layer {cache.layer}, as the model's"
        fail("from_stock", must, type(plain).__name__)
    expected = group.geometry.get(cache.layer)
    if plain.keys is None or expected is None:
        return
    batch, heads, _, head_dim = plain.keys.shape
    found = (batch, heads, head_dim, plain.values.shape[3])
    if found != (1, *expected[:3]):
        must = f"prompt_cache must hold (batch, heads, dim of K, dim of V) = {(1, *expected[:3])}"
        fail("from_stock", must, found)


def _fill(cache, plain) -> None:
    """Write the tokens that ``plain`` holds."""
    length = int(plain.offset)
    if not length:
        return
    k, v = _in_order(plain)
    row = cache.rows[0]
    step = cache._step(length - cache.offset)
    pool, i = cache.group.pool_of(cache.layer, k, v)
    slots = row.table.slots(row.first_token, length)
    pool.write(i, _one_sequence(k, pool), _one_sequence(v, pool), slots)
    step.served.add(cache.layer)
    cache.step, cache.lens = step, step.ends


def _in_order(plain) -> tuple[mx.array, mx.array]:
    """K and V of the tokens that a stock cache holds, oldest first."""
    if isinstance(plain, stock.RotatingKVCache):
        k, v = (plain._temporal_order(x) for x in (plain.keys, plain.values))
        return k[:, :, -plain.max_size :], v[:, :, -plain.max_size :]
    return plain.keys[:, :, : plain.offset], plain.values[:, :, : plain.offset]


def _one_sequence(x: mx.array, pool) -> mx.array:
    return x[0].swapaxes(0, 1).astype(pool.dtype)


def save(path: str, prompt_cache: list, metadata: dict[str, str]) -> None:
    """Write a prompt cache as mlx-lm's ``save_prompt_cache`` does: its tokens, not the pool.

    Raises:
        ValueError: It holds more than one sequence.
    """
    stock.save_prompt_cache(path, to_stock(prompt_cache), metadata)


def load(paged, path: str) -> tuple[list, dict]:
    """Read a file of ``save``, or of mlx-lm's ``save_prompt_cache``, into pages.

    Returns:
        The prompt cache and its metadata.

    Raises:
        ValueError: The file is of another model, or of another kind.
    """
    prompt_cache, metadata = _read(path)
    return from_stock(paged, prompt_cache), metadata


def _read(path: str):
    must = "path must be a file that this mlx-lm's save_prompt_cache has written"
    try:
        prompt_cache, metadata = stock.load_prompt_cache(path, return_metadata=True)
        metadata = dict(metadata or {})
    except RuntimeError as error:
        fail("load", f"{must}, and {error}", repr(path))
    except Exception as error:
        # Older versions wrote other metadata, and classes have come and gone.
        fail("load", f"{must}, not an older one's or another file", f"{path!r}: {error!r}")
    return prompt_cache, metadata
