"""MLX's own operations in place of the native module, name for name.

Used where there is no native module for the mlx that is installed. ``formulas`` is the file to read:
it says what each operation means. What the native module tells of the machine has one answer here.
"""

from paged_mlx.fallback.checks import attention_geometry  # noqa: F401
from paged_mlx.fallback.handles import Fetches, FetchTables, GatheredKV, source_of  # noqa: F401
from paged_mlx.fallback.operations import (  # noqa: F401
    buffer_copies,
    copy_pages,
    gather_pages,
    merge_states,
    paged_attention,
    pool_memory,
    route_counts,
    seal_pages,
    write_attend,
    write_pages,
)
from paged_mlx.fallback.plan import NativePlan, check_tables  # noqa: F401
from paged_mlx.fallback.traces import is_stale, is_tracer  # noqa: F401


def descriptor(a) -> int:
    return id(a)


def attention_body(rows, head_dim, v_head_dim, dtype, formats=None) -> tuple[str, int]:
    return "gather", rows


def isa() -> str:
    return "MLX's own operations"


def _always(answer):
    return lambda *arguments, **options: answer


data_address = _always(0)  # arrays have no address that can be asked for
is_pending = has_host_launch = set_isa = _always(False)
set_host_launch = set_num_threads = set_plan_thresholds = _always(None)
resized_in_place = _always(None)  # MLX copies pages that become more or fewer
gpu_cores = _always(0)
num_threads = _always(1)  # MLX decides by itself
isa_names, pipeline_limits = _always([]), _always({})
plan_thresholds = _always(({}, False))  # a plan cuts nothing here
