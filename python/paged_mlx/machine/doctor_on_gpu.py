"""Checks and times that need a GPU, run where there is one: ``python -m paged_mlx doctor``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.testing import Backend, Case, Check, run_suite


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``right``: None where nothing is right or wrong."""

    name: str
    result: str
    right: bool | None = None


#: The ten things to look at on a Mac that nobody has tried, and what does each.
TO_LOOK_AT = (
    ("every kernel against the oracle", "doctor; best with MTL_SHADER_VALIDATION=1"),
    ("a prompt of 16k tokens", "doctor"),
    ("most threads of each body: fewer than 1,024 tell registers", "doctor"),
    ("decode and prompts beside MLX's attention", "doctor"),
    ("thresholds of the planner", "python -m paged_mlx tune"),
    ("prompts behind long contexts", "make bench in a checkout"),
    ("the first token, cold and warm", "doctor counts what is compiled; time it after removing "
     "~/Library/Caches/paged_mlx"),
    ("the graph group in a loop", "doctor"),
    ("occupancy, spilt registers, instruction cache", "Instruments, Metal counters, by hand"),
    ("the tests", "make test in a checkout"),
)  # fmt: skip


def trials(
    backend: Backend,
    *,
    decodes: tuple[tuple[int, int], ...] = ((1, 256), (1, 1024), (1, 8192), (1, 32768), (8, 1024)),
    prompts: tuple[int, ...] = (512, 4096),
    long_prompt: int = 16384,
    rounds: int = 50,
    head_dim: int = 128,
) -> Iterator[Finding]:
    """Everything, one line after the other.

    Args:
        backend: The GPU.
        decodes: (batch, context_len) of decode steps.
        prompts: Tokens of fresh prompts.
        long_prompt: Tokens of the one that is long.
        rounds: Programs of the graph group.
        head_dim: Of the steps that are timed.
    """
    yield _long_prompt(long_prompt, head_dim, backend.stream)
    yield _graph(backend, rounds)
    for batch, context_len in decodes:
        yield _beside_mlx(batch, context_len, 1, head_dim, backend.stream)
    for tokens in prompts:
        yield _beside_mlx(1, tokens, tokens, head_dim, backend.stream)
    yield from _limits()


def _limits() -> Iterator[Finding]:
    for name, threads in sorted(_ext.pipeline_limits().items()):
        if "attend" in name:
            yield Finding(f"most threads of {name}", str(threads))


def _graph(backend: Backend, rounds: int) -> Finding:
    case = Case(dtype="float16", num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=4)
    checks = [Check("graph", case.replace(seed=i), "graph") for i in range(rounds)]
    cell = run_suite(checks, [backend], shrink_seconds=0).cell("graph", backend.name)
    result = f"{cell.cases - cell.failed} of {cell.cases} programs right"
    return Finding("the graph group in a loop", result, cell.failed == 0)


def _pages(batch: int, context_len: int, tokens: int, head_dim: int, stream) -> tuple:
    """A step's arrays and plan: 8 query heads of 2 KV heads, pages of 16."""
    pages = -(-context_len // 16)
    rng = np.random.default_rng(context_len)

    def random(*shape):
        return mx.array(rng.standard_normal(shape, np.float32)).astype(mx.float16)

    q = random(batch * tokens, 8, head_dim)
    k, v = (random(batch * pages, 2, 16, head_dim) for _ in range(2))
    plan = fast.plan(
        np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
        [context_len] * batch,
        cu_seqlens_q=np.arange(batch + 1) * tokens,
        num_q_heads=8,
        num_kv_heads=2,
        page_size=16,
        head_dim=head_dim,
        stream=stream,
    )
    return q, k, v, plan


def _long_prompt(tokens: int, head_dim: int, stream) -> Finding:
    """A whole prompt in one call; three of its rows against NumPy."""
    q, k, v, plan = _pages(1, tokens, tokens, head_dim, stream)
    out = np.array(fast.paged_attention(q, k, v, plan=plan, stream=stream).astype(mx.float32))
    q, k, v = (np.array(a.astype(mx.float32), np.float64) for a in (q, k, v))
    keys, values = (a.swapaxes(1, 2).reshape(-1, 2, head_dim) for a in (k, v))
    worst = 0.0
    for row in (0, tokens // 2, tokens - 1):
        for head in range(8):
            scores = keys[: row + 1, head // 4] @ q[row, head] * head_dim**-0.5
            weights = np.exp(scores - scores.max())
            exact = weights @ values[: row + 1, head // 4] / weights.sum()
            worst = max(worst, float(np.abs(out[row, head] - exact).max()))
    return Finding(f"a prompt of {tokens:,} tokens", f"largest error {worst:.1e}", worst < 4e-3)


def _beside_mlx(batch: int, context_len: int, tokens: int, head_dim: int, stream) -> Finding:
    q, k, v, plan = _pages(batch, context_len, tokens, head_dim, stream)
    query = q.reshape(batch, tokens, 8, head_dim).swapaxes(1, 2)
    own = (
        a.reshape(batch, -1, 2, 16, head_dim).swapaxes(1, 2).reshape(batch, 2, -1, head_dim)
        for a in (k, v)
    )
    keys, values = (mx.contiguous(a[:, :, :context_len]) for a in own)
    mx.eval(query, keys, values)
    ours, theirs = _in_turns(
        lambda: fast.paged_attention(q, k, v, plan=plan, stream=stream),
        lambda: mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=head_dim**-0.5, mask="causal", stream=stream
        ),
    )
    kind = "decode of" if tokens == 1 else "a prompt of"
    read = batch * context_len * 2 * 2 * head_dim * 2
    return Finding(
        f"{kind} {batch} x {context_len:,}",
        f"{ours * 1e6:,.0f} us, {read / ours / 1e9:,.0f} GB/s; MLX's attention {theirs * 1e6:,.0f} us",
    )


def _in_turns(*steps: Callable[[], mx.array]) -> list[float]:
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(7):
        for i, step in enumerate(steps):
            begin = time.perf_counter()
            mx.eval(step())
            times[i].append(time.perf_counter() - begin)
    return [statistics.median(of_one[1:]) for of_one in times]
