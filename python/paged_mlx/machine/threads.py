"""Threads of the CPU backend."""

from paged_mlx._native import _ext
from paged_mlx.errors import whole_number

MOST = 1024


def num_threads() -> int:
    """Threads that attention on the CPU may use, the stream's own included.

    Default: the physical cores that the process may use, by its CPU affinity and the quotas of
    its cgroups. A short step uses fewer.
    """
    return _ext.num_threads()


def set_num_threads(n: int) -> None:
    """Let attention on the CPU use ``n`` threads from now on; results do not depend on it.

    More than 1024 are 1024. Plans made from now on are cut for as many workers.

    Raises:
        ValueError: ``n`` is no whole number of at least 1.
    """
    _ext.set_num_threads(min(whole_number("set_num_threads", "n", n, minimum=1), MOST))
