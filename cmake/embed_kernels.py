"""Embed the Metal sources in a C++ header, each with its own includes resolved.

The OS compiles them at run time and has no include path, so every `.metal`
file becomes one self-contained text. usage: embed_kernels.py KERNELS OUTPUT
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^#include "([^"]+)"\s*$', re.M)
DELIMITER = "PAGED_MLX"


def flatten(path: Path, seen: set[Path]) -> str:
    """The text of `path` with each quoted include replaced by its text, once."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text()
    if not text.isascii():
        raise SystemExit(f"{path.name}: kernel text must be ASCII")
    return INCLUDE.sub(lambda m: flatten(path.parent / m.group(1), seen), text)


def literal(text: str) -> str:
    """`text` as C++ raw strings, in pieces that every compiler takes."""
    if f"){DELIMITER}" in text:
        raise SystemExit("kernel text contains the raw string delimiter")
    pieces = [text[i : i + 8000] for i in range(0, len(text), 8000)]
    return "\n".join(f'R"{DELIMITER}({piece}){DELIMITER}"' for piece in pieces)


def main(kernels: Path, output: Path) -> None:
    rows = [
        f'    {{"{path.stem}",\n{literal(flatten(path, set()))}}},'
        for path in sorted(kernels.glob("*.metal"))
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        "#pragma once\n\n"
        "namespace paged_mlx {\n\n"
        "struct KernelSource {\n  const char* name;\n  const char* text;\n};\n\n"
        f"constexpr int kNumKernelSources = {len(rows)};\n"
        "constexpr KernelSource kKernelSources[] = {\n"
        + "\n".join(rows)
        + "\n    {nullptr, nullptr}};\n\n} // namespace paged_mlx\n"
    )


main(Path(sys.argv[1]), Path(sys.argv[2]))
