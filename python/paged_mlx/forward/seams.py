"""Attributes of other libraries that are replaced by name while a model is enabled.

Others may replace the same attributes, before or after, and take theirs away in any order:
ours calls what was there before, and when it is no longer wanted, and cannot be taken out
because somebody has wrapped it, it passes everything on.
"""

import functools
from typing import Any

SEAMS: list["Seam"] = []  # all there are, for the table in docs/mlx_lm.md


class Seam:
    """One attribute of another library.

    Args:
        owner: A module or a class.
        name: The attribute.
        make: Makes ours from what was there before.
        when: While what it is replaced.
        does: What ours does.

    Attributes:
        ours: The one that is wanted now: another may still be called, where somebody has wrapped it.
            None: nobody wants any.
    """

    def __init__(self, owner, name: str, make, when: str, does: str):
        self.owner, self.name, self.when, self.does = owner, name, when, does
        self._make = make
        self._users = 0
        self.ours: Any = None
        self._before: Any = None
        self._is_inherited = False
        SEAMS.append(self)

    @property
    def is_installed(self) -> bool:
        """Whether anybody wants it."""
        return self._users > 0

    @property
    def before(self):
        """The attribute without ours."""
        return self._before if self.is_installed else getattr(self.owner, self.name)

    def install(self) -> None:
        """Put ours in place, once however often it is asked for."""
        self._users += 1
        if self._users == 1:
            self._is_inherited = self.name not in vars(self.owner)
            self._before = before = getattr(self.owner, self.name)
            self.ours = functools.wraps(before)(self._make(before))
            setattr(self.owner, self.name, self.ours)

    def uninstall(self) -> None:
        """Undo one ``install``; the last takes ours away."""
        self._users -= 1
        if self._users:
            return
        ours, self.ours = self.ours, None
        if vars(self.owner).get(self.name) is ours:
            if self._is_inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._before)

    def __str__(self):
        if self.name == "__call__":
            return "`__call__` of the model's class"
        if isinstance(self.owner, type):
            return f"`{self.owner.__module__}.{self.owner.__qualname__}.{self.name}`"
        return f"`{self.owner.__name__}.{self.name}`"


def table() -> str:
    """The seams as a table of docs/mlx_lm.md."""
    rows = ["| `make_cache` of the model | a model is enabled | makes caches on pages |"]
    rows += sorted({f"| {seam} | {seam.when} | {seam.does} |" for seam in SEAMS})
    return "\n".join(["| replaced | while | ours |", "|---|---|---|", *rows])
