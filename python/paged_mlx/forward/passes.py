"""The forward passes of a model, whichever threads they run in; nobody waits for another.

MLX computes what is pending only in the thread that built it. So each thread builds a branch of
the pool's versions, from those that were being computed when its pass began, and the passes of two
threads write to different pages of the same memory. A pass that has reached every layer has its
branch computed, whatever becomes of its logits, behind the branches that were complete before;
that is what the next pass builds on. One that something raised in is never joined to the others,
and keeps nobody out. A pass that one group of layers cannot begin is taken back in those that have.
"""

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.errors import fail


class Pass:
    """One forward pass: what it has reached so far.

    Attributes:
        thread: The thread that began it.
        steps: Its step in each group that has begun it.
        num_served: Layers that have brought their K and V.
        is_complete: Whether all of it is being computed.
    """

    def __init__(self):
        self.thread = threading.current_thread()
        self.steps: dict = {}
        self.num_served = 0
        self.is_complete = False


@dataclass(eq=False, slots=True)
class Branch:
    """What a thread has built that is not joined to what others have built.

    Attributes:
        newest: Its newest pass.
        base: What it has begun from: versions by pool.
        parts: By pool, what that has of the branch; empty for the thread that builds now.
    """

    newest: Pass | None = None
    base: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)


class Passes:
    """The newest pass, and the versions that the next one builds on.

    Attributes:
        groups: The groups of layers by window.
        model: A weak reference to the model, called for it.
        lock: Held while pages change hands, and while a layer builds on them.
        turn: Holds the lock, with the thread's branch in the pools; a context manager.
        sequences: Those that are alive.
        retired: Page tables, histories and last steps of sequences that are gone.
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
        self.computes = True  # explain builds passes that are never computed
        self.num_layers = 0  # that bring K and V in a pass, as far as is known
        self.turn = Turn(self)
        self._thread: threading.Thread | None = None  # that builds now
        self._branch = Branch()  # its own
        self._branches: dict = {}  # of the other threads that have built
        self._computed: dict = {}  # versions by pool that a pass can begin from

    # Threads

    def _change_thread(self) -> None:
        pools = self._pools()
        if self._thread is not None:
            self._branch.parts = {pool: pool.leave() for pool in pools}
            self._branches[self._thread] = self._branch
        self._thread = threading.current_thread()
        branch = self._branch = self._branches.pop(self._thread, None) or Branch()
        for thread in [thread for thread in self._branches if not thread.is_alive()]:
            del self._branches[thread]
        newest, parts, branch.parts = branch.newest, branch.parts, {}
        goes_on = newest is not None and not newest.is_complete
        steps = {} if newest is None else newest.steps
        is_moved = any(not pool.holds(part) for pool, part in parts.items())
        for pool in pools:
            if goes_on and not is_moved and pool in parts:
                pool.enter(parts[pool])
            else:
                pool.begin(self._computed.get(pool), parts.get(pool))
        if not goes_on or is_moved:
            branch.base = self._computed
        for window, group in self.groups.items():
            group.newest = steps.get(window)
            if goes_on and is_moved and window in steps:
                group.bring(steps[window], parts)

    def goes_on(self, step) -> None:
        """A pass of this thread that another of its passes has overtaken is the newest again."""
        self._branch.newest = step.of_pass

    def end(self) -> None:
        """The newest pass has come to its end: have what it built computed."""
        newest = self._branch.newest
        if newest is not None:
            newest.is_complete = True
        self.keep()

    def keep(self) -> None:
        """Have what this thread has built computed; whoever is next begins from there."""
        self.join()
        pools = self._pools()
        for pool in pools:
            pool.write_waiting()
        if self.computes:
            mx.async_eval([pool.versions() for pool in pools])
        self._computed = self._branch.base = {pool: pool.versions() for pool in pools}

    def join(self) -> None:
        """Come after what other threads have completed since this one's branch began."""
        if self._branch.base is not self._computed:
            for pool, versions in self._computed.items():
                pool.come_after(versions)
            self._branch.base = self._computed

    def let_go(self) -> None:
        """Hold no versions but the pools' newest, until ``keep``: memory that is copied is free then."""
        self.join()
        self._computed = self._branch.base = {}

    def wait(self) -> None:
        """Wait until what has been built is computed, but for what other threads are in the
        middle of."""
        with self.turn:
            if self.computes:
                self._settle()
                mx.eval([pool.versions() for pool in self._pools()])

    def _settle(self) -> None:
        """Come after all reads and writes that have been built, and have them computed."""
        for pool in self._pools():
            pool.settle()
        if any(
            _ext.is_pending(x) for pool in self._pools() for pair in pool.versions() for x in pair
        ):
            self.keep()

    def replace(self, pool, fresh) -> None:
        """Have ``fresh`` stand for ``pool`` in what other threads have built."""
        for branch in self._branches.values():
            if pool in branch.parts:
                branch.parts[fresh] = branch.parts.pop(pool)

    def _pools(self) -> list:
        return [pool for group in self.groups.values() for pool in group.pools]

    # Passes

    def begins(self, window: int | None) -> None:
        """A group is about to begin: if that is a new pass, have what it builds on computed."""
        newest = self._branch.newest
        self.join()
        if newest is None or window in newest.steps or newest.is_complete:
            self._settle()
            self.reclaim()

    def begun(self, group, step) -> None:
        """Note that a group has begun a pass; its first write comes next.

        Raises:
            ValueError: Other groups hold another number of tokens; nothing has changed.
        """
        newest = self._branch.newest
        if newest is None or newest.is_complete or group.window in newest.steps:
            newest = self._branch.newest = Pass()
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

    def served(self, step) -> None:
        """Count a layer of a pass that has brought its K and V."""
        of_pass = step.of_pass
        of_pass.num_served += 1
        if of_pass.num_served > self.num_layers:
            self.num_layers, of_pass.is_complete = of_pass.num_served, False

    def attended(self, step, queries: mx.array) -> None:
        """A layer has attended, or will from a gather: if it was the last, the pass is built."""
        if step.of_pass.num_served >= self.num_layers and not _ext.is_tracer(queries):
            self.end()

    def take_back(self, group) -> None:
        """Undo, in the other groups, the pass that ``group`` could not begin."""
        if self._branch.newest is not None and group.window not in self._branch.newest.steps:
            self._take_back_all()

    def _take_back_all(self) -> None:
        newest = self._branch.newest
        assert newest is not None
        for window in newest.steps:
            self.groups[window].undo_newest()
        if newest.num_served:
            self.keep()
        self._branch.newest = None

    # Pages

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

    def retire(self, gone: tuple) -> None:
        """Note that a sequence is gone, wherever the garbage collector has found it. If it was the
        last, and no thread is at work on the pages, memory goes back."""
        self.retired.append(gone)
        if next(iter(self.sequences), None) is None and self.lock.acquire(blocking=False):
            try:
                if not self.turn.depth:
                    self.give_back()
            finally:
                self.lock.release()

    def give_back(self) -> None:
        """Give back pages that were not needed lately; nobody uses any."""
        with self.turn:
            self.join()
            self.reclaim()
            for group in self.groups.values():
                group.give_back()
            self.keep()

    def reclaim(self) -> None:
        """Free the pages of sequences that are gone."""
        with self.turn:
            for _ in range(len(self.retired)):
                gone = tables, history, last_steps = self.retired.popleft()
                if any(map(self.is_anothers, last_steps.values())):
                    self.retired.append(gone)
                    continue
                if self.on_retired is not None:
                    self.on_retired(tables, history)
                for table in tables.values():
                    table.release()

    def others_may_read(self) -> bool:
        """Whether another thread may yet compute what reads pages at the places they have now."""
        with self.lock:
            branches = [b for thread, b in self._branches.items() if thread.is_alive()]
        for branch in branches:
            is_complete = branch.newest is None or branch.newest.is_complete
            if not is_complete or _may_read(branch):
                return True
        return False

    def is_anothers(self, step) -> bool:
        """Whether another thread may yet compute what reads or writes a step's pages."""
        branch = self._branches.get(step.of_pass.thread)
        if branch is None or not step.of_pass.thread.is_alive():
            return False
        return not step.of_pass.is_complete or _may_read(branch)


def _may_read(branch: Branch) -> bool:
    """Whether handles that models have got in a branch have read pages, or may still."""
    return any(part.handles.read_pages() for part in branch.parts.values())


class Turn:
    """A thread's turn to build on the pages: the lock is held, its branch is in the pools.

    Attributes:
        depth: How many times it is held, one in the other.
    """

    def __init__(self, passes: Passes):
        self._passes = weakref.ref(passes)
        self._lock = passes.lock
        self.depth = 0

    def __enter__(self):
        self._lock.acquire()
        self.depth += 1
        passes = self._passes()
        if passes._thread is not threading.current_thread():
            passes._change_thread()

    def __exit__(self, *error):
        self.depth -= 1
        self._lock.release()
