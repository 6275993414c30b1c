"""A map of a pool's pages: as text, as HTML for a notebook, as PNG or SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from paged_mlx.errors import fail
from paged_mlx.machine.cache import write_whole

COLUMNS = 32
FREE, CACHED, SHARED = "#e9ecef", "#adb5bd", "#343a40"
#: Of sequences, which take them in turn; told apart by people who do not see red or green.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Page(NamedTuple):
    """What one page is.

    Attributes:
        page_id: Its id.
        holders: How many hold it, sequences and caches; 0: it is free.
        sequences: Indices of the sequences that do.
        is_cached: Whether a prefix cache does.
        is_open: Whether it is dense still, in a pool that quantises whole pages.
    """

    page_id: int
    holders: int
    sequences: tuple[int, ...] = ()
    is_cached: bool = False
    is_open: bool = False

    @property
    def colour(self) -> str:
        """Of the sequence that holds it alone; one for all that are shared, cached or free."""
        if not self.holders:
            return FREE
        if len(self.sequences) > 1 or self.holders - self.is_cached > 1:
            return SHARED
        if self.is_cached and not self.sequences:
            return CACHED
        return COLOURS[self.sequences[0] % len(COLOURS)] if self.sequences else COLOURS[0]

    @property
    def sign(self) -> str:
        """A character: who holds it, by how many it is shared, ``c`` cached, ``.`` free."""
        if not self.holders:
            return "."
        if self.colour == SHARED:
            return str(min(9, max(len(self.sequences), self.holders - self.is_cached)))
        if self.colour == CACHED:
            return "c"
        letter = LETTERS[self.sequences[0] % len(LETTERS)] if self.sequences else "#"
        return letter.lower() if self.is_open else letter


class PoolMap:
    """What every page of a pool holds, at one moment.

    Args:
        figures: As ``page_figures`` gives them, and ``/pages`` of the server for each group.

    Attributes:
        pages: A ``Page`` for each page id.
        names: Of the sequences.
    """

    def __init__(self, figures: dict[str, Any]):
        self.page_size, self.format = figures["page_size"], figures.get("format")
        self.names = [sequence["name"] for sequence in figures["sequences"]]
        self.tokens = [sequence["tokens"] for sequence in figures["sequences"]]
        holding: dict[int, list[int]] = {}
        for index, sequence in enumerate(figures["sequences"]):
            for page_id in sequence["pages"]:
                if page_id is not None:
                    holding.setdefault(page_id, []).append(index)
        open_pages = set(figures.get("open", ()))
        held = {int(page_id): entry for page_id, entry in figures["pages"].items()}
        self.pages = [
            Page(page_id, 0)
            if page_id not in held
            else Page(
                page_id,
                held[page_id][0],
                tuple(holding.get(page_id, ())),
                bool(held[page_id][1]),
                page_id in open_pages,
            )
            for page_id in range(figures["total"])
        ]

    def __repr__(self) -> str:
        return f"PoolMap({self.summary()})"

    def summary(self) -> str:
        """One line: how many pages there are of each kind."""
        used = [page for page in self.pages if page.holders]
        shared = sum(page.colour == SHARED for page in used)
        cached = sum(page.colour == CACHED for page in used)
        form = f", {self.format}" if self.format else ""
        dense = sum(page.is_open for page in used)
        form += f", {dense} open" if dense else ""
        return (
            f"{len(self.pages)} pages of {self.page_size} tokens{form}: {len(used)} in use "
            f"({shared} shared, {cached} cached alone), {len(self.pages) - len(used)} free"
        )

    def rows(self, columns: int = COLUMNS) -> Iterator[Sequence[Page]]:
        """The pages, by id, in rows."""
        for first in range(0, len(self.pages), columns):
            yield self.pages[first : first + columns]

    def text(self, columns: int = COLUMNS) -> str:
        """Rows of signs, one for each page, and the summary; see ``Page.sign``."""
        rows = ["".join(page.sign for page in row) for row in self.rows(columns)]
        return "\n".join([*rows, self.summary()])

    def tells(self, page: Page) -> str:
        """What a page holds, in a sentence."""
        if not page.holders:
            return f"page {page.page_id}: free"
        who = [str(self.names[index]) for index in page.sequences]
        if page.is_cached:
            who.append("the prefix cache")
        missing = page.holders - len(who)
        if missing > 0:
            who.append(f"{missing} more")
        state = ", open" if page.is_open else f", {self.format}" if self.format else ""
        return f"page {page.page_id}: held by {', '.join(who)}{state}"

    def _repr_html_(self) -> str:
        cell = "display:inline-block;vertical-align:top;width:16px;height:16px;margin:1px;font:10px sans-serif;text-align:center;line-height:16px"
        lines = []
        for row in self.rows():
            cells = []
            for page in row:
                sign = page.sign if page.colour == SHARED else "c" if page.colour == CACHED else ""
                look = f"background:{page.colour};color:{'white' if sign != 'c' else 'black'}"
                if page.is_open:
                    look += ";outline:2px dotted black;outline-offset:-2px"
                title = escape(self.tells(page), quote=True)
                cells.append(f'<span style="{cell};{look}" title="{title}">{sign}</span>')
            lines.append("<div>" + "".join(cells) + "</div>")
        return (
            f'<div class="paged-mlx-map">{"".join(lines)}<div>{escape(self.summary())}</div></div>'
        )

    def figure(self, columns: int = COLUMNS):
        """A figure of matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch, Rectangle
        except ImportError as error:
            raise ImportError(
                "a picture of a pool needs matplotlib: pip install matplotlib"
            ) from error
        rows = list(self.rows(columns))
        width = min(columns, len(self.pages))
        figure = Figure(figsize=(max(4.0, 0.28 * width), 0.28 * len(rows) + 1.2))
        axes = figure.subplots()
        for y, row in enumerate(rows):
            for x, page in enumerate(row):
                border = (
                    {"linestyle": ":", "linewidth": 1.5} if page.is_open else {"linewidth": 0.0}
                )
                axes.add_patch(
                    Rectangle(
                        (x + 0.05, y + 0.05), 0.9, 0.9,
                        facecolor=page.colour, edgecolor="black", **border,
                    )
                )  # fmt: skip
                if page.colour == SHARED:
                    axes.text(
                        x + 0.5, y + 0.54, page.sign, color="white", fontsize=7, ha="center",
                        va="center",
                    )  # fmt: skip
        axes.set(xlim=(0, width), ylim=(len(rows), 0), aspect="equal")
        axes.axis("off")
        axes.set_title(self.summary(), fontsize=8, loc="left")
        legend = [
            Patch(color=COLOURS[index % len(COLOURS)], label=f"{name}: {tokens} tokens")
            for index, (name, tokens) in enumerate(zip(self.names, self.tokens))
        ][: len(COLOURS)]
        legend += [
            Patch(color=SHARED, label="shared, by so many"),
            Patch(color=CACHED, label="cached alone"),
            Patch(color=FREE, label="free"),
        ]
        axes.legend(
            handles=legend, loc="upper left", bbox_to_anchor=(0, 0), ncols=3, fontsize=7,
            frameon=False,
        )  # fmt: skip
        return figure

    def save(self, path: str | Path, columns: int = COLUMNS) -> Path:
        """Write a picture, whole or not at all; the suffix says which kind, ``.png`` or ``.svg``.

        The same map is the same SVG, and its description is the map as text.

        Raises:
            ValueError: The suffix is another.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            fail("PoolMap.save", "path must end in .png or .svg", path.name)
        figure = self.figure(columns)
        if path.suffix == ".svg":
            write_whole(path, svg_of(figure, self.text(columns)))
        else:
            picture = io.BytesIO()
            figure.savefig(picture, dpi=160, bbox_inches="tight")
            write_whole(path, picture.getvalue())
        return path


def svg_of(figure, description: str) -> str:
    """A figure of matplotlib as an SVG, the same text whenever it is made; its description goes into it."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "paged_mlx", "svg.fonttype": "none"}):
        about = {"Date": None, "Creator": None, "Description": description}
        figure.savefig(out, format="svg", bbox_inches="tight", metadata=about)
    return out.getvalue()[out.getvalue().index("<svg") :]


def page_figures(
    allocator, sequences: Sequence[tuple[Any, Any]], cached, formats: str | None, open_pages
) -> dict[str, Any]:
    """The pages of an allocator, as plain data that JSON can hold.

    Args:
        allocator: A ``PageAllocator``.
        sequences: ``(name, page table)`` of each.
        cached: Ids of pages that prefix caches hold.
        formats: What the pool's format is called; None: dense.
        open_pages: Ids of pages that are dense still.

    Returns:
        ``page_size``, ``total``, ``format``, ``open``; ``sequences`` (name, tokens and page ids of each,
        None for pages given back), and ``pages``, by id: ``[holders, cached]``. Pages that are not in
        it are free.
    """
    cached = set(cached)
    counts = allocator.counts.tolist()
    return {
        "page_size": allocator.page_size,
        "total": allocator.total_pages,
        "format": formats,
        "open": sorted(int(page_id) for page_id in open_pages),
        "sequences": [
            {
                "name": name,
                "tokens": table.num_tokens,
                "pages": [None if page_id < 0 else int(page_id) for page_id in table.page_ids],
            }
            for name, table in sequences
            if table.page_ids
        ],
        "pages": {
            page_id: [held, page_id in cached] for page_id, held in enumerate(counts) if held
        },
    }
