"""What a stock compiler makes of the attention kernels, as the table of docs/metal.md.

``python tests/support/register_table.py`` prints it. Needs no GPU.
"""

from metal_kernels import registers

HEADER = (
    "| body | dtype | head_dim | rows | simdgroups | live words | instructions of the loop | threadgroup memory, B |\n"
    "|---|---|---|---|---|---|---|---|"
)
FORMATS_HEADER = (
    "| body | K | V | head_dim | rows | simdgroups | live words | instructions of the loop | threadgroup memory, B |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(variant: registers.Variant) -> str:
    """The variant's row of its table."""
    found = registers.footprint(variant)
    kind = (variant.dtype,) if variant.formats == (None, None) else variant.formats
    cells = (
        variant.kernel, *kind, variant.head_dim, variant.rows, variant.simdgroups,
        found.live_words, found.loop_instructions, found.threadgroup_bytes,
    )  # fmt: skip
    return (
        "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |"
    )


def listed() -> list[registers.Variant]:
    """Every variant but those of bfloat16, which differ from float16 in nothing that is counted."""
    return [variant for variant in registers.variants() if variant.dtype != "bfloat16"]


def table() -> str:
    """A row for each variant."""
    return "\n".join([HEADER, *map(line, listed())])


def formats_table() -> str:
    """A row for each variant over quantised pages that is listed."""
    return "\n".join([FORMATS_HEADER, *map(line, registers.quantised())])


if __name__ == "__main__":
    print(table(), formats_table(), sep="\n\n")
