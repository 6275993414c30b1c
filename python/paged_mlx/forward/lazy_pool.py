"""A pool whose newest K and V wait for the attention that follows them."""

import mlx.core as mx

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
    """

    def __init__(self, *sizes, **options):
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

    @property
    def built(self) -> list[mx.array]:
        """The newest versions and the tokens that wait, with nothing settled."""
        waiting = ((source.keys, source.values) for source in list(self._waiting.values()))
        return [a for arrays in (*self._state, *waiting) for a in arrays if a is not None]

    def versions(self) -> Arrays:
        """The newest versions, to go back to."""
        return [list(arrays) for arrays in self._state]

    def go_back(self, versions: Arrays | None) -> None:
        """Forget all that was built since ``versions``; None: since the pool was made."""
        self._waiting.clear()
        self._fetches.clear()
        if versions is None:
            self.reset_versions()
        else:
            for arrays, before in zip(self._state, versions):
                arrays[:] = before

    @property
    def has_handles(self) -> bool:
        """Whether a handle can still be evaluated."""
        return self._fetches.are_alive()

    def forget_handles(self) -> None:
        """They have read what they read, and are never evaluated again."""
        self._fetches.clear()

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
        tables = step.tables_before if keys is not None else step.tables_after
        *handles, new_k, new_v = operations.fetch_pages(
            self._fetches, i, source, tables, *self._state[i], keys, values, stream=self.stream
        )
        if keys is not None:
            source.keys, source.values = new_k, new_v
            self._waiting[i] = source
            if i == 0:
                self.remember(step.slots)
        return tuple(handles)

    def attend_fetched(self, source: PagesOfLayer, q: mx.array, plan, scale, sinks) -> mx.array:
        """Write what waits of ``source``, and attend.

        Args:
            q: ``[batch, num_q_heads, tokens, head_dim]``, the tokens of ``plan``.
            plan: An AttentionPlan of the group's newest step.
        """
        i = source.place.index
        arrays = self._state[i]
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
        arrays = self._state[i]
        arrays[:] = operations.write_pages(
            [_by_token(k, self), _by_token(v, self)],
            arrays,
            source.step.slot_array,
            alias=True,
            stream=self.stream,
            known=self.known,
        )
        source.keys = source.values = None
        del self._waiting[i]
        return k, v

    def settle(self) -> None:
        """Write what waits, and come after every gather that has read or may still read."""
        if self._waiting:
            for source in list(self._waiting.values()):
                self.write_fetched(source)
        self._fetches.settle(self._state)


def _by_token(x: mx.array, pool: PagePool) -> mx.array:
    """``[batch, heads, tokens, dim]`` as ``[batch * tokens, heads, dim]``, the pool's dtype."""
    batch, heads, tokens, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * tokens, heads, dim).astype(pool.dtype)
