"""Paged attention for MLX: K and V in pages, read directly through a block table."""

import mlx.core as mx

from paged_mlx._native import check_versions

check_versions(mx.__version__)

from paged_mlx import fast  # noqa: E402
from paged_mlx.attention import paged_attention  # noqa: E402
from paged_mlx.attention_plan import AttentionPlan  # noqa: E402
from paged_mlx.course.memory_report import analyze_memory_efficiency  # noqa: E402
from paged_mlx.course.memory_systems import benchmark_memory_systems  # noqa: E402
from paged_mlx.device_memory import memory_limit, pages_within  # noqa: E402
from paged_mlx.errors import (  # noqa: E402
    DoubleFree,
    OutOfPages,
    PageError,
    UnknownPage,
    UseAfterFree,
)
from paged_mlx.pages.append import Appended  # noqa: E402
from paged_mlx.pages.block_table import BlockTable, PackedTables, pack  # noqa: E402
from paged_mlx.pages.canary import Canary, CorruptPage  # noqa: E402
from paged_mlx.pages.page_map import PageTableEntry  # noqa: E402
from paged_mlx.pages.policies import (  # noqa: E402
    BuddyPageAllocator,
    FIFOPageAllocator,
    LRUPageAllocator,
    PageAllocator,
)
from paged_mlx.pages.table import (  # noqa: E402
    PageTable,
    append_batch,
    copy_on_write,
    share_prefix,
)
from paged_mlx.pool import PageBlock, PagePool  # noqa: E402
from paged_mlx.prefix.cache import PrefixCache  # noqa: E402
from paged_mlx.prefix.hash import ExtraKey  # noqa: E402
from paged_mlx.threads import num_threads, set_num_threads  # noqa: E402

__version__ = "0.1.0"


def __getattr__(name):
    # mlx-lm is optional: its adapter is imported when it is asked for.
    if name in ("enable", "explain"):
        from paged_mlx import mlx_lm

        return getattr(mlx_lm, name)
    raise AttributeError(f"module 'paged_mlx' has no attribute {name!r}")


__all__ = [
    "Appended",
    "AttentionPlan",
    "BlockTable",
    "BuddyPageAllocator",
    "Canary",
    "CorruptPage",
    "DoubleFree",
    "ExtraKey",
    "FIFOPageAllocator",
    "LRUPageAllocator",
    "OutOfPages",
    "PackedTables",
    "PageAllocator",
    "PageBlock",
    "PageError",
    "PagePool",
    "PageTable",
    "PageTableEntry",
    "PrefixCache",
    "UnknownPage",
    "UseAfterFree",
    "analyze_memory_efficiency",
    "append_batch",
    "benchmark_memory_systems",
    "copy_on_write",
    "enable",
    "explain",
    "fast",
    "memory_limit",
    "num_threads",
    "pack",
    "paged_attention",
    "pages_within",
    "set_num_threads",
    "share_prefix",
]
