"""Figures of a server in the text form of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paged_mlx.machine.routes import ITEMS, kernel_routes

Sample = tuple[Mapping[str, str], float]


class Exposition:
    """Metrics with their help and type, one after the other; ``str`` gives the text."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, what: str, samples: Iterable[Sample]) -> None:
        """Add a metric.

        Args:
            name: Without the prefix ``paged_mlx_``.
            kind: ``"gauge"`` or ``"counter"``.
            what: Its help.
            samples: Labels and value of each; a metric without samples is left out.
        """
        lines = [f"paged_mlx_{name}{_labels(labels)} {value:g}" if isinstance(value, float)
                 else f"paged_mlx_{name}{_labels(labels)} {value}" for labels, value in samples]  # fmt: skip
        if lines:
            self._lines += [f"# HELP paged_mlx_{name} {what}", f"# TYPE paged_mlx_{name} {kind}"]
            self._lines += lines

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = (
        (name, str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def add_pages(out: Exposition, pages: dict[str, Any]) -> None:
    """Add what a snapshot says."""
    groups = [({"window": str(g["window"] or "none")}, g) for g in pages["groups"]]

    def of_groups(*names: str) -> list[Sample]:
        return [(labels | {"state": n}, g[n]) for labels, g in groups for n in names]

    out.add(
        "pages", "gauge", "Pages by state: all, free, held by the prefix cache, and of these by nobody else.",
        of_groups("total", "free", "cached", "evictable"),
    )  # fmt: skip
    out.add(
        "page_bytes", "gauge", "Bytes of one page of all layers of a group.",
        [(labels, g["page_bytes"]) for labels, g in groups],
    )  # fmt: skip
    out.add("pool_bytes", "gauge", "Bytes of all pages.", [({}, pages["nbytes"])])
    sequences = max(len(g["sequences"]) for _, g in groups)
    out.add("sequences", "gauge", "Sequences that hold pages.", [({}, sequences)])
    caches = [(labels, g["cache"]) for labels, g in groups if "cache" in g]
    for name, what in (
        ("queries", "Lookups in the prefix cache."),
        ("hits", "Lookups that found pages."),
        ("stored", "Pages that came into the prefix cache."),
        ("evicted", "Pages that left it for want of pages."),
    ):
        out.add(f"prefix_cache_{name}_total", "counter", what, [(l, c[name]) for l, c in caches])  # noqa: E741
    out.add(
        "attention_calls_total", "counter", "Attention calls of the model by route; a gather has a reason.",
        [(_route(route), n) for route, n in pages["routes"].items()],
    )  # fmt: skip


def _route(route: str) -> dict[str, str]:
    name, _, reason = route.partition(": ")
    return {"route": name.replace(" ", "_"), "reason": reason}


def add_kernels(out: Exposition) -> None:
    """Add which kernels have run in this process, and where."""
    counts = kernel_routes()

    def samples(label: str, names) -> list[Sample]:
        return [
            ({label: name.replace(" items", ""), "on": place}, n)
            for name in names
            for place, n in counts[name].items()
        ]

    out.add("operations_total", "counter", "Operations on pages, by where they ran.",
            samples("operation", sorted(counts.keys() - set(ITEMS))))  # fmt: skip
    out.add("attention_items_total", "counter", "Work items of attention, by body.",
            samples("body", [name for name in ITEMS if name in counts]))  # fmt: skip
