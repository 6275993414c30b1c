"""The forward passes of a model, one after the other, whichever threads they run in.

All passes of a model are links of one chain of versions. MLX computes what is pending only in
the thread that built it, and an array may be asked for by one thread at a time until it is
computed. So threads take turns: the one whose turn it is computes all that it has built before
it hands over. A pass that one group of layers cannot begin is taken back in those that have.
"""

import contextlib
import threading
import time
import weakref
from collections import deque

import mlx.core as mx
import numpy as np

from paged_mlx.errors import fail

PATIENCE = 10.0  # seconds for a thread to have computed what it has built
LOOK = 0.001  # seconds between two looks
REST = 0.05  # seconds without a pass, all of its work done, after which a thread is at rest
UNWRITTEN = 1.0  # seconds after which a pass that has written nothing is taken for given up


class Passes:
    """Which groups of layers have begun the newest pass, and which thread may begin one.

    Attributes:
        model: A weak reference to the model, called for it.
        lock: Held while pages change hands.
    """

    def __init__(self, groups: list, model=None):
        self.model = weakref.ref(model) if model is not None else lambda: None
        self.lock = threading.RLock()
        self._turns = threading.Condition(self.lock)
        self._groups = groups
        self._owner: threading.Thread | None = None
        self._in_turn = False
        self._stream = None  # of the owner's newest pass
        self._queue: deque = deque()  # threads that wait for their turn
        self._steps = {}  # id of a group -> its step of the newest pass, if it has begun it
        self._newest = (None, 0.0)  # the newest step, and the second it began

    # Turns

    @contextlib.contextmanager
    def turn(self):
        """Hold the lock in this thread's turn, in which it may build on the pages.

        Raises:
            ValueError: Another thread has built a pass and does not compute it.
        """
        with self.lock:
            if self._owner is not threading.current_thread() or self._queue:
                self._take_turn(threading.current_thread())
            before, self._in_turn = self._in_turn, True
            try:
                yield
            finally:
                self._in_turn = before

    def end(self) -> None:
        """This thread has come to an end for now: the next one need not wait for it."""
        with self.lock:
            # A generator that is given up may end in the middle of anything.
            if self._owner is threading.current_thread() and not self._in_turn:
                self._hand_over()

    def _take_turn(self, thread) -> None:
        if self._owner is thread and not self._hand_over():
            return  # in the middle of a pass
        self._queue.append(thread)
        try:
            self._wait(thread)
        finally:
            self._queue.remove(thread)
        self._owner = thread

    def _hand_over(self) -> bool:
        """Compute what this thread has built and give its turn up; False in the middle of a pass."""
        if self._is_building():
            return False
        for pool in self._pools():
            pool.settle()
        mx.eval(self._built())
        self._owner = None
        self._turns.notify_all()
        return True

    def _wait(self, thread) -> None:
        began = None
        while self._queue[0] is not thread or self._owner is not None:
            if self._queue[0] is thread and self._owner is not None:
                began = began or time.monotonic()
                if self._owner_has_left():
                    return
                self._check_patience(thread, began)
            else:
                began = None
            self._turns.wait(LOOK)

    def _owner_has_left(self) -> bool:
        """Whether the owner has ended, or rests with all its work done, and hands nothing over.

        Nothing is asked of its arrays but whether they are scheduled: it may be waiting for them.
        """
        owner, step = self._owner, self._newest[0]
        if self._is_building():
            return False
        if owner.is_alive():
            self.lock.release()
            try:
                mx.synchronize(self._stream)
                time.sleep(REST)
            except RuntimeError:  # a stream that no other thread may wait for
                return False
            finally:
                self.lock.acquire()
            if self._owner is not owner or self._newest[0] is not step or self._is_building():
                return self._owner is None
            if any(pool.has_handles for pool in self._pools()):
                return False
        mx.eval(self._built())
        for pool in self._pools():
            pool.forget_handles()
        return True

    def _check_patience(self, thread, began: float) -> None:
        owner = self._owner
        if time.monotonic() > began + PATIENCE or not owner.is_alive():
            must = (
                f"the passes of thread {owner.name!r} must be evaluated there before another "
                f"thread begins one, because MLX computes them nowhere else"
            )
            fail("update_and_fetch", must, f"a pass of thread {thread.name!r}")

    def _is_building(self) -> bool:
        """Whether the owner is in a pass: what it has built, nobody has asked for yet."""
        step, began = self._newest
        if step is not None and not step.served and time.monotonic() < began + UNWRITTEN:
            return True
        return any(group.is_pending for group in self._groups)

    def _built(self) -> list[mx.array]:
        return [array for group in self._groups for array in group.built]

    def _pools(self) -> list:
        return [pool for group in self._groups for pool in group.pools]

    # Passes

    def begun(self, group, step) -> None:
        """Note that a group has begun a pass; its first write comes next.

        Raises:
            ValueError: Other groups hold another number of tokens; nothing has changed.
        """
        if id(group) in self._steps:
            self._steps.clear()  # the pass before had reached every group
        others = list(self._steps.values())
        self._steps[id(group)] = step
        self._newest = (step, time.monotonic())
        self._stream = mx.default_stream(mx.default_device())
        for other in others:
            if not np.array_equal(other.ends, step.ends):
                found = f"{other.ends.tolist()} and {step.ends.tolist()}"
                self._take_back_all()
                must = (
                    "all layers must hold equally many tokens of a sequence, because a pass that "
                    "was interrupted reached only some: begin it anew"
                )
                fail("update_and_fetch", must, found)

    def take_back(self, group) -> None:
        """Undo, in the other groups, the pass that ``group`` could not begin."""
        if id(group) not in self._steps:
            self._take_back_all()

    def _take_back_all(self) -> None:
        for group in self._groups:
            if id(group) in self._steps:
                group.undo_newest()
        self._steps.clear()
        self._newest = (None, 0.0)
