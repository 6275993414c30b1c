"""Prompt caches to and from mlx-lm's own, in memory and in its files.

A file holds the tokens of one sequence, not the pool: ``mlx_lm.models.cache`` reads it, and
``load`` reads what mlx-lm has written. Behind the caches that mlx-lm reads, a file of quantised pages
has what the pages hold, so that nothing is quantised twice.
"""

import copy
import hashlib
import os
import tempfile
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.formats.page_contents import page_contents, put_contents
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.forward.group import widened, width
from paged_mlx.forward.identity import array_digest
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.counted_states import CountedStates
from paged_mlx.mlx_lm.layout import CachePlace
from paged_mlx.pages.tokens import pack_tokens, unpack_tokens


def to_stock(prompt_cache: list) -> list:
    """mlx-lm's own prompt cache of the same tokens, contiguous; nothing is shared with it."""
    return [_to_stock(cache) for cache in prompt_cache]


def _to_stock(cache):
    if not hasattr(cache, "state"):
        fail("to_stock", "prompt_cache must hold caches", type(cache).__name__)
    if isinstance(cache, PagedKVCache):
        return cache.to_stock()
    if isinstance(cache, stock.CacheList):
        return stock.CacheList(*to_stock(cache.caches))
    return copy.deepcopy(cache.plain() if isinstance(cache, CountedStates) else cache)


def from_stock(paged, prompt_cache: list, contents: list | None = None) -> list:
    """A prompt cache on pages of the tokens of mlx-lm's own, which stays as it is.

    Args:
        contents: What the pages of each paged layer hold, where that is known.

    Raises:
        ValueError: It is not of this model.
    """
    ours = paged.make_cache()
    paged.ranks.end_lease()
    pairs = list(_pairs(paged.layout.places, ours, prompt_cache))
    for cache, plain in pairs:
        _check_fits(cache, plain)
    _check_same_length([plain for _, plain in pairs])
    _skip_what_is_not_there(pairs)
    with paged.passes.turn:
        for (cache, plain), stored in zip(pairs, [*(contents or []), *([[]] * len(pairs))]):
            _fill(cache, plain, stored)
        paged.passes.end()
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
        window, row = cache.group.window, cache.rows[0]
        if window not in lens:
            table = row.tables[window]
            row.first_token[window] = int(plain.offset) - _num_held(plain)
            table.skip(
                row.first_token[window] // table.page_size * table.page_size, cache.group.allocator
            )
            lens[window] = np.array([table.num_tokens], np.int32)
        cache.lens = lens[window]


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
        if not hasattr(plain, "state"):
            must = "prompt_cache must hold caches of mlx-lm"
            fail("from_stock", must, type(plain).__name__)
        if isinstance(place, CachePlace):
            yield cache, plain
        elif isinstance(place, list):
            parts = plain.caches if isinstance(plain, stock.CacheList) else []
            yield from _pairs(place, cache.caches, parts)


def _with_the_rest(places, ours, theirs) -> list:
    """``ours`` where it is paged, copies of ``theirs`` elsewhere."""
    joined: list = []
    for place, cache, plain in zip(places, ours, theirs):
        if isinstance(place, list):
            parts = _with_the_rest(place, cache.caches, plain.caches)
            joined.append(stock.CacheList(*parts))
        elif isinstance(cache, CountedStates):
            joined.append(CountedStates.of(copy.deepcopy(plain), cache.tokens))
        else:
            joined.append(cache if isinstance(place, CachePlace) else copy.deepcopy(plain))
    return joined


def _check_fits(cache, plain) -> None:
    group = cache.group
    kind: Any = stock.KVCache if group.window is None else stock.RotatingKVCache
    if type(plain) is not kind or (group.window is not None and plain.max_size != group.window):
        wanted = kind.__name__ if group.window is None else f"{kind.__name__} of {group.window}"
        must = f"prompt_cache must have a {wanted} for layer {cache.layer}, as the model's"
        fail("from_stock", must, type(plain).__name__)
    expected = group.geometry.get(cache.layer)
    if plain.keys is None or expected is None:
        return
    batch, heads, _, head_dim = plain.keys.shape
    found = (batch, heads, width(head_dim), width(plain.values.shape[3]))
    if found != (1, *expected[:3]):
        must = f"prompt_cache must hold (batch, heads, dim of K, dim of V) = {(1, *expected[:3])}"
        fail("from_stock", must, found)


