"""Caches that mlx-lm takes for its own, with K and V in pages.

A cache is one layer's view of some sequences. The sequences, with their page tables, are
shared by the caches of all layers of a group; a cache itself knows how many tokens its
layer has of each.
"""

import copy
import logging
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock
from mlx_lm.models.base import create_causal_mask

from paged_mlx.errors import fail, whole_number
from paged_mlx.forward.gathered import GatheredKV, PagedMask
from paged_mlx.forward.group import LayerGroup
from paged_mlx.forward.hook import ATTENTION, attend_handles
from paged_mlx.forward.sequence import Sequence
from paged_mlx.forward.step import Step
from paged_mlx.mlx_lm.vlm import attending

log = logging.getLogger("paged_mlx")


class PagedKVCache(stock._BaseCache):
    """One layer's K and V of one sequence, or of several of equal length.

    Made by an enabled model's ``make_cache``. It is a PagedFullCache or a PagedWindowCache, as
    the group has a window: for mlx-lm the kind that the stock cache is.
    """

    reads_drafts = False  # whether tokens are likely to be taken back: nobody is to begin with them
    batched = False  # whether K and V come back as those of mlx-lm's batch caches do

    def __new__(cls, group, *args, **options):
        if cls is PagedKVCache:
            cls = PagedFullCache if group.window is None else PagedWindowCache
        if group.caches_attend:
            cls = attending(cls, group.passes.model())
        return super().__new__(cls)

    def __init__(
        self,
        group: LayerGroup,
        layer: int,
        rows: list[Sequence],
        lens: np.ndarray | None = None,
    ):
        self.group = group
        self.layer = layer
        self.hold(rows, np.zeros(len(rows), np.int32) if lens is None else lens)
        self.step: Step | None = None
        self.stored = False  # put aside, by ``extract``

    def hold(self, rows: list[Sequence], lens: np.ndarray) -> None:
        """Be the cache of these sequences, ``lens`` tokens of each."""
        self.rows = rows
        self.names = tuple([row.name for row in rows])
        self.lens = lens

    # Writing

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Write a step's K and V ``[batch, num_kv_heads, tokens, head_dim]`` into pages.

        Returns:
            K and V of the whole context as lazy gathers.

        Raises:
            OutOfPages: The pool is full and may not grow; nothing has changed.
        """
        batch, _, num_tokens, _ = keys.shape
        if batch != len(self.rows):
            self._check_batch(batch)
        group, layer, passes = self.group, self.layer, self.group.passes
        with passes.turn:
            step = group.newest
            if step is None or not step.joins(layer, self.names, self.lens, num_tokens):
                step = self.begin_step(num_tokens)
            handles = group.fetch(layer, step, keys, values)
            step.served.add(layer)
            passes.served(step)
            if layer not in group.attended:
                if layer in group.written:  # it attends by itself
                    passes.attended(step, keys)
                group.written.add(layer)
        self.step, self.lens, self.stored = step, step.ends, False
        self._advanced(num_tokens)
        return handles

    def count(self, num_tokens: int) -> None:
        """Take part in a pass as a layer that has no K and V."""
        with self.group.passes.turn:
            step = self.begin_step(num_tokens)
            step.served.add(self.layer)
            self.group.passes.served(step)
        self.step, self.lens, self.stored = step, step.ends, False
        self._advanced(num_tokens)

    def keys_and_values(self):
        """K and V of the whole context as lazy gathers."""
        if self.step is self.group.newest and self.lens is self.step.ends:
            return self.group.fetch_again(self.layer, self.step)
        k, v = self.group.contiguous(self.layer, self.rows, self.lens)
        return k, v

    def begin_step(self, num_tokens: int):
        """The pass that reads so many tokens: begun, or joined if another layer has begun it."""
        return self.group.step(self, num_tokens)

    def counts(self, num_tokens: int) -> list[int]:
        """How many tokens of a row of the input, so long, are each sequence's: no padding."""
        return [num_tokens] * len(self.rows)

    def _advanced(self, num_tokens: int) -> None:
        """Told of the tokens of each step, padding included."""

    def _check_batch(self, batch: int) -> None:
        if self.lens.any() or len(self.rows) != 1:
            must = f"keys must have a batch of {len(self.rows)}, the sequences of the cache"
            fail("update_and_fetch", must, batch)
        self.hold(self.rows[0].family(batch), np.zeros(batch, np.int32))

    def attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        scale: float,
        mask: mx.array | str | None,
    ) -> mx.array:
        """Attention over what ``update_and_fetch`` has returned, for a model that has caches attend."""
        if type(keys) is not GatheredKV:
            return ATTENTION.before(queries, keys, values, scale=scale, mask=mask)
        with self.group.passes.turn:
            return attend_handles(ATTENTION.before, queries, keys, values, scale, mask, None, {})

    # What mlx-lm asks

    @property
    def offset(self):
        return int(self.lens[0])

    def size(self) -> int:
        longest = int(self.lens.max(initial=0))
        return longest if self.group.window is None else min(longest, self.group.window)

    def empty(self) -> bool:
        return not self.lens.any()

    @property
    def state(self) -> "State":
        """K and V of this cache's sequences, as a stock cache's; by then they are computed."""
        self.group.passes.wait()
        return State(self)

    @state.setter
    def state(self, state) -> None:
        if state:
            fail("PagedKVCache", "state must not be set, pages belong to a pool", "arrays")

    def read_state(self) -> tuple:
        """The state of a stock cache of the same tokens."""
        return tuple(self.to_stock().state)

    @property
    def meta_state(self):
        """The rest of the state, for versions of mlx-lm that save it apart."""
        return self.to_stock().meta_state

    @property
    def keys(self):
        return None if self.empty() else self.keys_and_values()[0]

    @keys.setter
    def keys(self, keys):
        self._order_after(0, keys)

    @property
    def values(self):
        return None if self.empty() else self.keys_and_values()[1]

    @values.setter
    def values(self, values):
        self._order_after(1, values)

    def _order_after(self, side: int, array: mx.array) -> None:
        """Order the pages after ``array``, and keep them.

        Models assign ``mx.depends(cache.keys, x)`` to have x computed before the next step,
        and one assigns zeros to values it never reads.
        """
        placed = self.group.placed(self.layer)
        assert placed is not None
        pool, i = placed
        arrays = pool[i].arrays
        arrays[side] = mx.depends(arrays[side], array)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's pages, each divided among those who hold it."""
        page = self.group.page_nbytes(self.layer)
        refs = self.group.allocator.ref_count
        return int(sum(page / refs(p) for table in self._tables() for p in table.page_ids))

    def _tables(self) -> list:
        return [row.tables[self.group.window] for row in self.rows]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """The mask of the step to come, as the stock cache gives it."""
        window = self.group.window
        if window is None:
            if window_size is None and (N == 1 or not return_array):
                return None if N == 1 else "causal"
            seen = self.offset
        else:
            if N == 1 and (window_size is None or window_size >= window):
                return None
            window_size = window_size or window
            seen = min(self.offset, window - 1)
            if seen + N <= min(window, window_size) and not return_array:
                return "causal"
        mask = create_causal_mask(N, seen, window_size=window_size)
        if self._passes_window(window_size):
            return mask
        return PagedMask(mask, self.group, window_size, self.lens, N)

    def _passes_window(self, window_size: int | None) -> bool:
        """Whether a mask lets tokens see more keys than the cache is for.

        A stock window cache keeps the keys of the window of a step's first token; under such
        a mask later tokens of the step see all of those, which no window describes.
        """
        window = self.group.window
        return window is not None and window_size is not None and window_size > window

    # Rewinding

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back.

        Behind a window ``retain`` tokens are kept for that, and more is an error. A cache that
        was put aside may be asked for any number, so it says yes only while it has all its pages.
        """
        window, retain = self.group.window, self.group.retain
        if window is None or retain is None:
            return True
        return retain > 0 and not (self.stored and any(r.first_held(window) for r in self.rows))

    def trim(self, n: int | list[int]):
        """Take back the last ``n`` tokens, of each sequence or as many as ``n`` says of each.

        Returns:
            How many were taken back: a sequence has no more than it holds.

        Raises:
            ValueError: ``n`` is negative or not a number for each sequence, or a window's pages
                of that position were freed; nothing has changed, in no layer.
        """
        if isinstance(n, (np.ndarray, mx.array)):
            n = n.tolist()
        each = isinstance(n, (list, tuple))
        asked = [whole_number("trim", "n", m) for m in (list(n) if each else [n])]  # type: ignore[arg-type]
        if each and len(asked) != len(self.rows):
            fail("trim", f"n must have a number for each of {len(self.rows)} sequences", len(asked))
        if each:
            taken = np.minimum(np.array(asked, np.int32), self.lens)
        else:
            taken = np.full_like(self.lens, min(asked[0], self.lens.min(initial=asked[0])))
        lens = self.lens - taken
        for row, count, length in zip(self.rows, taken.tolist(), lens.tolist()):
            if count:
                _check_rewind(row, count, length)
        self.lens = lens
        return taken.tolist() if each else int(taken.max(initial=0))

    # Copies, which share pages

    def fork(self, n: int) -> list:
        """``n`` caches of the same tokens on the same pages; no bytes move."""
        return [copy.deepcopy(self) for _ in range(n)]

    def __deepcopy__(self, memo):
        rows = [row.fork_for(self) for row in self.rows]
        copied = type(self)(self.group, self.layer, rows, self.lens)
        copied.step, copied.stored = self.step, self.stored
        return copied

    @classmethod
    def merge(cls, caches):
        """One batch of several caches; they stay as they are.

        With one of mlx-lm's own among them it is mlx-lm's batch, contiguous.
        """
        first = caches[0]
        if any(type(cache) in (stock.KVCache, stock.RotatingKVCache) for cache in caches):
            plain = [
                cache.to_stock() if isinstance(cache, PagedKVCache) else cache for cache in caches
            ]
            return plain[0].merge(plain)
        for cache in caches:
            first._check_joins("merge", cache)
        rows = [row.fork_for(first) for cache in caches for row in cache.rows]
        lens = np.concatenate([cache.lens for cache in caches])
        return BatchPagedKVCache(first.group, first.layer, rows, lens)

    def _check_joins(self, function: str, other) -> None:
        group = getattr(other, "group", None)
        if group is not self.group or other.layer != self.layer:
            must = "caches must be of one layer of one enabled model, all of them on its pages"
            fail(function, must, other)

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        """mlx-lm's quantised cache of the same tokens, contiguous: pages hold no codes."""
        if self.layer == 0:
            log.warning("kv_bits leaves the pages: mlx-lm's quantised cache goes on from here")
        return self.to_stock().to_quantized(group_size=group_size, bits=bits)

    def to_stock(self):
        """mlx-lm's own cache of the same tokens.

        Raises:
            ValueError: The cache holds several sequences.
        """
        if len(self.rows) != 1:
            fail("to_stock", "the cache must hold one sequence; extract one first", len(self.rows))
        window, length = self.group.window, self.offset
        plain = stock.KVCache() if window is None else stock.RotatingKVCache(window)
        if not length:
            return plain
        k, v = (mx.array(x) for x in self.group.contiguous(self.layer, self.rows, self.lens))
        if window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
            plain._idx = k.shape[2]
        plain.keys, plain.values, plain.offset = k, v, length
        return plain

    def __repr__(self):
        return f"PagedKVCache(layer {self.layer}, {self.lens.tolist()} tokens)"


