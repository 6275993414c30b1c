"""Counts of the kernels that have served in this process, for whoever doubts a fast path.

A model of mlx-lm has counts of its own, ``PagedModel.routes``.
"""

from __future__ import annotations

import sys

from paged_mlx._native import _ext

ITEMS = ("vector items", "tile items", "wide items", "merges")
PLACES = {
    "cpu": "the CPU's kernels",
    "gpu": "Metal kernels",
    "host": "Metal kernels, run on the CPU",
    "mlx": "MLX's own operations",
}


def kernel_routes() -> dict[str, dict[str, int]]:
    """How often each operation has run so far, and the work items that it attended, by place.

    Returns:
        ``{operation or kind of item: {place: count}}``; places are "cpu", "gpu" (Metal), "host"
        (Metal kernels in tests) and "mlx" (no native module).

    Examples:
        >>> from paged_mlx.machine.routes import kernel_routes
        >>> set(kernel_routes().get("PagedAttention", {})) <= {"cpu", "gpu", "host", "mlx"}
        True
    """
    counts = _ext.route_counts()
    formulas = sys.modules.get("paged_mlx.fallback")
    if formulas is not None and formulas is not _ext:  # of what the native module does not do
        for name, places in formulas.route_counts().items():
            counts[name] = counts.get(name, {}) | places
    return counts


def since(before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What was added to the counts since they were ``before``; without zeros."""
    found: dict[str, dict[str, int]] = {}
    for name, places in kernel_routes().items():
        for place, count in places.items():
            if more := count - before.get(name, {}).get(place, 0):
                found.setdefault(name, {})[place] = more
    return found


def in_words(routes: dict[str, dict[str, int]]) -> str:
    """The counts as lines, operations first, then what they attended."""
    lines = []
    for name, places in sorted(routes.items(), key=lambda pair: (pair[0] in ITEMS, pair[0])):
        counts = ", ".join(f"{count} on {PLACES[place]}" for place, count in places.items())
        lines.append(f"{name}: {counts}")
    return "\n".join(lines) or "no kernel has run"
