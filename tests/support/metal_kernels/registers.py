"""Every variant of the attention kernels that can be chosen, and its footprint."""

from __future__ import annotations

from typing import NamedTuple

from metal_host.registers import Footprint
from metal_host.registers import footprint as footprint_of_text

from .launcher import K_FORMATS, KERNELS, V_FORMATS, choose_body

#: Head dims of models. Of other dims the widest loads are narrower, nothing else differs.
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
#: Of 128 words that a lane has; a compiler for the GPU needs some beside what is counted.
MOST_LIVE_WORDS = 90
#: With a window, softcap, ALiBi, sinks and an additive mask at once.
MOST_LIVE_WORDS_WITH_OPTIONS = 110
#: Of a loop, at about 8 bytes each; the instruction cache of an M1's core holds 12 KB.
MOST_LOOP_INSTRUCTIONS = 1500
_TYPES = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
# Function constants of kernels/arguments.h: pages of 16 tokens, not ragged, and no option or all.
_PLAIN = {id: False for id in (0, 1, 2, 3, 4, 5, 7)} | {6: 16}
_EVERYTHING = {id: True for id in (0, 1, 2, 3, 4, 7)} | {5: False, 6: 16}


class Variant(NamedTuple):
    kernel: str
    dtype: str
    head_dim: int
    rows: int
    simdgroups: int
    formats: tuple[str | None, str | None] = (None, None)

    def __str__(self) -> str:
        name = f"{self.kernel}-{self.dtype}-{self.head_dim}x{self.rows}"
        return (
            name if self.formats == (None, None) else f"{name}-{self.formats[0]}-{self.formats[1]}"
        )


def variants(formats=(None, None), head_dims=HEAD_DIMS) -> list[Variant]:
    """What ``choose_body`` answers for any number of rows."""
    chosen = {}
    for dtype in _TYPES:
        for head_dim in head_dims:
            for rows in (*range(1, 34), 1000):
                body = choose_body(rows, head_dim, head_dim, dtype, formats)
                name = (body.kernel, dtype, head_dim, body.rows, body.simdgroups, formats)
                chosen[Variant(*name)] = True
    return list(chosen)


def few() -> list[Variant]:
    """The most rows of each kernel at three head dims."""
    most: dict[tuple, Variant] = {}
    for variant in variants():
        if (variant.dtype, variant.head_dim) in (
            ("float16", 128),
            ("float16", 256),
            ("float32", 64),
        ):
            most[variant.kernel, variant.dtype, variant.head_dim] = variant
    return list(most.values())


def quantised() -> list[Variant]:
    """Variants over quantised pages: the pairs of formats that people take, float16."""
    pairs = (("q8", "q8"), ("q8", "q4"), ("q4", "q4"))
    return [
        variant
        for pair in pairs
        for variant in variants(pair, (64, 128, 256, 512) if pair[0] == "q8" else (64, 128, 256))
        if variant.dtype == "float16"
    ]


def footprint(variant: Variant, options: bool = False) -> Footprint:
    """What a stock compiler makes of a variant's text, with every option of attention or with none."""
    macros = {
        "T": _TYPES[variant.dtype],
        "D": variant.head_dim,
        "DV": variant.head_dim,
        "ROWS": variant.rows,
        "SIMDGROUPS": variant.simdgroups,
        "K_FORMAT": K_FORMATS[variant.formats[0]],
        "V_FORMAT": V_FORMATS[variant.formats[1]],
    }
    text = "".join(f"#define PAGED_MLX_{macro} {value}\n" for macro, value in macros.items())
    text += (KERNELS / f"{variant.kernel}.metal").read_text()
    constants = _EVERYTHING if options else _PLAIN
    if variant.formats[0] == "q4":
        constants = constants | {6: 64}  # the page size of this format
    return footprint_of_text(text, variant.kernel, [KERNELS], constants)


def most_threadgroup_bytes(variant: Variant) -> int:
    """8 KiB for four simdgroups that decode, so that several threadgroups share a core."""
    decodes = variant.rows <= 8 and variant.head_dim <= 256
    return 8 * 1024 * variant.simdgroups // 4 if decodes else 22 * 1024


def most_live_words(variant: Variant) -> int:
    """More where pages are quantised: codes in flight, and Q beside Q times scales."""
    return MOST_LIVE_WORDS if variant.formats == (None, None) else 110
