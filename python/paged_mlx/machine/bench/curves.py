"""Curves of a run: how times grow with the context, the batch, a common prefix or the page, as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paged_mlx.machine.bench.trials import FIELDS, PAGE_SIZE
from paged_mlx.pages.pool_map import COLOURS, svg_of

AXES = {
    "depth": "tokens in the cache",
    "batch": "sequences at once",
    "shared": "tokens that all sequences begin with",
    "page_size": "tokens in a page",
}
MOST = 4  # curves of an axis


@dataclass(frozen=True)
class Curves:
    """Tests that differ in one thing.

    Attributes:
        axis: The field of a trial in which they differ.
        title: What they have in common.
        times: Of each candidate ``(value of the axis, median seconds, share of the bandwidth)``, by
            rising value; the share is None where nothing is known of it.
    """

    axis: str
    title: str
    times: dict[str, list[tuple[int, float, float | None]]]

    def gains(self) -> dict[str, list[tuple[int, float]]]:
        """By how much the first candidate is faster than each other, as logarithms."""
        first, *others = self.times
        ours = {value: seconds for value, seconds, _ in self.times[first]}
        return {
            name: [(x, math.log(s / ours[x])) for x, s, _ in self.times[name] if x in ours]
            for name in others
        }

    def crossings(self) -> dict[str, float]:
        """Where the first candidate comes to be faster or slower than another, for the last time."""
        found = {}
        for name, gains in self.gains().items():
            for (x0, g0), (x1, g1) in pairwise(gains):
                if (g0 > 0) != (g1 > 0):
                    way = g0 / (g0 - g1)  # along the line that is drawn
                    is_log = x0 and self.axis != "shared"
                    found[name] = x0 * (x1 / x0) ** way if is_log else x0 + (x1 - x0) * way
        return found

    def verdicts(self) -> list[str]:
        """Which is faster, and from where on, in sentences."""
        first, crossings = next(iter(self.times)), self.crossings()
        alike: dict[str, list[str]] = {}
        for name, gains in self.gains().items():
            at = crossings.get(name)
            where = "everywhere" if at is None else f"from about {at:.0f} {AXES[self.axis]} on"
            alike.setdefault(f"{'faster' if gains[-1][1] > 0 else 'slower'}, {where}", []).append(
                name
            )
        return [
            f"{first} is {how} than {' and '.join(names)}, {where}"
            for said, names in alike.items()
            for how, where in [said.split(", ", 1)]
        ]


def curves(found: dict[str, Any]) -> Iterator[Curves]:
    """The curves that a record of ``paged-mlx bench`` holds: an axis with two values or more makes one,
    and of each axis those with the most and the largest values."""
    bandwidth = found.get("read_bandwidth")
    for axis in AXES:
        alike: dict[tuple, dict[int, dict]] = {}
        for test in found["tests"]:
            key = tuple(test[name] for name in FIELDS if name != axis)
            alike.setdefault(key, {})[test[axis]] = test
        found_here = [(key, tests) for key, tests in alike.items() if len(tests) > 1]
        found_here.sort(key=lambda pair: (len(pair[1]), pair[0]))
        for key, tests in reversed(found_here[-MOST:]):
            times: dict[str, list] = {}
            for value, test in sorted(tests.items()):
                for c in test["candidates"]:
                    reads = bandwidth and c["nbytes"] and not test["prompt"]
                    share = c["nbytes"] / c["median"] / bandwidth if reads else None
                    times.setdefault(c["name"], []).append((value, c["median"], share))
            yield Curves(axis, _title(axis, key), times)


def _title(axis: str, key: tuple) -> str:
    of = dict(zip((name for name in FIELDS if name != axis), key))
    words = [f"a prompt of {of['prompt']} tokens" if of["prompt"] else "decode"]
    if of["generated"] > 1:
        words[0] = f"{of['generated']} tokens generated"
    if of.get("batch", 1) > 1:
        words.append(f"{of['batch']} sequences" + (" of unequal lengths" if of["ragged"] else ""))
    if of.get("depth"):
        words.append(f"{of['depth']} tokens in the cache")
    if of.get("shared"):
        words.append(f"{of['shared']} in common")
    if of.get("page_size", PAGE_SIZE) != PAGE_SIZE:
        words.append(f"pages of {of['page_size']}")
    return ", ".join(words)


def svg(drawn: Curves) -> str:
    """A picture: seconds above, the share of the bandwidth below where it is known.

    Its description holds what is drawn, as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    shares = any(share is not None for points in drawn.times.values() for *_, share in points)
    figure = Figure(figsize=(5.2, 5.4 if shares else 3.6), layout="constrained")
    upper, *lower = figure.subplots(
        2 if shares else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if shares else [1]
    ).flat
    for number, (name, points) in enumerate(drawn.times.items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3.5}
        values = [value for value, *_ in points]
        upper.plot(values, [seconds * 1e3 for _, seconds, _ in points], label=name, **look)
        for axes in lower:
            known = [(value, share * 100) for value, _, share in points if share is not None]
            axes.plot(*zip(*known), **look) if known else None
    upper.set(yscale="log", ylabel="ms", title=drawn.title)
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_minor_locator(NullLocator())
    upper.title.set_fontsize(10)
    upper.legend(fontsize=8, frameon=False)
    for axes in lower:
        axes.set_ylabel("% of read bandwidth")
        axes.set_ylim(bottom=0)
    for at in drawn.crossings().values():
        upper.axvline(at, color="black", linestyle=":", linewidth=1)
    last = lower[-1] if lower else upper
    last.set_xlabel(AXES[drawn.axis])
    ticks = sorted({value for points in drawn.times.values() for value, *_ in points})
    if drawn.axis != "shared":
        least = next(tick for tick in ticks if tick)
        last.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)
        last.set_xlim(0 if 0 in ticks else least * 0.9, ticks[-1] * 1.1)
    last.set_xticks(ticks, [str(tick) for tick in ticks])
    last.minorticks_off()
    for axes in (upper, *lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return svg_of(figure, json.dumps({"title": drawn.title, drawn.axis: drawn.times}))
