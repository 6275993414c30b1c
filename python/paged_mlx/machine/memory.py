"""The memory that pools may take, and the pages that fit in it."""

import os
from pathlib import Path

import mlx.core as mx

from paged_mlx.errors import fail, whole_number
from paged_mlx.formats.page_format import PageFormats, page_nbytes
from paged_mlx.options import Geometry, check_number

SHARE = 0.85
MOST = 2**62
MAX_BYTES = 2**63 - 1
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def memory_limit(share: float = SHARE) -> int:
    """Return the bytes that all arrays of MLX may take and leave the machine usable.

    Args:
        share: Share of the working set that MLX recommends for the GPU; without a GPU, of the
            memory of the machine or of the process's control group. Never more than
            ``mx.set_memory_limit`` allows.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    check_number("memory_limit", "share", share)
    if not 0 < share <= 1:
        fail("memory_limit", "share must be in (0, 1]", share)
    return min(int(share * _usable()), _limit_of_mlx())


def _limit_of_mlx() -> int:
    if hasattr(mx, "get_memory_limit"):
        return mx.get_memory_limit()
    before = mx.set_memory_limit(MOST)  # releases before 0.32 tell it only to who sets another
    mx.set_memory_limit(before)
    return before


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
    k_format: str | None = None,
    v_format: str | None = None,
) -> int:
    """Return how many pages of a pool of these sizes fit in ``nbytes``; may be 0.

    Open pages, of ``k_format="q4"``, come on top: one for each sequence.

    Raises:
        ValueError: A size or dtype is wrong, or pages of these sizes cannot have the formats.
    """
    op, formats = "pages_within", PageFormats(k_format, v_format)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    heads = whole_number(op, "num_kv_heads", num_kv_heads, 1)
    geometry = Geometry(heads, heads, page_size, head_dim, v_head_dim, dtype, formats)
    geometry.check(op)
    num_layers = whole_number(op, "num_layers", num_layers, 1)
    nbytes = whole_number(op, "nbytes", nbytes, -MAX_BYTES, MAX_BYTES)
    return max(0, nbytes) // (num_layers * page_nbytes(formats, *geometry.page_sizes))
