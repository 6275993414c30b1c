"""One sequence's pages, as the layers of a model share them."""

import itertools
import weakref

import numpy as np

from paged_mlx.pages.table import PageTable
from paged_mlx.pages.tokens import TOKEN_BYTES, pack_tokens

_names = itertools.count()


class SequencePages:
    """The page table of one sequence in one group of layers.

    Every layer's cache holds a reference, and the pages go back to the pool when the last
    of them is gone. The group frees them at its next step, never in the middle of a page
    operation, whenever the garbage collector runs.

    Attributes:
        name: An int that no other sequence has.
        last_step: The last step that it took part in.
        first_token: Position of the first token that its pages hold, unless they begin later.
        told: Its first tokens, packed, as far as they are known.
        stale: Whether it was begun before everything that is known was forgotten.
        broken: Why its tokens are not all there, after a pass that failed; else None.
    """

    def __init__(self, group, table: PageTable | None = None):
        self.name = next(_names)
        self.group = group
        self.table = PageTable(group.page_size) if table is None else table
        self.last_step = None
        self.first_token = 0
        self.told = b""
        self.stale = False
        self.broken = None
        self._forks = []  # (weak reference, content when forked, layers that have it)
        self._siblings: list[SequencePages] = []
        group.sequences.add(self)
        weakref.finalize(self, group.retired.append, self.table).atexit = False

    def fork(self) -> "SequencePages":
        """Another sequence of the same tokens on the same pages; no bytes move."""
        with self.group.passes.lock:
            fork = SequencePages(self.group, self.table.fork())
        fork.first_token, fork.broken = self.first_token, self.broken
        fork.told, fork.stale = self.told, self.stale
        return fork

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self.table.truncate(length)
        if len(self.told) > length * TOKEN_BYTES:
            self.told = self.told[: length * TOKEN_BYTES]

    def all_told(self, length: int) -> list[int] | None:
        """The first ``length`` tokens; None if they are not all known."""
        told = self.told[: length * TOKEN_BYTES]
        return np.frombuffer(told, "<i4").tolist() if len(told) == length * TOKEN_BYTES else None

    def tell(self, tokens: list[int]) -> None:
        """Note that the sequence begins with these tokens."""
        self.told = pack_tokens(tokens)

    def fork_for(self, layer: int) -> "SequencePages":
        """A fork that all layers share.

        mlx-lm copies, merges and extracts a prompt cache layer by layer: the first layer
        that asks makes the fork, the others get the same one.
        """
        with self.group.passes.lock:
            return self._fork_for(layer)

    def _fork_for(self, layer: int) -> "SequencePages":
        content = (self.table.map.version, self.table.num_tokens)
        alive = []
        found = None
        for entry in self._forks:
            reference, forked, layers = entry
            fork = reference()
            if fork is None or forked != content:
                continue
            alive.append(entry)
            if found is None and layer not in layers:
                layers.add(layer)
                found = fork
        self._forks = alive
        if found is None:
            found = self.fork()
            self._forks.append((weakref.ref(found), content, {layer}))
        return found

    def family(self, batch: int) -> list["SequencePages"]:
        """This sequence and ``batch - 1`` empty ones, the same for every layer that asks."""
        while len(self._siblings) < batch - 1:
            self._siblings.append(SequencePages(self.group))
        return [self, *self._siblings[: batch - 1]]
