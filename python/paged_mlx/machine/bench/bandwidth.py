"""The highest bandwidth of reading memory, with nothing else done."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from paged_mlx.machine.threads import num_threads

NBYTES = 256_000_000  # more than caches hold
ROUNDS = 5


def read_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second of the default device, on a CPU with the threads of attention; the best of a few runs."""
    if mx.default_device() == mx.gpu:
        whole = mx.ones(NBYTES // 4, mx.int32)
        mx.eval(whole)
        return _best(lambda: mx.eval(mx.max(whole)), clock)
    parts = np.array_split(np.ones(NBYTES // 4, np.int32), num_threads())
    with ThreadPoolExecutor(len(parts)) as threads:
        return _best(lambda: list(threads.map(np.max, parts)), clock)


def _best(read: Callable[[], object], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):  # the first warms up
        begin = clock()
        read()
        seconds.append(clock() - begin)
    return NBYTES / min(seconds[1:])
