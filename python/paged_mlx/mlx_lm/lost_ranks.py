"""Notices that another rank is gone, where MLX would wait for ever.

When a connection of MLX's ring closes, the collective that is under way fails, and whoever waits
for it is told. A pass has many: those behind it wait for ever, in a thread that nothing can
interrupt. So a watcher looks at the ring's connections. When one is closed, and what this rank has
begun does not come to its end, the process ends, with a message.
"""

import json
import logging
import os
import socket
import stat
import threading
import time
import weakref

import mlx.core as mx

log = logging.getLogger("paged_mlx")

LOOK = 1.0  # seconds between two looks at the connections
GRACE = 60.0  # seconds that work begun before a rank was lost may take
KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
UNANSWERED = {"TCP_USER_TIMEOUT": 60_000, "TCP_RXT_CONNDROPTIME": 60}  # each where it exists
MOST_FILES = 4096  # descriptors that are looked at


def watch(ranks) -> None:
    """Watch the connections of this process while ``ranks`` is there; other backends of
    ``mx.distributed`` than the ring have none that can be seen."""
    connections = ring_connections()
    for each in connections:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {**KEEP_ALIVE, **UNANSWERED}.items():
            if hasattr(socket, name):
                each.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if connections:
        watching = connections, weakref.ref(ranks)
        threading.Thread(target=_watch, args=watching, daemon=True, name="lost ranks").start()


def ring_connections() -> list[socket.socket]:
    """The connections of MLX's ring, found by the ports in the host file."""
    try:
        with open(os.environ["MLX_HOSTFILE"]) as file:
            hosts = json.load(file)
    except (KeyError, OSError, ValueError):
        return []
    ports = {int(address.rsplit(":", 1)[1]) for host in hosts for address in host}
    found = []
    for number in [number for number in range(MOST_FILES) if _is_socket(number)]:
        connection = socket.socket(fileno=os.dup(number))
        if _ports(connection) & ports:
            found.append(connection)
        else:
            connection.close()
    return found


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False


def _ports(connection: socket.socket) -> set[int]:
    """Of both ends of a TCP connection; none of other sockets."""
    try:
        return {connection.getsockname()[1], connection.getpeername()[1]}
    except (OSError, IndexError):
        return set()


def is_closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _watch(connections: list, reference) -> None:
    while not any(map(is_closed, connections)):
        time.sleep(LOOK)
        if reference() is None:
            return
    while (ranks := reference()) is not None:
        ended = threading.Event()
        waiting = ranks.stream, ended
        threading.Thread(target=_wait_for_work, args=waiting, daemon=True).start()
        if not ended.wait(GRACE):
            log.critical(
                "rank %d of %d ends: another rank is gone, and a pass waits for it for ever",
                *ranks.place,
            )
            logging.shutdown()
            os._exit(os.EX_TEMPFAIL)
        del ranks
        time.sleep(LOOK)


def _wait_for_work(stream: mx.Stream | None, ended: threading.Event) -> None:
    """Wait until all that was asked of a stream is done, or has failed."""
    try:
        if stream is not None:
            mx.synchronize(stream)
    except RuntimeError as error:
        log.error("another rank is gone: %s", error)  # whoever waited has been told
    ended.set()
