"""The outcome of asking a backend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """``ratio``: worst error over its bound. ``skipped``: the backend does not offer it."""

    right: bool
    ratio: float = 0.0
    reason: str = ""
    skipped: bool = False
