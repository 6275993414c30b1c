"""The forward passes of a model, one after the other, whichever threads they run in.

All passes of a model are links of one chain of versions, and MLX computes what is pending only
in the thread that built it. So a thread begins a pass when all that another has built is
computed, and threads take turns. A pass that one group of layers cannot begin is taken back in
those that have.
"""

import threading
import time
from collections import deque

import numpy as np

from paged_mlx.errors import fail

PATIENCE = 10.0  # seconds for a thread to have computed what it has built
LOOK = 0.0005  # seconds between two looks
UNWRITTEN = 1.0  # seconds after which a pass that has written nothing is taken for given up


class Passes:
    """Which groups of layers have begun the newest pass, and which thread may begin one.

    Attributes:
        lock: Held while pages change hands.
    """

    def __init__(self, groups: list):
        self.lock = threading.RLock()
        self._groups = groups
        self._owner: threading.Thread | None = None
        self._queue: deque = deque()  # threads that wait for their turn
        self._steps = {}  # id of a group -> its step of the newest pass, if it has begun it
        self._newest = (None, 0.0)  # the newest step, and the second it began

    def enter(self) -> None:
        """Take the lock, once this thread may begin a pass or go on in its own.

        Raises:
            ValueError: Another thread has built a pass and does not compute it.
        """
        self.lock.acquire()
        thread = threading.current_thread()
        goes_on = self._owner is thread and (not self._queue or self._is_building())
        if not goes_on:
            self._queue.append(thread)
            try:
                self._wait_for_turn(thread)
            except BaseException:
                self.lock.release()
                raise
            finally:
                self._queue.remove(thread)

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
        for other in others:
            if not np.array_equal(other.ends, step.ends):
                found = f"{other.ends.tolist()} and {step.ends.tolist()}"
                self._take_back_all()
                must = (
                    "all layers must hold equally many tokens of a sequence, because a pass that "
                    "was interrupted reached only some: begin it anew"
                )
                fail("update_and_fetch", must, found)

    def leave(self) -> None:
        """Give the lock back."""
        self.lock.release()

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

    def _wait_for_turn(self, thread) -> None:
        until = None
        while self._queue[0] is not thread or not self._is_over():
            if self._queue[0] is thread and self._is_building():
                until = until or time.monotonic() + PATIENCE
                if not self._owner.is_alive() or time.monotonic() > until:
                    must = (
                        f"the passes of thread {self._owner.name!r} must be evaluated there "
                        f"before another thread begins one, because MLX computes them nowhere else"
                    )
                    fail("update_and_fetch", must, f"one pending, in thread {thread.name!r}")
            else:
                until = None
            self.lock.release()
            time.sleep(LOOK)
            self.lock.acquire()
        self._owner = thread

    def _is_building(self) -> bool:
        """Whether the owner is in a pass: what it has built, nobody has asked for yet."""
        step, began = self._newest
        if step is not None and not step.served and time.monotonic() < began + UNWRITTEN:
            return True
        return any(group.is_pending for group in self._groups)

    def _is_over(self) -> bool:
        """Whether the last pass has been built and computed."""
        return not self._is_building() and all(group.is_computed for group in self._groups)
