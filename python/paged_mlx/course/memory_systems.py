"""Traditional against paged K and V: the chapter's comparison, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import mlx.core as mx
import numpy as np

from paged_mlx.attention import paged_attention
from paged_mlx.errors import as_list, check_flag, fail, kind_of, whole_number
from paged_mlx.options import Geometry
from paged_mlx.pages.block_table import pack
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.pool import PagePool

_OP = "benchmark_memory_systems"
SCENARIOS = [
    {"name": "Short sequences", "lengths": [50, 100, 150] * 10},
    {"name": "Mixed lengths", "lengths": [100, 500, 1000, 2000] * 8},
    {"name": "Long sequences", "lengths": [1500, 2000, 2500] * 6},
]


@dataclass(frozen=True)
class MemorySystems:
    """One scenario's result: seconds of one decode step, bytes of K and V of one layer."""

    name: str
    traditional_seconds: float
    paged_seconds: float
    traditional_bytes: int
    paged_bytes: int

    @property
    def speedup(self) -> float:
        return self.traditional_seconds / self.paged_seconds


class DecodeStep:
    """One decode step of one layer for a batch, both ways, on the same K and V.

    Args:
        lengths: Context of each sequence.
        num_q_heads, num_kv_heads, head_dim, page_size, dtype: Geometry.
        seed: Seed of the random q, K and V.
    """

    def __init__(
        self,
        lengths: list[int],
        num_q_heads: int = 32,
        num_kv_heads: int = 8,
        head_dim: int = 128,
        page_size: int = 16,
        dtype: mx.Dtype = mx.float16,
        seed: int = 0,
    ):
        seed = whole_number(_OP, "seed", seed)
        num_q_heads = whole_number(_OP, "num_q_heads", num_q_heads, 1)
        num_kv_heads = whole_number(_OP, "num_kv_heads", num_kv_heads, 1)
        page_size = whole_number(_OP, "page_size", page_size, 1)
        Geometry(num_q_heads, num_kv_heads, page_size, head_dim, head_dim, dtype).check(_OP)
        self.lengths = lengths = _checked_lengths("lengths", lengths)
        rng = np.random.default_rng(seed)
        self.head_dim = head_dim
        self.q = mx.array(rng.standard_normal((len(lengths), num_q_heads, head_dim))).astype(dtype)
        shape = (num_kv_heads, head_dim)
        kv = [
            [
                mx.array(rng.standard_normal((n, *shape)).astype(np.float32)).astype(dtype)
                for _ in "kv"
            ]
            for n in lengths
        ]
        self._fill_contiguous(kv, shape, dtype)
        self._fill_pages(kv, shape, page_size, dtype)
        mx.eval(self.q, self.k, self.v, self.mask, self.pool.state)

    def _fill_contiguous(self, kv, shape, dtype):
        longest = max(self.lengths)
        self.k, self.v = (
            mx.stack(
                [mx.pad(pair[i], ((0, longest - pair[i].shape[0]), (0, 0), (0, 0))) for pair in kv]
            )
            .astype(dtype)
            .swapaxes(1, 2)
            for i in range(2)
        )
        self.k, self.v = mx.contiguous(self.k), mx.contiguous(self.v)
        visible = mx.arange(longest) < mx.array(self.lengths)[:, None]
        self.mask = visible[:, None, None, :]

    def _fill_pages(self, kv, shape, page_size, dtype):
        num_pages = sum(-(-n // page_size) for n in self.lengths)
        self.allocator = PageAllocator(num_pages, page_size)
        self.pool = PagePool(
            1, num_pages, page_size, shape[0], self.head_dim, dtype, allocator=self.allocator
        )
        self.tables = []
        for n, (k, v) in zip(self.lengths, kv):
            table = PageTable(page_size)
            self.pool.write(0, k, v, table.append_tokens(n, self.allocator).slots)
            self.tables.append(table)

    def traditional(self) -> mx.array:
        """Contiguous K and V padded to the longest sequence, and a mask."""
        out = mx.fast.scaled_dot_product_attention(
            self.q[:, :, None], self.k, self.v, scale=self.head_dim**-0.5, mask=self.mask
        )
        return out[:, :, 0]

    def naive_gather(self) -> mx.array:
        """K and V gathered from the pages first, then as the traditional way."""
        k, v = self.pool[0].gather(*self._packed())
        out = mx.fast.scaled_dot_product_attention(
            self.q[:, :, None], k, v, scale=self.head_dim**-0.5, mask=self.mask
        )
        return out[:, :, 0]

    def paged(self) -> mx.array:
        """K and V read through the block table."""
        return paged_attention(self.q, self.tables, self.pool[0])

    def _packed(self):
        tables = pack(self.tables)
        return tables.block_tables, tables.context_lens


def benchmark_memory_systems(
    scenarios: list[dict] = SCENARIOS, repeats: int = 3, *, show: bool = True, **geometry
) -> list[MemorySystems]:
    """Compare a decode step on contiguous and on paged K and V.

    Args:
        scenarios: ``{"name": ..., "lengths": [...]}`` each.
        repeats: Steps of each kind, in turn; the median counts.
        show: Print them, on a CPU with a line that says that the speed-ups are not those of a GPU.
        geometry: Sizes of ``DecodeStep``, such as ``head_dim=64``.

    Returns:
        One result for each scenario.

    Raises:
        ValueError: ``repeats``, a scenario or a size is wrong; the message says why.
    """
    results = []
    whole_number(_OP, "repeats", repeats, 1)
    show = check_flag(_OP, "show", show)
    unknown = geometry.keys() - signature(DecodeStep).parameters.keys()
    if unknown:
        fail(_OP, "geometry must be sizes of DecodeStep", sorted(unknown))
    scenarios = as_list(_OP, "scenarios", scenarios, "scenarios")
    for scenario in scenarios:
        if not isinstance(scenario, dict) or not {"name", "lengths"} <= scenario.keys():
            fail(_OP, "scenarios must have a name and lengths", kind_of(scenario))
        _checked_lengths(f"lengths of {scenario['name']!r}", scenario["lengths"])
    for scenario in scenarios:
        step = DecodeStep(scenario["lengths"], **geometry)
        _check(step)
        seconds = _alternate([step.traditional, step.paged], repeats)
        traditional_bytes = step.k.nbytes + step.v.nbytes
        result = MemorySystems(
            scenario["name"], seconds[0], seconds[1], traditional_bytes, step.pool.nbytes
        )
        results.append(result)
        if show:
            print(f"{result.name}:")
            print(f"  Traditional: {result.traditional_seconds:.3f}s")
            print(f"  Paged: {result.paged_seconds:.3f}s")
            print(f"  Speedup: {result.speedup:.2f}x", flush=True)
    if show and mx.default_device() == mx.cpu:
        print("MLX's own attention is slow on the CPU: these speed-ups are not those of a GPU.")
    return results


def _checked_lengths(name: str, lengths: list[int]) -> list[int]:
    checked = [whole_number(_OP, name, n, 1) for n in as_list(_OP, name, lengths, "whole numbers")]
    if not checked:
        fail(_OP, f"{name} must not be empty", "none")
    return checked


def _check(step: DecodeStep) -> None:
    """Both ways must give the same attention before either is timed."""
    error = mx.abs(step.paged().astype(mx.float32) - step.traditional().astype(mx.float32)).max()
    if not float(error) < 0.05:
        raise AssertionError(f"paged and traditional attention differ by {error.item()}")


def _alternate(steps: list[Callable], repeats: int) -> list[float]:
    samples: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for i in order:
            start = time.perf_counter()
            mx.eval(steps[i]())
            samples[i].append(time.perf_counter() - start)
    return [float(np.median(s)) for s in samples]
