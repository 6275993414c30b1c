"""``paged-mlx serve``: mlx-lm's server, its models on pages."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from paged_mlx.cli.options import Mistake
from paged_mlx.cli.pages import cannot_be_loaded, enabled, pages_parser, split

DESCRIPTION = """\
mlx_lm.server with K and V in pages: the same options and the same HTTP interface, and prompts
that begin alike share pages, where the model allows it. Besides:

  GET /metrics                                      figures for Prometheus
  GET /map                                          a map of the pages, live, for a browser
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
    events = options.add_argument_group("events")
    events.add_argument(
        "--kv-events", metavar="ENDPOINT",
        help="publish what the prefix cache stores and removes, as vLLM does, at tcp://*:5557",
    )  # fmt: skip
    events.add_argument(
        "--kv-events-form", choices=("map", "array"), default="map",
        help="of an event: map for newer readers of vLLM's, array for older ones (map)",
    )  # fmt: skip
    chosen, rest = split(options, arguments, "server")
    from paged_mlx.cli.mains import run_main

    def run(before, host, port, model_provider, **_):
        _serve(host, port, model_provider.cli_args, chosen)

    run_main("server", options.prog, rest, run=run)
    return 0


def _serve(host: str, port: int, cli_args: argparse.Namespace, chosen: argparse.Namespace) -> None:
    from paged_mlx.mlx_lm import enable
    from paged_mlx.mlx_lm.serving.http import PortInUse, serve
    from paged_mlx.mlx_lm.serving.kv_events import CAPACITY, KVEventPublisher

    publisher: KVEventPublisher | None = None
    in_use: list = []
    if chosen.kv_events:
        try:
            publisher = KVEventPublisher(
                chosen.kv_events, lambda: in_use[-1] if in_use else None, chosen.kv_events_form
            )
        except ImportError as error:
            raise Mistake(
                "--kv-events needs pyzmq and msgspec: pip install pyzmq msgspec"
            ) from error
        except OSError as error:
            raise Mistake(str(error)) from error
        publisher.start()
        print(f"events of the prefix cache on {publisher.endpoint}", file=sys.stderr)

    def enable_model(model):
        paged = enabled(model, chosen)
        if publisher is not None and paged.prefixes is not None:
            for cache in paged.prefixes.caches.values():
                cache.record_events(CAPACITY)
        in_use[:] = [paged]
        return paged

    def enable_draft(model):
        return enable(
            model, page_size=chosen.page_size, retain=chosen.retain, kv_format=chosen.kv_format
        )

    if cli_args.model:
        print(f"loading {cli_args.model}", file=sys.stderr)
    try:
        failure = serve(host, port, cli_args, enable_model, enable_draft)
    except PortInUse as error:
        raise Mistake(str(error)) from error
    finally:
        if publisher is not None:
            publisher.stop()
    if failure is None:
        # MLX frees what it keeps for a thread after Python has joined it, and aborts if Python has
        # ended by then. Nothing is left to do here.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    raise cannot_be_loaded(cli_args.model, failure) from failure
