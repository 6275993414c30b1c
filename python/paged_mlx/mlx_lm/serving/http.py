"""The HTTP server: mlx-lm's completions, and the pages beside them."""

from __future__ import annotations

import errno
import json
import logging
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import mlx.core as mx
from mlx_lm import server

from paged_mlx.mlx_lm import PromptStore
from paged_mlx.mlx_lm.serving.metrics import Exposition, add_kernels, add_pages
from paged_mlx.mlx_lm.serving.provider import PagedProvider
from paged_mlx.mlx_lm.serving.snapshot import snapshot

log = logging.getLogger("paged_mlx")


class Answer(NamedTuple):
    """What a GET request gets."""

    status: int
    kind: str
    body: str


def as_json(content: Any, status: int = 200) -> Answer:
    return Answer(status, "application/json", json.dumps(content) + "\n")


class Refused(Exception):
    """A request that cannot be answered; the message says why.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Pages:
    """What GET requests are answered from.

    Attributes:
        provider: Has the model in use.
        store: The server's prompts.
        requests: Answers so far by (path, status).
        waiting: Says how many requests nobody has taken up.
    """

    def __init__(self, provider: PagedProvider, store):
        self.provider, self.store = provider, store
        self.requests: Counter[tuple[str, int]] = Counter()
        self.waiting: Callable[[], int] = lambda: 0

    def model(self):
        """The model on pages.

        Raises:
            Refused: There is none yet.
        """
        paged = self.provider.paged
        if paged is None:
            raise Refused(503, "no model is loaded: one is as soon as a request names it")
        return paged

    def metrics(self, query: dict[str, list[str]]) -> Answer:
        out = Exposition()
        paged = self.provider.paged
        out.add(
            "model_loaded", "gauge", "Whether a model is on pages.", [({}, int(paged is not None))]
        )
        if paged is not None:
            add_pages(out, snapshot(paged))
        asked, reused = self.store.tokens_asked, self.store.tokens_reused
        out.add("prompt_tokens_total", "counter", "Tokens of the prompts.", [({}, asked)])
        out.add(
            "prompt_tokens_reused_total", "counter", "Those of them that were in pages already.",
            [({}, reused)],
        )  # fmt: skip
        add_kernels(out)
        out.add(
            "requests_waiting",
            "gauge",
            "Requests that nobody has taken up.",
            [({}, self.waiting())],
        )
        counts = sorted(self.requests.items())
        out.add("http_requests_total", "counter", "Answers by path and status.",
                [({"path": path, "status": str(status)}, n) for (path, status), n in counts])  # fmt: skip
        return Answer(200, "text/plain; version=0.0.4; charset=utf-8", str(out))

    def pages(self, query: dict[str, list[str]]) -> Answer:
        tokens = {
            "prompt_tokens": self.store.tokens_asked,
            "prompt_tokens_reused": self.store.tokens_reused,
        }
        return as_json(snapshot(self.model()) | tokens)

    def map(self, query: dict[str, list[str]]) -> Answer:
        page = (Path(__file__).parent / "map.html").read_text()
        return Answer(200, "text/html; charset=utf-8", page)

    def estimate(self, query: dict[str, list[str]]) -> Answer:
        lengths = numbers(query, "tokens", 1)
        (new,) = numbers(query, "max_new_tokens", 0)[:1]
        paged = self.model()
        with paged.passes.lock:
            nbytes, fits = paged.estimate(lengths, new)
        found = {"tokens": lengths, "max_new_tokens": new, "bytes": nbytes, "fits": fits}
        return as_json(found)


def numbers(query: dict[str, list[str]], name: str, least: int) -> list[int]:
    """Whole numbers of a query.

    Raises:
        Refused: They are missing, or no such numbers.
    """
    words = [word for text in query.get(name, []) for word in text.split(",")]
    try:
        found = [int(word) for word in words]
    except ValueError:
        found = []
    if not found or min(found) < least:
        example = "/estimate?tokens=2000,500&max_new_tokens=200"
        got = ",".join(words) or "nothing"
        raise Refused(400, f"{name} must be whole numbers from {least}, as {example}; got {got}")
    return found


GET: dict[str, Callable[[Pages, dict[str, list[str]]], Answer]] = {
    "/metrics": Pages.metrics,
    "/pages": Pages.pages,
    "/map": Pages.map,
    "/estimate": Pages.estimate,
}
KNOWN = {*GET, "/v1/completions", "/v1/chat/completions", "/chat/completions", "/v1/models", "/health"}  # fmt: skip


class Handler(server.APIHandler):
    """mlx-lm's handler, with the paths of ``GET`` besides."""

    pages: Pages

    def do_GET(self):
        parts = urlsplit(self.path)
        if parts.path not in GET:
            return super().do_GET()
        try:
            answer = GET[parts.path](self.pages, parse_qs(parts.query))
        except Refused as error:
            answer = as_json({"error": str(error)}, error.status)
        body = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(body)))
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code="-", size="-"):
        path = urlsplit(self.path).path
        self.pages.requests[path if path in KNOWN else "other", int(code)] += 1
        if path not in GET:
            super().log_request(code, size)


