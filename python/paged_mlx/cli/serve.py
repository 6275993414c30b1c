"""``paged-mlx serve``: mlx-lm's server, its models on pages."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from paged_mlx.cli.options import Mistake
from paged_mlx.cli.pages import pages_parser, split

DESCRIPTION = """\
mlx_lm.server with K and V in pages: the same options and the same HTTP interface, and prompts
that begin alike share pages, where the model allows it. Besides:

  GET /metrics                                      figures for Prometheus
  GET /pages                                        what each page holds now, as JSON
  GET /estimate?tokens=2000,500&max_new_tokens=200  will prompts of these lengths fit?

With --max-bytes or --num-pages prompts wait for pages, and one that can never have them is
refused. Ctrl-C ends it."""
EXAMPLES = """
paged-mlx serve --model mlx-community/Qwen3-0.6B-4bit
paged-mlx serve --model ./my-model --port 8081 --max-bytes 2GiB
curl localhost:8080/v1/chat/completions -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
curl localhost:8080/metrics
"""


def main(arguments: list[str]) -> int:
    options = pages_parser("serve", DESCRIPTION, EXAMPLES, prefix_cache=None)
    chosen, rest = split(options, arguments, "server")
    from paged_mlx.cli.mains import run_main

    def run(before, host, port, model_provider, **_):
        _serve(host, port, model_provider.cli_args, chosen)

    run_main("server", options.prog, rest, run=run)
    return 0


def _serve(host: str, port: int, cli_args: argparse.Namespace, chosen: argparse.Namespace) -> None:
    from paged_mlx.cli.pages import enabled
    from paged_mlx.mlx_lm import enable
    from paged_mlx.serving.http import PortInUse, serve

    def enable_draft(model):
        return enable(model, page_size=chosen.page_size, retain=chosen.retain)

    if cli_args.model:
        print(f"loading {cli_args.model}", file=sys.stderr)
    try:
        failure = serve(host, port, cli_args, lambda model: enabled(model, chosen), enable_draft)
    except PortInUse as error:
        raise Mistake(str(error)) from error
    if failure is None:
        # MLX frees what it keeps for a thread after Python has joined it, and aborts if Python has
        # ended by then. Nothing is left to do here.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    said = " ".join(str(failure).split())[:300] or type(failure).__name__
    raise Mistake(f"the model {cli_args.model} cannot be loaded: {said}") from failure
