"""``paged-mlx chat``: mlx-lm's own command, its model on pages."""

from __future__ import annotations

from paged_mlx.cli.generate import run
from paged_mlx.cli.pages import pages_parser

DESCRIPTION = """\
mlx_lm.chat with K and V in pages: the same options. q ends it, and so does ctrl-D; it says
then which routes attention took."""
EXAMPLES = """
paged-mlx chat --model mlx-community/Qwen3-0.6B-4bit
paged-mlx chat --model ./my-model --system-prompt "Answer in one sentence." --temp 0.7
"""


def main(arguments: list[str]) -> int:
    try:
        return run("chat", pages_parser("chat", DESCRIPTION, EXAMPLES, False), arguments)
    except EOFError:  # the end of the input
        print()
        return 0
