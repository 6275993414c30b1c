"""A map of the pages in the terminal: once, or kept up to date while something runs."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paged_mlx.cli.options import Mistake
from paged_mlx.pages.pool_map import FREE, PoolMap

EVERY = 0.25  # seconds between two maps of a live one
LEGEND = "letters: a sequence's own pages; digits: shared by so many; c: cached; .: free"
MOST_ROWS = 12


def titled(groups: list[dict[str, Any]]) -> list[PoolMap | str]:
    """The maps of a model's groups, each behind its title."""
    found: list[PoolMap | str] = []
    for group in groups:
        window = "" if group["window"] is None else f", window {group['window']}"
        found += [f"{group['layers']} layers{window}", PoolMap(group)]
    return found


def plain(groups: list[dict[str, Any]], columns: int) -> str:
    """Maps as text without colours."""
    parts = [p if isinstance(p, str) else p.text(columns) for p in titled(groups)]
    return "\n".join([*parts, LEGEND])


def coloured(groups: list[dict[str, Any]], columns: int, rows: int = MOST_ROWS):
    """Maps for rich: a square for each page, in the colour of who holds it."""
    from rich.text import Text

    text = Text()
    for part in titled(groups):
        if isinstance(part, str):
            text.append(part + "\n", "bold")
            continue
        for number, row in enumerate(part.rows(columns)):
            if number == rows:
                text.append(f"... and {len(part.pages) - rows * columns} pages more\n")
                break
            for page in row:
                style = f"on {page.colour}" if page.holders else FREE
                text.append(page.sign, f"{'white ' if page.holders else ''}{style}")
            text.append("\n")
        text.append(part.summary() + "\n")
    return text.append(LEGEND, "dim")


def columns_of_terminal() -> int:
    """Pages in a row."""
    return max(16, min(64, shutil.get_terminal_size().columns - 2))


@contextmanager
def shown(models: list) -> Iterator[None]:
    """While inside, show the pages of the last of ``models`` under what is printed.

    Where stderr is no terminal the fullest map is printed at the end.
    """
    from paged_mlx.mlx_lm.serving.snapshot import snapshot

    def groups() -> list[dict[str, Any]]:
        found = snapshot(models[-1])["groups"] if models else []
        return found if num_used(found) else []  # the last map that shows something stays

    with live(groups) if sys.stderr.isatty() else fullest(groups):
        yield


@contextmanager
def repeated(draw: Callable[[], None]) -> Iterator[None]:
    """Call ``draw`` again and again in a thread, and once more at the end."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(EVERY):
            draw()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        draw()


@contextmanager
def fullest(groups: Callable[[], list[dict[str, Any]]]) -> Iterator[None]:
    """Print, at the end, the map of the moment when most pages were in use."""
    best: list[dict[str, Any]] = []

    def look() -> None:
        found = groups()
        if num_used(found) > num_used(best) or not best:
            best[:] = found

    try:
        with repeated(look):
            yield
    finally:
        print(plain(best, columns_of_terminal()), file=sys.stderr)


def num_used(groups: list[dict[str, Any]]) -> int:
    return sum(len(group["pages"]) for group in groups)


@contextmanager
def live(groups: Callable[[], list[dict[str, Any]]]) -> Iterator[None]:
    """Draw the map again and again in a thread, below what is printed meanwhile."""
    with screen() as draw:

        def again() -> None:
            if found := groups():
                draw(found)

        with repeated(again):
            yield


@contextmanager
def screen() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that draws groups in the place of those before, below what is printed meanwhile.

    Raises:
        Mistake: rich is not installed.
    """
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ImportError as error:
        raise Mistake("a live map needs rich: pip install rich") from error
    columns, console = columns_of_terminal(), Console(stderr=True)
    above = Above(console)
    # A stdout that goes elsewhere is left alone.
    taken = contextlib.redirect_stdout(above) if sys.stdout.isatty() else contextlib.nullcontext()
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as view, taken:
        yield lambda groups: view.update(
            Group(above.unfinished, coloured(groups, columns)), refresh=True
        )


class Above(io.TextIOBase):
    """What is printed above a live map: lines that are whole, while the last one is drawn with the map.

    Attributes:
        unfinished: The last line.
    """

    def __init__(self, console) -> None:
        from rich.text import Text

        self._console, self._text = console, Text
        self.unfinished = Text()

    def write(self, text: str) -> int:
        *lines, rest = (self.unfinished.plain + text).split("\n")
        width = self._console.width
        while len(rest) > width:
            cut = rest.rfind(" ", 0, width) + 1 or width
            lines.append(rest[:cut])
            rest = rest[cut:]
        self.unfinished = self._text(rest)
        for line in lines:
            self._console.print(self._text(line))
        return len(text)
