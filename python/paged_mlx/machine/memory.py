"""How much memory pools may take, and how many pages that is."""

import os
from pathlib import Path

import mlx.core as mx

from paged_mlx.errors import fail

SHARE = 0.85
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def memory_limit(share: float = SHARE) -> int:
    """Return the bytes that all arrays of MLX may take and leave the machine usable.

    Args:
        share: Share of the working set that MLX recommends for the GPU; without a GPU, of the
            memory of the machine or of the process's control group.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        fail("memory_limit", "share must be in (0, 1]", share)
    return int(share * _usable())


def _usable() -> int:
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_CONTROL_GROUP.read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return memory


def bytes_per_token(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    v_head_dim: int | None = None,
) -> int:
    """Return the bytes of one token's K and V in all layers."""
    return (
        num_layers
        * num_kv_heads
        * (head_dim + (head_dim if v_head_dim is None else v_head_dim))
        * itemsize
    )


def pages_within(
    nbytes: int,
    *,
    num_layers: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: mx.Dtype = mx.float16,
    v_head_dim: int | None = None,
) -> int:
    """Return how many pages of a pool of these sizes fit in ``nbytes``; may be 0."""
    token = bytes_per_token(num_layers, num_kv_heads, head_dim, dtype.size, v_head_dim)
    return max(0, int(nbytes)) // (page_size * token)
