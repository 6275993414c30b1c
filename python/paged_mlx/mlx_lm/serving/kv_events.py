"""Publishes what prefix caches store and remove, as vLLM does: ZeroMQ and msgpack."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from paged_mlx.prefix.vllm_events import VllmEvents

CAPACITY = 100_000  # events that are kept until they are sent
EVERY = 0.05  # seconds
TOPIC = "kv-events"


class KVEventPublisher:
    """A thread that publishes batches of events, each with a number, from ``start`` to ``stop``.

    A message has three parts: topic, number (8 bytes, big-endian), and ``[time, events]``.

    Args:
        endpoint: Of a ZeroMQ socket to bind, as ``tcp://*:5557``.
        model: Gives the ``PagedModel`` in use; None: there is none.
        form: Of the events, ``"map"`` or ``"array"``.
        topic: That subscribers ask for.

    Raises:
        ImportError: pyzmq or msgspec is missing.
        OSError: Nobody can bind the endpoint.
    """

    def __init__(
        self, endpoint: str, model: Callable[[], Any], form: str = "map", topic: str = TOPIC
    ):
        import zmq
        from msgspec import msgpack

        self._encode = msgpack.encode
        self._model, self._form, self._topic = model, form, topic.encode()
        self._socket: Any = zmq.Context.instance().socket(zmq.PUB)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise OSError(f"events cannot be published on {endpoint}: {error}") from error
        self.endpoint: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        self._converters: dict[int, tuple[Any, VllmEvents]] = {}  # by the id of a cache
        self._number = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what there is, and close the socket."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close(0)

    def _run(self) -> None:
        while not self._stopped.wait(EVERY):
            self._publish()
        self._publish()

    def _publish(self) -> None:
        paged = self._model()
        if paged is None or paged.prefixes is None:
            return
        events = []
        with paged.passes.lock:
            for i, cache in enumerate(paged.prefixes.caches.values()):
                events += self._converter(cache, i, len(paged.prefixes.caches)).convert(
                    cache.take_events()
                )
        if events:
            payload = self._encode([time.time(), events])
            self._socket.send_multipart([self._topic, self._number.to_bytes(8, "big"), payload])
            self._number += 1

    def _converter(self, cache, i: int, num_groups: int) -> VllmEvents:
        if id(cache) not in self._converters:
            group = i if num_groups > 1 else None
            self._converters = {} if i == 0 else self._converters  # of another model
            events = VllmEvents(cache.page_size, group=group, form=self._form)
            self._converters[id(cache)] = cache, events
        return self._converters[id(cache)][1]
