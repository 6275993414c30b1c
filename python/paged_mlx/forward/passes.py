"""The forward passes of a model, one after the other, whichever threads they run in.

All passes of a model are links of one chain of versions. MLX computes what is pending only in
the thread that built it, so a pass belongs to the thread that began it until what it has built
is being computed, and the next thread waits for that. Where there are several threads nobody need
ask: a pass that has reached every layer has its pages computed at once, whatever becomes of its
logits. A pass that stops before, because something raised, is over when its sequences are gone,
when its thread begins another or has ended, and at once if it was the pages that raised. A pass
that one group of layers cannot begin is taken back in those that have.
"""

import contextlib
import threading
import weakref
from collections import deque

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.errors import fail

LOOK = 0.001  # seconds between two looks for what MLX tells nobody: that an array is computed


class Pass:
    """One forward pass: what it has reached so far.

    Attributes:
        steps: Its step in each group that has begun it.
        num_served: Layers that have brought their K and V.
        is_complete: Whether all of it is being computed.
    """

    def __init__(self):
        self.steps: dict = {}
        self.num_served = 0
        self.is_complete = False


class Passes:
    """Which thread may build on the pages, and what the newest pass has reached.

    Attributes:
        groups: The groups of layers by window.
        model: A weak reference to the model, called for it.
        lock: Held while pages change hands.
        sequences: Those that are alive.
        retired: Page tables and histories of sequences that are gone.
        on_retired: Told of each before its pages go back.
        max_bytes: Of all pages; None: no limit.
        stores: Prompt stores that hold caches of the model.
        starved: Sequences that have found no pages, and not gone on since.
        aside: Sequences that have ended, whose caches were handed out or stored.
    """

    def __init__(self, groups: dict, model=None):
        self.groups = groups
        self.model = weakref.ref(model) if model is not None else lambda: None
        self.lock = threading.RLock()
        self.sequences: weakref.WeakSet = weakref.WeakSet()
        self.retired: deque = deque()
        self.on_retired = None
        self.max_bytes: int | None = None
        self.stores: weakref.WeakSet = weakref.WeakSet()
        self.starved: weakref.WeakSet = weakref.WeakSet()
        self.aside: weakref.WeakSet = weakref.WeakSet()
        self.is_shared = False  # other ranks compute the same passes, and must do so alike
        self.computes = True  # explain builds passes that are never computed
        self._turns = threading.Condition(self.lock)
        self._queue: deque = deque()  # threads that wait for their turn
        self._owner = None  # the thread that has built last
        self._newest: Pass | None = None
        self._base: dict = {}  # the newest versions before it
        self._given_up: list = []  # (thread, what was retired of a pass that it gave up)
        self.num_layers = 0  # that bring K and V in a pass, as far as is known

    # Turns

    @contextlib.contextmanager
    def turn(self):
        """Hold the lock in this thread's turn, in which it may build on the pages."""
        with self.lock:
            thread = threading.current_thread()
            if self._owner is not thread or self._queue:
                self._take_turn(thread)
            yield

    def end(self) -> None:
        """The newest pass, of this thread, has come to its end: have what it built computed."""
        with self.lock:
            if self._owner is threading.current_thread():
                self._compute()
                if self._newest is not None:
                    self._newest.is_complete = True
                self._turns.notify_all()

    def wait(self) -> None:
        """Wait until all that this thread has built is computed; what others have built is theirs."""
        with self.lock:
            if self._owner is threading.current_thread() and self.computes:
                self._compute()
                mx.eval(self._built())

    def _take_turn(self, thread) -> None:
        if self._owner is thread and not self._is_over(thread):
            return  # in the middle of a pass
        self._queue.append(thread)
        try:
            while self._queue[0] is not thread or not self._is_over(thread):
                self._turns.wait(LOOK)
        finally:
            self._queue.remove(thread)
            self._turns.notify_all()
        if self._owner is not thread:
            mx.eval(self._built())
            for pool in self._pools():
                pool.forget_handles()
            self._owner, self._newest = thread, None

    def _is_over(self, thread) -> bool:
        """Whether the newest pass is, so that ``thread`` may begin another."""
        newest, owner = self._newest, self._owner
        is_built = newest is None or newest.is_complete
        if owner is None or owner is thread and is_built:
            return True
        reached = is_built or all(step.served for step in newest.steps.values())
        if reached and not any(map(_ext.is_pending, self._built())):
            return owner is thread or not self._has_handles()
        if owner is thread:
            return False
        if not owner.is_alive() or newest is not None and self._sequences_are_gone(newest):
            self._give_up(owner)
            return True
        return False

    def _has_handles(self) -> bool:
        return any(pool.has_handles for pool in self._pools())

    def _sequences_are_gone(self, newest: Pass) -> bool:
        names = {name for step in newest.steps.values() for name in step.names}
        return not any(sequence.name in names for sequence in list(self.sequences))

    def _give_up(self, owner) -> None:
        """Go on from before a pass that nobody computes.

        Its thread may yet: so what it writes to stays its own until that thread goes on or ends.
        """
        for pool in self._pools():
            pool.go_back(self._base.get(id(pool)))
        while self.retired:
            self._given_up.append((owner, self.retired.popleft()))
        for group in self.groups.values():
            group.newest = None
        self._newest = None

    def _compute(self) -> None:
        """Have all that is built computed, in this thread, which has built it."""
        for pool in self._pools():
            pool.settle()
        if self.computes:
            mx.async_eval(self._built())

    def _built(self) -> list[mx.array]:
        return [array for pool in self._pools() for array in pool.built]

    def _pools(self) -> list:
        return [pool for group in self.groups.values() for pool in group.pools]

    # Passes

    def begins(self, window: int | None) -> None:
        """A group is about to begin: if that is a new pass, have what it builds on computed."""
        newest, thread = self._newest, threading.current_thread()
        if newest is not None and window not in newest.steps and not newest.is_complete:
            return
        for pool in self._pools():
            pool.settle()
        self._note_base()
        mine = [each for each in self._given_up if each[0] is thread or not each[0].is_alive()]
        for each in mine:
            self._given_up.remove(each)
            self.retired.append(each[1])
        self.reclaim()

    def _note_base(self) -> None:
        if any(map(_ext.is_pending, self._built())):
            self._compute()
        self._base = {id(pool): pool.versions() for pool in self._pools()}

    def begun(self, group, step) -> None:
        """Note that a group has begun a pass; its first write comes next.

        Raises:
            ValueError: Other groups hold another number of tokens; nothing has changed.
        """
        newest = self._newest
        if newest is None or newest.is_complete or group.window in newest.steps:
            newest = self._newest = Pass()
        step.of_pass = newest
        others = list(newest.steps.values())
        newest.steps[group.window] = step
        for other in others:
            if not np.array_equal(other.ends, step.ends):
                found = f"{other.ends.tolist()} and {step.ends.tolist()}"
                self._take_back_all()
                must = (
                    "all layers must hold equally many tokens of a sequence, because a pass that "
                    "was interrupted reached only some: begin it anew"
                )
                fail("update_and_fetch", must, found)

    def goes_on(self, step) -> None:
        """A pass that another thread has overtaken is the newest again."""
        self._newest = step.of_pass

    def served(self, step) -> None:
        """Count a layer of a pass that has brought its K and V."""
        of_pass = step.of_pass
        of_pass.num_served += 1
        if of_pass.num_served > self.num_layers:
            self.num_layers, of_pass.is_complete = of_pass.num_served, False

    def attended(self, step, queries: mx.array) -> None:
        """A layer has attended, or will from a gather: if it was the last, the pass is built."""
        if step.of_pass.num_served >= self.num_layers and (
            self.is_shared or threading.active_count() > 1
        ):
            if not _ext.is_tracer(queries):
                self.end()

    def grown(self) -> None:
        """Pools have other arrays now: no pass is taken back to before."""
        self._note_base()

    def take_back(self, group) -> None:
        """Undo, in the other groups, the pass that ``group`` could not begin."""
        if self._newest is not None and group.window not in self._newest.steps:
            self._take_back_all()

    def _take_back_all(self) -> None:
        newest = self._newest
        assert newest is not None
        for window in newest.steps:
            self.groups[window].undo_newest()
        if newest.num_served:
            self._compute()
        self._newest = None
        self._turns.notify_all()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pool.nbytes for pool in self._pools())

    def take_from(self, sequences, rows) -> bool:
        """Take the pages of ``sequences`` that are not ``rows``, as of a call that has failed and
        whose error is held; False if there are none."""
        found = [s for s in list(sequences) if s not in rows and s.broken is None]
        for sequence in found:
            for table in sequence.tables.values():
                table.release()
            sequence.broken = "OutOfPages, and others have taken its pages since"
        self.starved.difference_update(found)
        self.aside.difference_update(found)
        return bool(found)

    def reclaim(self) -> None:
        """Free the pages of sequences that are gone."""
        with self.lock:
            while self.retired:
                tables, history = self.retired.popleft()
                if self.on_retired is not None:
                    self.on_retired(tables, history)
                for table in tables.values():
                    table.release()
