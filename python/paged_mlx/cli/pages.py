"""Options of the commands that put a model of mlx-lm on pages, beside mlx-lm's own options."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paged_mlx.cli.options import Mistake, count, kv_format, needs_mlx_lm, parser, size

ENABLE = (
    "page_size",
    "num_pages",
    "max_bytes",
    "retain",
    "prefix_cache",
    "kv_format",
)  # options of enable


def pages_parser(command: str, description: str, examples: str, prefix_cache: bool | None):
    """The parser of our options; those that it does not know are mlx-lm's.

    Args:
        prefix_cache: Whether prompts share pages by default; None: where the model allows it.
    """
    options = parser(command, description, examples, add_help=False)
    group = options.add_argument_group("pages")
    group.add_argument(
        "--page-size", type=count, help="tokens in a page (16; 64 for keys in 4 bits)"
    )
    group.add_argument(
        "--kv-format", type=kv_format, metavar="F",
        help="K and V in 8 or 4 bits: q8, q4, or one each as q8/q4",
    )  # fmt: skip
    group.add_argument(
        "--num-pages", type=count, metavar="N", help="pages of each kind of layer, reserved at once"
    )
    group.add_argument(
        "--max-bytes", type=size, metavar="SIZE",
        help="what all pages may take, as 500MB or 2GiB; prompts then wait for pages",
    )  # fmt: skip
    group.add_argument(
        "--retain", type=int, default=32, metavar="N",
        help="tokens that layers with a window keep behind it, for going back (32)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-cache", action=argparse.BooleanOptionalAction, default=prefix_cache,
        help="prompts that begin alike share pages"
        + (", where the model allows it (the default)" if prefix_cache is None else ""),
    )  # fmt: skip
    return options


def split(options: argparse.ArgumentParser, arguments: list[str], name: str):
    """Our options, and the words that are for ``mlx_lm.<name>``.

    With ``--help`` prints both, and ends the program.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        options.print_help()
        print(f"\noptions of mlx_lm.{name}, which are taken too:\n", flush=True)
        if importlib.util.find_spec("mlx_lm") is None:
            print("  mlx-lm is not installed: pip install mlx-lm")
        else:
            from paged_mlx.cli.mains import run_main

            run_main(name, options.prog, ["--help"])
        raise SystemExit(0)
    chosen, rest = options.parse_known_args(arguments)
    needs_mlx_lm()
    return chosen, rest


def enabled(model, chosen: argparse.Namespace):
    """The model on pages, by the options of a command.

    Raises:
        ValueError: It has no K and V that can be paged, or an option is wrong.
    """
    from paged_mlx.mlx_lm import enable

    options = {name: getattr(chosen, name) for name in ENABLE}
    if options["prefix_cache"] is not None:
        return enable(model, **options)
    try:
        return enable(model, **options | {"prefix_cache": True})
    except ValueError as error:
        if "prefix_cache must be False" not in str(error):
            raise
        print(f"without a prefix cache: {error}", file=sys.stderr)
        return enable(model, **options | {"prefix_cache": False})


class Loading:
    """Models that a ``main()`` of mlx-lm loads, each put on pages as it comes.

    Attributes:
        models: The PagedModels, in the order of loading.
    """

    def __init__(self, chosen: argparse.Namespace):
        self._chosen = chosen
        self.models: list = []

    def load(self, before: Callable, path, *arguments, **options) -> Any:
        """Stand in for a function that loads a model, which is ``before``."""
        print(f"loading {path}", file=sys.stderr)
        found = loaded(before, path, *arguments, **options)
        self.models.append(enabled(found[0], self._chosen))
        return found

    def report(self) -> None:
        """Say on stderr which routes attention took, and disable the models."""
        for paged in self.models:
            print(f"pages: {routes(paged)}", file=sys.stderr)
            paged.disable()


def loaded(load: Callable, path, *arguments, **options) -> Any:
    """What ``load`` gives.

    Raises:
        Mistake: There is no such model, or it cannot be loaded.
    """
    try:
        return load(path, *arguments, **options)
    except Exception as error:
        raise cannot_be_loaded(path, error) from error


def cannot_be_loaded(path: object, error: Exception) -> Mistake:
    """Why a model is not there, in one sentence."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if str(path).startswith((".", "/", "~")) and not Path(str(path)).exists():
        said = "there is no such folder"
    elif any(kind.__name__ == "LocalEntryNotFoundError" for kind in type(error).__mro__):
        said = "it is not on this machine, and Hugging Face cannot be reached"
    return Mistake(
        f"the model {path} cannot be loaded: {said} "
        "(a folder with a model of mlx-lm, or the name of one on Hugging Face)"
    )


def routes(paged) -> str:
    """In a line: which routes attention took, and the pages it has taken."""
    parts = [f"{paged.paged_calls} attention calls read pages"]
    if paged.fresh_prompt_calls:
        parts.append(f"{paged.fresh_prompt_calls} of fresh prompts went to MLX's attention")
    parts += [f"{n} gathered, because {why}" for why, n in paged.gathered_calls.items()]
    if paged.prefixes is not None and paged.prefixes.tokens_asked:
        reused, asked = paged.prefixes.tokens_reused, paged.prefixes.tokens_asked
        parts.append(f"{reused} of {asked} prompt tokens were cached")
    return "; ".join([*parts, f"{paged.nbytes / 2**20:.1f} MiB of pages"])
