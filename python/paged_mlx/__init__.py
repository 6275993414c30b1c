"""Paged attention for MLX: K and V in pages, read directly through a block table.

A step is planned once and used by every layer:

    plan = pool.plan(tables, num_q_heads=32)
    for layer in range(num_layers):
        pool[layer].write(k, v, slots)
        out = pool[layer].attend(q, plan)

``paged_attention`` takes tables instead of a plan, ``fast`` has the operations on arrays, and
``enable`` puts a model of mlx-lm on pages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from paged_mlx._native import backend  # noqa: E402, I001  says first what MLX lacks
from paged_mlx import fast  # noqa: E402
from paged_mlx.attention import paged_attention  # noqa: E402
from paged_mlx.attention_plan import AttentionPlan  # noqa: E402
from paged_mlx.errors import OutOfPages, PageError  # noqa: E402
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
from paged_mlx.pool import PageBlock, PagePool, PoolLayer  # noqa: E402
from paged_mlx.prefix.cache import PrefixCache  # noqa: E402

if TYPE_CHECKING:
    from paged_mlx.course.memory_report import (
        analyze_memory_efficiency as analyze_memory_efficiency,
    )
    from paged_mlx.course.memory_systems import benchmark_memory_systems as benchmark_memory_systems
    from paged_mlx.errors import DoubleFree as DoubleFree
    from paged_mlx.errors import UnknownPage as UnknownPage
    from paged_mlx.errors import UseAfterFree as UseAfterFree
    from paged_mlx.machine.memory import memory_limit as memory_limit
    from paged_mlx.machine.memory import pages_within as pages_within
    from paged_mlx.machine.threads import num_threads as num_threads
    from paged_mlx.machine.threads import set_num_threads as set_num_threads
    from paged_mlx.mlx_lm import enable, explain  # type: ignore[no-redef]
    from paged_mlx.pages.append import Appended as Appended
    from paged_mlx.pages.block_table import BlockTable as BlockTable
    from paged_mlx.pages.block_table import PackedTables as PackedTables
    from paged_mlx.pages.block_table import pack as pack
    from paged_mlx.pages.canary import Canary as Canary
    from paged_mlx.pages.canary import CorruptPage as CorruptPage
    from paged_mlx.pool import SlotMapping as SlotMapping
    from paged_mlx.prefix.hash import ExtraKey as ExtraKey

__all__ = [
    "AttentionPlan",
    "BuddyPageAllocator",
    "FIFOPageAllocator",
    "LRUPageAllocator",
    "OutOfPages",
    "PageAllocator",
    "PageBlock",
    "PageError",
    "PagePool",
    "PageTable",
    "PageTableEntry",
    "PoolLayer",
    "PrefixCache",
    "append_batch",
    "backend",
    "copy_on_write",
    "enable",
    "explain",
    "fast",
    "paged_attention",
    "share_prefix",
]

# Imported when they are asked for: what needs mlx-lm, the course chapter's reports, and names
# that few programs use.
_LATER = {
    "Appended": "pages.append",
    "BlockTable": "pages.block_table",
    "Canary": "pages.canary",
    "CorruptPage": "pages.canary",
    "DoubleFree": "errors",
    "ExtraKey": "prefix.hash",
    "PackedTables": "pages.block_table",
    "SlotMapping": "pool",
    "UnknownPage": "errors",
    "UseAfterFree": "errors",
    "analyze_memory_efficiency": "course.memory_report",
    "benchmark_memory_systems": "course.memory_systems",
    "enable": "mlx_lm",
    "explain": "mlx_lm",
    "memory_limit": "machine.memory",
    "num_threads": "machine.threads",
    "pack": "pages.block_table",
    "pages_within": "machine.memory",
    "set_num_threads": "machine.threads",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'paged_mlx' has no attribute {name!r}")
    return getattr(import_module(f"paged_mlx.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
