"""The pictures of the documents: page maps drawn by ``pool.map()``, and what records say.

A picture's description holds what it shows, so that one that is out of date is known whatever draws it.
"""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from matplotlib.figure import Figure
from paged_mlx import PagePool, PageTable, PrefixCache
from paged_mlx.machine.bench.curves import Curves, curves, svg
from paged_mlx.pages.pool_map import COLOURS, PoolMap, svg_of

from benchmarks.harness import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)


def page_maps() -> dict[str, PoolMap]:
    """Maps of a small pool, by the name of the picture."""
    pool, found = PagePool(1, 24, 4, 1, 8, dtype=mx.float32), {}
    a, b = PageTable(4), PageTable(4)
    for table, tokens in ((a, 6), (b, 3), (a, 5), (b, 9), (a, 8)):  # they grow in turns
        table.append_tokens(tokens, pool.allocator)
    found["sequences"] = pool.map([a, b])
    forks = [a.fork(), a.fork()]
    for fork in forks:
        fork.append_tokens(3, pool.allocator)
    found["forks"] = pool.map([a, b, *forks])
    for table in (a, b, *forks):
        table.release()
    cache, system = PrefixCache(pool.allocator), list(range(16))
    chats = [PageTable(4) for _ in range(3)]
    for number, chat in enumerate(chats):
        tokens = [*system, *range(100 * number, 100 * number + 9)]
        known = cache.reuse(tokens, chat)
        chat.append_tokens(len(tokens) - known, pool.allocator)
        cache.insert(tokens, chat)
    chats[0].release()  # its pages stay, for whoever begins as it did
    found["prefixes"] = pool.map(chats[1:], [cache])
    return found


def measured() -> str:
    """What batches hold, and what a decode step takes, as an SVG."""
    memory = json.loads((RESULTS / "mlx_lm_memory.json").read_text())
    batches = [case for case in memory["cases"] if case["about"].get("figure") == "MB"]
    run = json.loads((RESULTS / "curves.json").read_text())
    steps = next(c for c in curves(run) if (c.axis, c.title) == ("depth", "decode"))
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    held = {
        label: [
            c["median"] / 1e6 for case in batches for c in case["candidates"] if c["name"] == name
        ]
        for label, name in (("mlx-lm's caches", "stock"), ("pages", "paged, growing pool"))
    }
    for number, (label, megabytes) in enumerate(held.items()):
        places = [row + 0.38 * (number - 0.5) for row in range(len(batches))]
        left.barh(places, megabytes, 0.36, label=label, color=COLOURS[1 - number])
    left.set_yticks(range(len(batches)), [case["name"] for case in batches])
    left.set(title="K and V of a batch", xlabel="MB", ylabel="tokens of its sequences")
    left.legend(fontsize=8, frameon=False)
    for number, (name, points) in enumerate(steps.times.items()):
        ms = [seconds * 1e3 for _, seconds, _ in points]
        right.plot(
            [x for x, *_ in points], ms, "o-", markersize=3.5, label=name, color=COLOURS[number]
        )
    ticks = [x for x, *_ in points]
    right.set(
        xscale="log", yscale="log", title="A decode step of one layer, one CPU thread", ylabel="ms"
    )
    right.set_xlabel("tokens in the cache")
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return svg_of(figure, json.dumps({"held": held, "decode": steps.times}))


def pictures() -> dict[Path, Callable[[], str]]:
    """How each picture is made."""
    maps = {
        DOCS / f"map_{name}.svg": lambda found=found: svg_of(found.figure(24), found.text(24))
        for name, found in page_maps().items()
    }
    run = json.loads((RESULTS / "curves.json").read_text())
    longest: dict[str, Curves] = {}
    for one in curves(run):
        if one.title.startswith("decode"):
            longest.setdefault(one.axis, one)
    drawn = {DOCS / f"curves_{axis}.svg": lambda one=one: svg(one) for axis, one in longest.items()}
    return maps | drawn | {DOCS / "measured.svg": measured}


def shows(svg: str) -> str:
    """What a picture shows."""
    found = DESCRIPTION.search(svg)
    return html.unescape(found[1]) if found else ""