def _check_rewind(row: Sequence, count: int, length: int) -> None:
    """Refuse to go back to ``length`` tokens where any group has freed what they see."""
    for window, group in row.groups.items():
        if window is not None and row.first_held(window) > max(0, length - window + 1):
            must = (
                f"n must leave the window's pages in place, which begin at "
                f"{row.first_held(window)} with retain={group.retain}"
            )
            fail("trim", must, f"{count}, back to position {length}")


class State(dict):
    """The state of a stock cache of the same tokens, gathered as it is read, item by item.

    mlx-lm asks for the state of a cache after a pass to evaluate it. There is nothing left to
    evaluate then, and to MLX, which evaluates the values of a dict, this is an empty one.
    """

    def __init__(self, cache: PagedKVCache):
        super().__init__()
        self._cache = cache

    def __iter__(self):
        return iter(self._cache.read_state())

    def __getitem__(self, i):
        return self._cache.read_state()[i]

    def __len__(self):
        return len(self._cache.read_state())

    def items(self):
        return enumerate(self._cache.read_state())


class PagedFullCache(PagedKVCache, stock.KVCache):  # type: ignore[misc]
    """Keeps all keys."""


class PagedWindowCache(PagedKVCache, stock.RotatingKVCache):  # type: ignore[misc]
    """Keeps the keys of a window."""

    keep = 0

    @property
    def max_size(self) -> int:
        return self.group.window


