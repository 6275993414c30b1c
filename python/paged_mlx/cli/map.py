"""``paged-mlx map``: the pages of a running server."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from paged_mlx.cli.live_map import EVERY, coloured, columns_of_terminal, plain, screen
from paged_mlx.cli.options import Mistake, parser
from paged_mlx.pages.pool_map import PoolMap

DESCRIPTION = """\
What every page of a running `paged-mlx serve` holds: whose tokens, shared by how many, cached or free.
In a browser the server's own /map does the same, live."""
EXAMPLES = """
paged-mlx map
paged-mlx map http://localhost:8081 --watch
paged-mlx map --save pages.png
paged-mlx map --json
"""
URL = "http://localhost:8080"
PATIENCE = 60.0  # seconds: the figures wait for the pass under way


def main(arguments: list[str]) -> int:
    options = parser("map", DESCRIPTION, EXAMPLES)
    options.add_argument("url", nargs="?", default=URL, help=f"of the server ({URL})")
    options.add_argument("--watch", action="store_true", help="draw again until ctrl-C")
    options.add_argument(
        "--save", type=Path, metavar="FILE",
        help="a picture, .png or .svg, of the first kind of layer; needs matplotlib",
    )  # fmt: skip
    options.add_argument("--json", action="store_true", help="the figures, and nothing else")
    chosen = options.parse_args(arguments)
    found = pages_of(chosen.url)
    if chosen.json:
        print(json.dumps(found))
    elif chosen.save:
        print(PoolMap(found["groups"][0]).save(chosen.save))
    elif chosen.watch:
        with screen() if sys.stdout.isatty() else nullcontext(print_plain) as draw:
            while True:
                draw(found["groups"])
                time.sleep(EVERY)
                found = pages_of(chosen.url)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(coloured(found["groups"], columns_of_terminal(), rows=10**6))
    else:
        print_plain(found["groups"])
    return 0


def print_plain(groups: list[dict[str, Any]]) -> None:
    print(plain(groups, columns_of_terminal()), flush=True)


def pages_of(url: str) -> dict[str, Any]:
    """What a server says of its pages.

    Raises:
        Mistake: Nobody answers there, or no such server, or it has no model yet.
    """
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/pages", timeout=PATIENCE) as answer:
            found = json.load(answer)
        found["groups"][0]["pages"]
        return found
    except urllib.error.HTTPError as error:
        raise Mistake(f"{url} answers {error.code}: {_reason(error)}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise Mistake(f"{url} is no server of paged-mlx: its /pages has no groups") from error
    except (OSError, ValueError) as error:
        raise Mistake(
            f"nobody serves pages at {url}: {error}. Start one with `paged-mlx serve`"
        ) from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]
    except (KeyError, TypeError, ValueError):
        return str(error.reason)
