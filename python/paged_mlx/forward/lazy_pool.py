"""A pool whose newest K and V wait for the attention that follows them."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx._native import _ext
from paged_mlx.forward.gathered import PagesOfLayer
from paged_mlx.pool import PagePool
from paged_mlx.pool_storage import Arrays


class LazyPool(PagePool):
    """A PagePool that writes a layer's tokens and attends in one node of the graph.

    ``fetch`` hands a step's K and V to a model as handles, and their write waits;
    ``attend_fetched`` takes it along. Whoever asks for ``state`` instead, to write, copy, grow,
    evaluate or save, gets versions that come after every write that waits and after every read
    of the handles, begun or still to come. A step begins by settling: so no write is lost or
    done twice, and no page changes before its readers (docs/design.md, "Handles").

    Args:
        sizes, options: Of a PagePool.
        is_read: Whether another thread may read open pages at the places they have: none is
            sealed then. None: there is no other.
    """

    def __init__(self, *sizes, is_read=None, **options):
        self._is_read = is_read or (lambda: False)
        self._waiting: dict[int, PagesOfLayer] = {}  # layer -> whose tokens are not written
        self._fetches = _ext.Fetches()  # what the handles that models have got may still read
        super().__init__(*sizes, **options)

    @property
    def state(self) -> Arrays:  # type: ignore[override]
        self.settle()
        return self._state

    @state.setter
    def state(self, arrays: Arrays) -> None:
        self._state = arrays

    def versions(self) -> Arrays:
        """The newest versions."""
        return [list(arrays) for arrays in self._state]

    # Branches: what each of several threads has built

    def leave(self) -> "PartOfBranch":
        """What this pool has of a thread's branch."""
        memory = self._storage.base[0][-1]
        return PartOfBranch(self.versions(), self._waiting, self._fetches, memory)

    def holds(self, part: "PartOfBranch") -> bool:
        """Whether a branch is of this memory, which may have been taken anew since."""
        return part.memory is self._storage.base[0][-1]

    def enter(self, part: "PartOfBranch") -> None:
        """Go on with a branch."""
        self._waiting, self._fetches = part.waiting, part.handles
        for arrays, newest in zip(self._state, part.versions):
            arrays[:] = newest

    def begin(self, versions: Arrays | None, left: "PartOfBranch | None") -> None:
        """Begin a branch from ``versions``, behind the reads of one that was left; what waits to be
        written there, is written here."""
        self._waiting = {} if left is None else left.waiting
        self._fetches = _ext.Fetches()
        for arrays, newest in zip(self._state, versions or self._storage.base):
            arrays[:] = newest
        if left is not None:
            self._come_after_handles(left.handles)

    def come_after(self, versions: Arrays) -> None:
        """Order what is built next behind other versions of the same memory."""
        for arrays, others in zip(self._state, versions):
            arrays[:] = mx.depends(arrays, others)

    def bring(self, layer: int, part: "PartOfBranch", step) -> None:
        """Have the pages of a step as a branch has them in memory that was taken since, bit for bit
        where the dtype is the same."""
        page_ids = np.unique(step.slots[step.slots >= 0] // self.page_size)
        arrays, versions, places = self.state[layer], part.versions[layer], page_ids
        for i in range(0, len(arrays), 2):
            if self.open_pages is not None and i == len(arrays) - 2:  # those of open pages
                places = self.open_pages.slots_of(page_ids)
            rows = mx.array(places.astype(np.int32))
            pairs = zip(arrays[i : i + 2], versions[i : i + 2])
            pages, found = zip(
                *((_as_rows(x, self), _as_rows(y[rows].astype(x.dtype), self)) for x, y in pairs)
            )
            written = operations.write_pages(
                [x[:, :, 0] for x in found], list(pages), rows, alias=True, stream=self.stream
            )
            arrays[i : i + 2] = [
                x.view(y.dtype).reshape(y.shape) for x, y in zip(written, arrays[i : i + 2])
            ]

    def before_append(self, page_ids) -> None:
        """Quantise the pages that are full, unless another thread may read them as they are."""
        if not self._is_read():
            super().before_append(page_ids)

    def waits_to_seal(self) -> bool:
        """Whether an append seals nothing: a pass over other sequences may read pages as they are."""
        return self.open_pages is not None and (self.open_pages.is_awaiting or self._is_read())

    def seal_full(self, table) -> None:
        """Quantise the full pages of a sequence that no other holds, as an append to it does."""
        assert self.open_pages is not None
        pages, counts, held = table.map, self.allocator.counts, self.allocator.evictors.held
        due = self.open_pages.due(pages.ids[-1:] if pages.room else ())
        self._seal([x for x in due if x[1] in pages.ids and counts[x[1]] == 1 + (x[1] in held)])

    def seal(self, page_ids=None) -> list[int]:
        """As of a PagePool; and none, if none are named and another thread may read them."""
        return [] if page_ids is None and self._is_read() else super().seal(page_ids)

    def fetch(self, source: PagesOfLayer, keys=None, values=None) -> tuple[mx.array, mx.array]:
        """K and V of the whole context as handles; ``keys`` and ``values`` wait to be written.

        Args:
            source: The layer and the step.
            keys, values: The step's tokens ``[batch, num_kv_heads, tokens, head_dim]``. None:
                the pages hold them.
        """
        i, step = source.place.index, source.step
        if i in self._waiting:
            self.write_fetched(self._waiting[i])
        written = keys is None
        if self.formats.are_dense:
            tables = step.tables_after if written else step.tables_before
            pages = self._state[i]
        else:  # the handles gather what another gather, which has not run either, dequantises
            tables = step.tables_of_gathered(written)
            if not written:
                step.slots_in(self)  # from here on the pages have their places
            pages = list(self._dequantised(i, step, written))
        *handles, new_k, new_v = operations.fetch_pages(
            self._fetches, i, source, tables, *pages, keys, values, stream=self.stream
        )
        if keys is not None:
            source.keys, source.values = new_k, new_v
            self._waiting[i] = source
            if i == 0:
                self.remember(step.slots)
        return tuple(handles)

    def _dequantised(self, layer: int, step, written: bool) -> tuple[mx.array, mx.array]:
        """K and V of a step's contexts, contiguous, as pages of which each sequence has one."""
        tables, lens, length, ragged = step.contexts(written)
        if self.open_pages is not None:
            tables = self.open_pages.kernel_ids(tables)
        k, v, *_ = operations.gather_pages(
            self._state[layer], mx.array(tables), mx.array(lens), length,
            **{name: mx.array(a) for name, a in ragged.items()},
            stream=self.stream, known=self.known, **self.told,
        )  # fmt: skip
        return k, v

    def attend_fetched(self, source: PagesOfLayer, q: mx.array, plan, scale, sinks) -> mx.array:
        """Write what waits of ``source``, and attend.

        Args:
            q: ``[batch, num_q_heads, tokens, head_dim]``, the tokens of ``plan``.
            plan: An AttentionPlan of the group's newest step.
        """
        i = source.place.index
        arrays = self._state[i]
        if not self.formats.are_dense:
            if source.keys is not None:
                self.write_fetched(source)
            by_token = q.swapaxes(1, 2).reshape(-1, q.shape[1], q.shape[3])
            out, _, *arrays[:] = operations.paged_attention(
                by_token, arrays, plan.array, scale, None, None, sinks, None,
                stream=self.stream, known=self.known, plan=plan, **self.told,
            )  # fmt: skip
            return out.reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(1, 2)
        if source.keys is None:
            tokens: tuple = (None, None, None)
        else:
            tokens = (source.keys, source.values, source.step.slot_array)
        out, *arrays[:] = operations.write_attend(
            q, *arrays, plan.array, *tokens, scale, sinks,
            stream=self.stream, known=self.known, plan=plan,
        )  # fmt: skip
        if source.keys is not None:
            source.keys = source.values = None
            del self._waiting[i]
        return out

    def write_fetched(self, source: PagesOfLayer) -> tuple[mx.array, mx.array]:
        """Write what waits of ``source`` and is not attended to in the pages, and return it."""
        i, k, v = source.place.index, source.keys, source.values
        assert k is not None and v is not None
        arrays, tokens = self._state[i], [_by_token(k, self), _by_token(v, self)]
        if self.open_pages is None:
            arrays[:] = operations.write_pages(
                tokens, arrays, source.step.slot_array, alias=True, stream=self.stream,
                known=self.known, **self.told,
            )  # fmt: skip
        else:
            self.write_values(arrays, i, tokens[0], tokens[1], source.step.slots_in(self))
        source.keys = source.values = None
        del self._waiting[i]
        return k, v

    def write_waiting(self) -> None:
        """Write what waits."""
        for source in list(self._waiting.values()):
            self.write_fetched(source)

    def settle(self) -> None:
        """Write what waits, and come after every gather that has read or may still read."""
        if self._waiting:
            self.write_waiting()
        self._come_after_handles(self._fetches)

    def _come_after_handles(self, handles) -> None:
        """Come after every gather of these that has read or may still read."""
        if self.formats.are_dense:
            handles.settle(self._state)
        elif handles.read_pages():
            firsts = [arrays[:2] for arrays in self._state]
            handles.settle(firsts)
            for arrays, first in zip(self._state, firsts):
                if first[0] is not arrays[0]:
                    arrays[:] = [*first, *mx.depends(arrays[2:], first[:1])]
        else:
            handles.clear()

    def take_over(self, pool: PagePool) -> None:
        """Hold what another pool of the same pages holds, in this one's dtype."""
        for layer, arrays in enumerate(pool.state):
            held = [x if x.dtype == mx.uint32 else x.astype(self.dtype) for x in arrays]
            mx.eval(held)
            self._storage.base[layer][:] = held
            self._state[layer][:] = held
        self._storage.num_open = pool._storage.num_open
        self.open_pages = pool.open_pages


@dataclass(eq=False, slots=True)
class PartOfBranch:
    """What one pool has of what a thread has built.

    Attributes:
        versions: The newest.
        waiting: Layers whose tokens are not written.
        handles: Those that models have got since the last settling.
        memory: An array that is there as long as the memory is the same.
    """

    versions: Arrays
    waiting: dict
    handles: Any
    memory: mx.array


def _as_rows(array: mx.array, pool: PagePool) -> mx.array:
    """An array of pages, of whatever it holds, as one dense token of one head for each page."""
    return array.view(pool.dtype).reshape(len(array), 1, 1, -1)


def _by_token(x: mx.array, pool: PagePool) -> mx.array:
    """``[batch, heads, tokens, dim]`` as ``[batch * tokens, heads, dim]``, the pool's dtype."""
    batch, heads, tokens, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * tokens, heads, dim).astype(pool.dtype)
