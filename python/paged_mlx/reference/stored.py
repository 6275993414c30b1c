"""Pages of a case in the formats that it names, and the contexts that they read as.

The arrays of a layer in their order (docs/formats.md): K's, V's, then those of open pages. With K
by channel a page is open or sealed by the toss of a coin, part-filled ones too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import dtypes, formats
from .call import Call
from .tables import Tables, poisoned

_BITS = {"q8": 8, "q4": 4}


class Layer(NamedTuple):
    """What a layer of quantised pages holds.

    Attributes:
        arrays: Stored, in the order of the formats.
        keys, values: Each context as the pages read, float32.
        block_tables: With the ids of open pages, from the number of pages on.
    """

    arrays: tuple[np.ndarray, ...]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    block_tables: np.ndarray


class _Side:
    """K or V: its arrays, poisoned, and what is put into them."""

    def __init__(self, case: Call, num_pages: int, name: str | None, is_key: bool, rng):
        self.case, self.name, self.is_key = case, name, is_key
        self.by_channel, self.is_rotated = is_key and name == "q4", not is_key and name == "q4"
        dim = case.head_dim if is_key else case.value_dim
        rows = (num_pages, case.num_kv_heads, case.page_size)
        if name is None:
            self.arrays = [poisoned((*rows, dim), case.dtype, case.poison, rng)]
            return
        words = (*rows, dim * _BITS[name] // 32)
        scales: tuple[int, ...] = (*rows, dim // formats.group_of(dim))
        if self.by_channel:
            scales = (*rows[:2], dim)
        self.arrays = [rng.integers(0, 2**32, words, np.uint32)]
        self.arrays += [poisoned(scales, case.dtype, case.poison, rng) for _ in range(2)]

    def put(self, page: int, x: np.ndarray) -> np.ndarray:
        """Store a page's tokens ``[tokens, heads, dim]``; return what they read as."""
        dtype, count = self.case.dtype, len(x)
        if self.by_channel:
            whole = np.zeros((1, x.shape[1], self.case.page_size, x.shape[2]), np.float32)
            whole[0, :, :count] = np.moveaxis(x, 0, 1)
            stored = formats.quantise_channels(whole, np.array([count]), dtype)
            self.arrays[0][page, :, :count] = stored[0][0, :, :count]
            self.arrays[1][page], self.arrays[2][page] = stored[1][0], stored[2][0]
            codes, scales, minima = stored
            read = formats.dequantise_channels(codes, scales, minima, dtype)
            return np.moveaxis(read[0, :, :count], 0, 1)
        if self.name is None:
            self.arrays[0][page, :, :count] = np.moveaxis(dtypes.encode(x, dtype), 0, 1)
            return x
        bits = _BITS[self.name]
        stored = formats.quantise_tokens(self.turned(x), bits, dtype)
        for array, values in zip(self.arrays, stored):
            array[page, :, :count] = np.moveaxis(values, 0, 1)
        codes, scales, biases = stored
        read = formats.dequantise_tokens(codes, scales, biases, bits, dtype)
        return formats.rotate(read) if self.is_rotated else read

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Tokens as they are quantised, and as open pages hold them."""
        return dtypes.round_to(formats.rotate(x), self.case.dtype) if self.is_rotated else x


def store(case: Call, tables: Tables, keys: list, values: list, rng) -> Layer:
    """Put contiguous K and V into pages of the case's formats; poison everything else."""
    k = _Side(case, tables.num_pages, case.k_format, True, rng)
    v = _Side(case, tables.num_pages, case.v_format, False, rng)
    longest = _longest(tables)
    toss = np.random.default_rng([case.seed, 9])  # the same whatever ids the pages have
    opened = _open_pages(longest, case, toss, rng) if k.by_channel else {}
    shape = (len(opened) + 1, case.num_kv_heads, case.page_size)
    open_arrays = [
        poisoned((*shape, dim), case.dtype, case.poison, rng)
        for dim in (case.head_dim, case.value_dim)
    ]
    read: dict[int, list[np.ndarray]] = {}
    for page, (s, entry) in longest.items():
        x = [side[s][entry.start : entry.end] for side in (keys, values)]
        if page not in opened:
            read[page] = [side.put(page, tokens) for side, tokens in zip((k, v), x)]
            continue
        turned = v.turned(x[1])
        for array, tokens in zip(open_arrays, (x[0], turned)):
            stored = dtypes.encode(tokens, case.dtype)
            array[opened[page], :, : len(tokens)] = np.moveaxis(stored, 0, 1)
        read[page] = [x[0], formats.rotate(turned) if v.is_rotated else x[1]]
    block_tables = tables.block_tables.copy()
    for row, own in enumerate(tables.entries):
        ids = {entry.page_id for entry in own if entry.visible}
        for i, page in enumerate(block_tables[row].tolist()):
            if page in ids and page in opened:
                block_tables[row, i] = tables.num_pages + opened[page]
    arrays = (*k.arrays, *v.arrays, *(open_arrays if k.by_channel else ()))
    own_keys, own_values = (_contexts(tables, read, x, i) for i, x in enumerate((keys, values)))
    return Layer(arrays, own_keys, own_values, block_tables)


def _longest(tables: Tables) -> dict:
    """Of each page that is seen, the entry with most tokens, and its sequence."""
    longest: dict = {}
    for s, own in enumerate(tables.entries):
        for entry in own:
            before = longest.get(entry.page_id)
            seen = entry.visible and entry.end > entry.start
            if seen and (before is None or before[1].end < entry.end):
                longest[entry.page_id] = s, entry
    return longest


def _open_pages(longest: dict, case: Call, toss, rng) -> dict[int, int]:
    """The open slot of each page that is open."""
    opened = []
    for page, (_, entry) in longest.items():
        is_full = entry.end - entry.start == case.page_size
        if toss.random() < (0.2 if is_full else 0.7):
            opened.append(page)
    slots = rng.permutation(len(opened) + 1)
    return {page: int(slot) for page, slot in zip(opened, slots)}


def _contexts(tables: Tables, read: dict, original: list, side: int) -> list[np.ndarray]:
    """Each context as its pages read; what no query sees stays as it was."""
    contexts = []
    for own, context in zip(tables.entries, original):
        context = np.array(context, np.float32)
        for entry in own:
            if entry.visible and entry.page_id in read:
                length = entry.end - entry.start
                context[entry.start : entry.end] = read[entry.page_id][side][:length]
        contexts.append(context)
    return contexts