class PortInUse(Exception):
    """Nobody can listen there; the message says why."""


def listen(host: str, port: int, pages: Pages, generator: Callable[[], Any]) -> ThreadingHTTPServer:
    """A server that listens.

    Args:
        generator: Gives mlx-lm's ResponseGenerator, which need not be there yet.

    Raises:
        PortInUse: It cannot.
    """
    fingerprint = server.get_system_fingerprint()

    class Bound(Handler):
        def __init__(self, *arguments):
            self.pages = pages
            super().__init__(generator(), *arguments, system_fingerprint=fingerprint)

    class Httpd(ThreadingHTTPServer):
        daemon_threads = True

    if not 0 <= port <= 65535:  # getaddrinfo would take what is left over
        raise PortInUse(f"--port must be at most 65535; got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        Httpd.address_family = family
        return Httpd((str(address[0]), int(address[1])), Bound)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} of {host} is in use: choose another with --port"
            ) from error
        raise PortInUse(f"nobody can listen on port {port} of {host}: {error}") from error


def new_store(cli_args) -> Any:
    make: Any = PromptStore
    return make(None, cli_args.prompt_cache_size)


class Server:
    """mlx-lm's server, listening, its models on pages; a context manager.

    Args:
        host, port: Where; port 0: any that is free.
        cli_args: Options of mlx-lm's server.
        enable, enable_draft: Put a model, or a draft, on pages.

    Attributes:
        url: Its address.
        provider: Has the model in use.

    Raises:
        PortInUse: Nobody can listen there; nothing has been loaded.
    """

    def __init__(self, host: str, port: int, cli_args, enable: Callable, enable_draft: Callable):
        store = new_store(cli_args)
        self.provider = PagedProvider(cli_args, enable, enable_draft, store)
        pages = Pages(self.provider, store)
        self._httpd = listen(host, port, pages, lambda: self._generator)
        self.provider.on_failure = lambda: threading.Thread(target=self.end).start()
        self._generator = server.ResponseGenerator(self.provider, store)
        pages.waiting = self._generator.requests.qsize
        self.url = f"http://{host}:{self._httpd.server_port}"

    def run(self) -> None:
        """Answer until ``end`` is called, or ctrl-C."""
        self._httpd.serve_forever()

    def end(self) -> None:
        """Have ``run`` return."""
        self._httpd.shutdown()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error) -> None:
        self._httpd.server_close()
        self._generator.stop_and_join()


def serve(
    host: str, port: int, cli_args, enable: Callable, enable_draft: Callable
) -> Exception | None:
    """Run a ``Server`` until ctrl-C or SIGTERM; arguments as it takes them.

    Returns:
        Why the model of the command line could not be loaded; else None.
    """
    if mx.distributed.init().rank() > 0:
        store = new_store(cli_args)
        provider = PagedProvider(cli_args, enable, enable_draft, store)
        server.ResponseGenerator(provider, store).join()
        return provider.failure
    with Server(host, port, cli_args, enable, enable_draft) as running:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        paths = " ".join(GET)
        print(
            f"serving on {running.url}: POST /v1/chat/completions, GET {paths}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        try:
            running.run()
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):  # MLX aborts if its threads are left
                signal.signal(number, signal.SIG_IGN)
            print("\nstopping, when the pass under way is over", file=sys.stderr, flush=True)
    return running.provider.failure