def _fill(cache, plain, stored: list[mx.array]) -> None:
    """Write the tokens that ``plain`` holds, as ``stored`` has them if its pages are alike."""
    length = int(plain.offset)
    if not length:
        return
    k, v = _in_order(plain)
    row = cache.rows[0]
    step = cache.begin_step(length - cache.offset)
    pool, i = cache.group.pool_of(cache.layer, k, v)
    window = cache.group.window
    pages, first = row.tables[window].map, row.first_token[window]
    if not (stored and put_contents(pool, i, pages, first // pages.page_size, stored)):
        k, v = widened(k, pool.head_dim), widened(v, pool.v_head_dim)
        slots = row.tables[window].slots(first, length)
        pool.write(i, _one_sequence(k, pool), _one_sequence(v, pool), slots)
    step.served.add(cache.layer)
    cache.group.passes.served(step)
    cache.step, cache.lens = step, step.ends


def _in_order(plain) -> tuple[mx.array, mx.array]:
    """K and V of the tokens that a stock cache holds, oldest first."""
    if isinstance(plain, stock.RotatingKVCache):
        k, v = (plain._temporal_order(x) for x in (plain.keys, plain.values))
        return k[:, :, -plain.max_size :], v[:, :, -plain.max_size :]
    return plain.keys[:, :, : plain.offset], plain.values[:, :, : plain.offset]


def _one_sequence(x: mx.array, pool) -> mx.array:
    return x[0].swapaxes(0, 1).astype(pool.dtype)


# Metadata of files: the tokens, if they are known, which model K and V are of, and a checksum.
TOKENS, MODEL, CHECKSUM = "paged_mlx_tokens", "paged_mlx_model", "paged_mlx_checksum"
RANK = "paged_mlx_rank"  # of a model that several ranks share
FORMAT = "paged_mlx_format"  # of the pages, where they are quantised


def save(
    path: str, prompt_cache: list, identity, tokens: list[int] | None, metadata, formats
) -> None:
    """Write a prompt cache as mlx-lm's ``save_prompt_cache`` does: its tokens, not the pool, and K
    and V as the pages read.

    It is written beside ``path`` and takes its place when it is whole.

    Raises:
        ValueError: It holds more than one sequence.
    """
    plain = to_stock(prompt_cache)
    told = {MODEL: identity.digest}
    if identity.place[1] > 1:
        told[RANK] = _place(identity)
    if not formats.are_dense:
        told[FORMAT] = str(formats)
    if tokens:
        told[TOKENS] = pack_tokens(tokens).hex()
    contents = [] if formats.are_dense else _contents(prompt_cache, plain)
    told[CHECKSUM] = _checksum(plain, told, contents)
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as beside:
        whole = os.path.join(beside, "cache.safetensors")
        stock.save_prompt_cache(whole, plain, {**(metadata or {}), **told})
        if contents:
            _add(whole, len(plain), contents)
        with open(whole, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(whole, path)


def load(paged, path: str) -> tuple[list, dict, list[int]]:
    """Read a file of ``save``, or of mlx-lm's ``save_prompt_cache``, into pages.

    Returns:
        The prompt cache, its metadata and, if they are known, its tokens.

    Raises:
        ValueError: The file is damaged, of another model, another format or another kind.
    """
    plain, metadata, contents = _read(path)
    told = {
        key: metadata.pop(key) for key in (TOKENS, MODEL, CHECKSUM, RANK, FORMAT) if key in metadata
    }
    checksum = told.pop(CHECKSUM, None)
    if (told or checksum) and checksum != _checksum(plain, told, contents):
        fail("load", "path must be a file as it was saved, but its checksum differs", repr(path))
    ours, theirs = _place(paged.identity), told.get(RANK, "0 of 1")
    if told and theirs != ours:
        fail("load", f"path must be a file of this rank, {ours}", f"{path!r} of {theirs}")
    if told and told.get(FORMAT, str(PageFormats())) != str(paged.formats):
        must = f"path must be a file of pages of the format that the model has, {paged.formats}"
        fail("load", must, f"{path!r} of {told.get(FORMAT, PageFormats())}")
    prompt_cache = from_stock(paged, plain, contents)
    if told and told.get(MODEL) != paged.identity.digest:
        must = "path must be a file of this model: of the same weights, adapters, configuration"
        fail("load", must, f"{path!r} of another")
    tokens = list(unpack_tokens(bytes.fromhex(told.get(TOKENS, ""))))
    for cache in prompt_cache:
        if isinstance(cache, CountedStates):
            cache.tokens.count(len(tokens))
    return prompt_cache, metadata, tokens


def _place(identity) -> str:
    rank, size = identity.place
    return f"{rank} of {size}"


def _contents(prompt_cache: list, plain: list) -> list:
    """What the pages of each paged layer hold; nothing of a layer whose pages a load cannot make."""
    found = []
    for cache, theirs in zip(_paged(prompt_cache), _paged(plain), strict=True):
        group, table = cache.group, cache.rows[0].tables[cache.group.window]
        with group.passes.turn:
            group.seal_own(cache.rows, [table])
            group.passes.keep()
            place = group.placed(cache.layer)
            held = None
            if place is not None and cache.offset == table.num_tokens > 0:
                first = (cache.offset - _num_held(theirs)) // table.page_size
                held = page_contents(place[0], place[1], table.map, first)
                mx.eval(held or [])
        found.append(held or [])
    return found if any(found) else []


def _paged(prompt_cache: list):
    """The paged caches, or what mlx-lm has in their places."""
    for cache in prompt_cache:
        if isinstance(cache, stock.CacheList):
            yield from _paged(cache.caches)
        elif isinstance(cache, (PagedKVCache, stock.KVCache, stock.RotatingKVCache)):
            yield cache


def _add(path: str, index: int, contents: list) -> None:
    """Put contents of pages behind the caches of a file, where mlx-lm does not look."""
    arrays, metadata = cast(tuple[dict, dict], mx.load(path, return_metadata=True))
    arrays.update(tree_flatten(contents, f".{index}"))
    mx.eval(arrays)
    mx.save_safetensors(path, arrays, metadata)


def _checksum(plain: list, told: dict, contents: list) -> str:
    """Of all that a file holds: states, which classes they are of, tokens and the model."""
    digest = hashlib.sha256(repr(sorted(told.items())).encode())
    states: Any = tree_flatten([cache.state for cache in plain])
    for name, value in [*states, *tree_flatten(contents)]:
        if isinstance(value, mx.array):
            digest.update(array_digest(name, value))
        elif value is not None:
            digest.update(f"{name} {value}".encode())
    digest.update(repr([type(cache).__name__ for cache in plain]).encode())
    return digest.hexdigest()


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
    behind = f"{len(prompt_cache)}."
    contents = [
        (name.removeprefix(behind), array)
        for name, array in cast(dict, mx.load(path)).items()
        if name.startswith(behind)
    ]
    return prompt_cache, metadata, tree_unflatten(contents) if contents else []
