"""A line of progress on stderr: rewritten on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time

QUIET_SECONDS = 10.0  # between two lines where stderr is no terminal


class Progress:
    """Shows what is under way; a context manager, which takes its line away again."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, line: str) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > QUIET_SECONDS:
            self._last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