# Files name the class, and mlx-lm looks it up among its own when it reads them.
PagedFullCache.__name__, PagedWindowCache.__name__ = "KVCache", "RotatingKVCache"


class BatchPagedKVCache(PagedKVCache):
    """One layer's K and V of a batch of sequences of any lengths.

    Nothing is padded: sequences join, leave and grow by edits of a list.
    """

    batched = True
    #: Prompt tokens to come of each row, while rows are padded.
    remaining: np.ndarray | None = None

    @property
    def offset(self):
        return self.group.offsets(self.lens)

    # What a batch of mlx-lm's own reads of one that joins it: its K and V, contiguous from there.

    @property
    def left_padding(self):
        return mx.array(self.lens.max(initial=0) - self.lens)

    @property
    def _idx(self) -> int:
        return int(self.lens.max(initial=0))

    def read_state(self) -> tuple:
        return (*self.keys_and_values(), self.offset, self.left_padding)

    def begin_step(self, num_tokens: int):
        counts = None
        if self.remaining is not None:
            counts = np.clip(self.remaining, 0, num_tokens).astype(np.int32)
        return self.group.step(self, num_tokens, counts)

    def counts(self, num_tokens: int):
        if self.remaining is None:
            return super().counts(num_tokens)
        return np.clip(self.remaining, 0, num_tokens).tolist()

    def _check_batch(self, batch):
        must = f"keys must have a batch of {len(self.rows)}, the sequences of the cache"
        fail("update_and_fetch", must, batch)

    def _advanced(self, num_tokens):
        if self.remaining is not None:
            self.remaining = self.remaining - num_tokens

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """A mask over the gathered columns. It begins the step, so that they are known."""
        group = self.group
        windows = [window for window in (window_size, group.window) if window is not None]
        window = min(windows, default=None)
        step = self.begin_step(N)
        columns = mx.arange(step.first_column, step.first_column + step.num_columns)
        mask = columns >= mx.array(step.shifts.reshape(-1, 1, 1, 1))
        first = queries = step.first_column + step.num_columns - N
        if N > 1:
            queries = mx.arange(first, first + N)[:, None]
            mask = mask & (columns <= queries)
        if N > 1 and self._passes_window(window_size):
            return mask & (columns > queries - window_size) & (columns > first - group.window)
        if window is not None:
            mask = mask & (columns > queries - window)
        return PagedMask(mask, group, window, step.starts, N)

    # The batch

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ):
        """Take note of the padding of the prompts to come."""
        if left_padding is not None and any(left_padding):
            fail("prepare", "left_padding must be 0, pages need none", left_padding)
        if right_padding is not None and max(right_padding) > 0:
            self.remaining = np.array(lengths, np.int32)

    def finalize(self):
        self.remaining = None

    def filter(self, batch_indices: list[int] | mx.array):
        """Keep these sequences, in this order; one that is named again is kept as a fork.

        Raises:
            ValueError: There is no such sequence; nothing has changed.
        """
        keep = np.array(batch_indices).tolist()
        keep = [whole_number("filter", "batch_indices", i) for i in keep]
        if max(keep, default=0) >= max(1, len(self.rows)):
            fail("filter", f"batch_indices must be below {len(self.rows)}", max(keep))
        again = [i in keep[:place] for place, i in enumerate(keep)]
        rows = [self.rows[i].fork_for(self) if a else self.rows[i] for i, a in zip(keep, again)]
        self.hold(rows, self.lens[keep])
        if self.remaining is not None:
            self.remaining = self.remaining[keep]

    def extend(self, other: "BatchPagedKVCache"):
        """Take over the sequences of another batch.

        Raises:
            ValueError: It is not of this layer of this model's pages; nothing has changed.
        """
        self._check_joins("extend", other)
        self.hold(self.rows + other.rows, np.concatenate([self.lens, other.lens]))

    def extract(self, idx: int) -> PagedKVCache:
        """A cache of one sequence, on the same pages."""
        idx = whole_number("extract", "idx", idx, 0, len(self.rows) - 1)
        rows = [self.rows[idx].fork_for(self)]
        cache = PagedKVCache(self.group, self.layer, rows, self.lens[idx : idx + 1])
        cache.stored = True
        self.group.passes.aside.update(rows)
        return cache

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.remaining = self.remaining
        return copied
