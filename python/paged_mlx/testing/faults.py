"""Planted faults: what a paged attention gets wrong, one thing at a time.

Each is a small change to ``walk.attend``. ``FAULTS`` names the group of the suite that must
see it; a suite that lets one pass cannot tell a right page from a wrong one.
"""

from __future__ import annotations

import numpy as np

from .number_faults import (
    BaseTwoLse,
    CapLast,
    CapOverflow,
    ClampedMaximum,
    EmptyRowsLeft,
    HalfPrecisionSum,
    MergeWithoutWeights,
    NextHead,
    NextToken,
    NoMaximum,
    Option,
    ScaleOfValues,
    SinkCountedTwice,
    SinkFillsEmptyRows,
    UnsignedDistance,
)
from .page_faults import (
    CausalEdge,
    ContextLong,
    ContextShort,
    DropPage,
    ForeignKeys,
    ForeignPage,
    HeadMap,
    PageEdge,
    PartitionDropped,
    PartitionEdge,
    PrefixEdge,
    PrefixNext,
    PreviousPage,
    QueryPositions,
    RepeatPage,
    SlotShift,
    StaleValues,
    SwapPages,
    WindowEdge,
)
from .walk import Fault


def _shifted(mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, 1, axis=-1)


#: ``(fault, group that must see it)``.
FAULTS: tuple[tuple[Fault, str], ...] = (
    *((DropPage(which), "needles") for which in (0, 0.25, 0.5, 0.75, 1)),
    *((RepeatPage(which), "needles") for which in (0, 0.5, 1)),
    (SwapPages(last=True), "needles"),
    (SwapPages(last=False), "needles"),
    (PreviousPage(), "needles"),
    (ForeignPage(), "needles"),
    (ForeignKeys(), "needles"),
    (PageEdge(last=False), "needles"),
    (PageEdge(last=True), "needles"),
    (SlotShift(), "needles"),
    (ContextShort(), "needles"),
    (ContextLong(), "needles"),
    (WindowEdge(-1), "needles"),
    (WindowEdge(1), "needles"),
    (CausalEdge(1), "needles"),
    (CausalEdge(-1), "needles"),
    (QueryPositions(), "needles"),
    (PartitionEdge(0), "needles"),
    (PartitionEdge(2), "needles"),
    (PartitionDropped(0), "needles"),
    (PartitionDropped(-1), "needles"),
    (PrefixEdge(0), "needles"),
    (PrefixEdge(2), "needles"),
    (PrefixNext(0), "needles"),
    (PrefixNext(2), "needles"),
    (HeadMap(), "needles"),
    (NextHead(), "needles"),
    (NextToken(), "needles"),
    (StaleValues(), "poison"),
    (ContextLong(), "poison"),
    (ClampedMaximum(), "numbers"),
    (NoMaximum(), "numbers"),
    (SinkFillsEmptyRows(), "numbers"),
    (EmptyRowsLeft(), "numbers"),
    (CapOverflow(), "numbers"),
    (HalfPrecisionSum(), "numbers"),
    (Option("softcap lost", "softcap", lambda cap: None), "grid"),
    (CapLast(), "grid"),
    (ScaleOfValues(), "grid"),
    (UnsignedDistance(), "grid"),
    (Option("alibi of the opposite sign", "alibi_slopes", lambda s: -s), "grid"),
    (Option("alibi slopes of the next head", "alibi_slopes", lambda s: np.roll(s, 1)), "grid"),
    (Option("sinks lost", "sinks", lambda s: None), "grid"),
    (Option("sinks of the next head", "sinks", lambda s: np.roll(s, 1)), "grid"),
    (SinkCountedTwice(), "grid"),
    (Option("mask one key off", "mask", _shifted), "grid"),
    (Option("mask one token off", "mask", lambda m: np.roll(m, 1, axis=-2)), "grid"),
    (Option("mask of head 0 for all", "mask", lambda m: m[:1] if m.ndim == 3 else m), "grid"),
    (MergeWithoutWeights(), "grid"),
    (BaseTwoLse(), "grid"),
)
