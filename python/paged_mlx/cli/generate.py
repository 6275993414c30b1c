"""``paged-mlx generate``: mlx-lm's own command, its model on pages."""

from __future__ import annotations

from contextlib import nullcontext

from paged_mlx.cli.live_map import shown
from paged_mlx.cli.pages import Loading, pages_parser, split

DESCRIPTION = """\
mlx_lm.generate with K and V in pages: the same options, the same tokens. Takes any model of
mlx-lm, a folder or a name on Hugging Face. On stderr it says at the end which routes
attention took."""
EXAMPLES = """
paged-mlx generate --model mlx-community/Qwen3-0.6B-4bit --prompt "Why is the sky blue?"
paged-mlx generate --model ./my-model --prompt - --max-tokens 200 < question.txt
paged-mlx generate --model ./my-model --map --prompt "Tell me a story"
paged-mlx generate --model ./my-model --draft-model ./my-draft --max-bytes 500MB --prompt Hello
"""


def main(arguments: list[str]) -> int:
    options = pages_parser("generate", DESCRIPTION, EXAMPLES, False)
    options.add_argument("--map", action="store_true", help="show the pages while tokens come")
    return run("generate", options, arguments)


def run(name: str, options, arguments: list[str]) -> int:
    """Run ``mlx_lm.<name>`` with every model that it loads on pages."""
    chosen, rest = split(options, arguments, name)
    from paged_mlx.cli.mains import run_main

    loading = Loading(chosen)
    try:
        with shown(loading.models) if getattr(chosen, "map", False) else nullcontext():
            run_main(name, options.prog, rest, load=loading.load, sharded_load=loading.load)
    finally:
        loading.report()
    return 0
