"""One sequence's pages, as all layers of a model share them."""

import itertools
import weakref
from array import array
from collections import deque

import numpy as np

from paged_mlx._native import _ext
from paged_mlx.pages.table import PageTable

MOST_SAMPLED = 64  # sampled tokens that are looked at one by one as they grow more

_names = itertools.count()


class History:
    """The tokens of a sequence from its first on, as far as they are known.

    Tokens that a step samples are known as an array before they are computed; nobody waits
    for them here.

    Attributes:
        keys: What else its K and V depend on: the ExtraKeys of a tenant, an adapter, a salt.
        generation: Of the prefixes when it began; what began before all was forgotten is not
            remembered.
        remembered: How many tokens the prefixes know.
        states: (tokens, the recurrent states after them) at the last page that ended, or None.
    """

    def __init__(self):
        self.keys = ()
        self.generation = 0
        self.remembered = 0
        self.states = None
        self._known = array("i")
        self._sampled: deque = (
            deque()
        )  # (tokens [batch, width], row, column), one for each further token

    def __len__(self) -> int:
        return len(self._known) + len(self._sampled)

    def copy(self) -> "History":
        other = History()
        other.keys, other.generation, other.remembered = self.keys, self.generation, self.remembered
        other.states = self.states
        other._known, other._sampled = self._known[:], deque(self._sampled)
        return other

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        while self._sampled and len(self) > length:
            self._sampled.pop()
        del self._known[length:]
        self.remembered = min(self.remembered, length)
        if self.states is not None and self.states[0] > length:
            self.states = None

    def add(self, position: int, tokens: list[int]) -> None:
        """Note the tokens at ``position``; a gap before them makes them useless."""
        self.truncate(position)
        if position == len(self):
            self._settle(wait=True)
            self._known.extend(tokens)

    def add_sampled(self, position: int, tokens, row: int, column: int = 0) -> None:
        """Note that the token at ``position`` is one of ``tokens``, not computed perhaps."""
        self.truncate(position)
        if position == len(self):
            self._sampled.append((tokens, row, column))
            if len(self._sampled) > MOST_SAMPLED:
                self._settle()

    def first(self, length: int) -> list[int] | None:
        """The first ``length`` tokens; None if they are not all known."""
        if len(self._known) < length:
            self._settle()
        return self._known[:length].tolist() if len(self._known) >= length else None

    def computed(self) -> list[int]:
        """The tokens that are known and computed."""
        self._settle()
        return self._known.tolist()

    def _settle(self, wait: bool = False) -> None:
        while self._sampled and (wait or not _ext.is_pending(self._sampled[0][0])):
            tokens, row, column = self._sampled.popleft()
            self._known.append(int(np.array(tokens)[row, column]))


class Sequence:
    """The page tables of one sequence, one for each group of layers.

    Every layer's cache holds a reference, and the pages go back to the pools when the last of
    them is gone. That happens at the next pass, never in the middle of a page operation,
    whenever the garbage collector runs.

    Attributes:
        name: An int that no other sequence has.
        groups: The groups of layers by window.
        tables: Its page table in each group.
        first_token: Position of the first token that each table holds, unless it begins later.
        last_step: The last step that it took part in, in each group.
        history: Its tokens, as far as they are known.
        broken: Why its tokens are not all there, after a pass that failed; else None.
    """

    def __init__(self, groups: dict, tables: dict | None = None, history: History | None = None):
        self.name = next(_names)
        self.groups = groups
        self.tables = tables or {w: PageTable(group.page_size) for w, group in groups.items()}
        self.first_token = dict.fromkeys(groups, 0)
        self.last_step: dict = {}
        self.history = History() if history is None else history
        self.broken = None
        self._forks: list[tuple] = []  # (weak reference, content when forked, caches that have it)
        self._siblings: list[Sequence] = []
        passes = next(iter(groups.values())).passes
        self._passes = passes
        passes.sequences.add(self)
        gone = (self.tables, self.history, self.last_step)
        weakref.finalize(self, passes.retire, gone).atexit = False

    def fork(self) -> "Sequence":
        """Another sequence of the same tokens on the same pages; no bytes move."""
        with self._passes.turn:
            tables = {window: table.fork() for window, table in self.tables.items()}
            fork = Sequence(self.groups, tables, self.history.copy())
        fork.first_token, fork.broken = dict(self.first_token), self.broken
        return fork

    def rename(self) -> None:
        """Be another sequence to steps: the tables are others now."""
        self.name = next(_names)
        self.last_step.clear()

    def truncate(self, window: int | None, length: int) -> None:
        """Forget the tokens from ``length`` on in one group."""
        self.tables[window].truncate(length)
        self.history.truncate(length)

    def first_held(self, window: int | None) -> int:
        """Position of the first token whose K and V a group still has."""
        table = self.tables[window]
        return max(self.first_token[window], table.map.first_held if table.num_freed else 0)

    def fork_for(self, cache) -> "Sequence":
        """A fork that all layers share.

        mlx-lm copies, merges and extracts a prompt cache layer by layer: the first layer
        that asks makes the fork, the others get the same one.
        """
        with self._passes.turn:
            return self._fork_for((cache.group.window, cache.layer))

    def _fork_for(self, place: tuple) -> "Sequence":
        content = [(table.map.version, table.num_tokens) for table in self.tables.values()]
        alive = []
        found = None
        for entry in self._forks:
            reference, forked, places = entry
            fork = reference()
            if fork is None or forked != content:
                continue
            alive.append(entry)
            if found is None and place not in places:
                places.add(place)
                found = fork
        self._forks = alive
        if found is None:
            found = self.fork()
            self._forks.append((weakref.ref(found), content, {place}))
        return found

    def family(self, batch: int) -> list["Sequence"]:
        """This sequence and ``batch - 1`` empty ones, the same for every layer that asks."""
        while len(self._siblings) < batch - 1:
            self._siblings.append(Sequence(self.groups))
        return [self, *self._siblings[: batch - 1]]
