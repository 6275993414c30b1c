"""``paged-mlx tune``: measure the planner's thresholds on this machine.

Decode at several lengths and batches is timed with plans of other thresholds, prompts on pages
and through MLX's attention. What is faster by more than the noise is remembered for this machine
and these versions; later plans use it, and say so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from paged_mlx import fast
from paged_mlx._native import BUILT, _ext
from paged_mlx.attention_plan import AttentionPlan, runs_kernels
from paged_mlx.forward import fresh_prompt
from paged_mlx.machine import thresholds
from paged_mlx.options import AttentionOptions

SECONDS = 50.0
EXAMPLES = """\
examples:
  paged-mlx tune
  paged-mlx tune --dry --json          the figures alone, remembered nowhere
"""
GAIN = 0.97  # of the present time: less is noise
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "gpu": {
        "workers_per_core": (2, 4, 8),
        "least_workers_per_core": (1, 2, 4),
        "min_partition": (16, 32, 64, 128, 256),
        "min_item_cost": (64, 128, 256, 512),
    },
    "cpu": {
        "items_per_worker": (1, 2, 4, 8),
        "min_partition": (64, 128, 256, 512),
        "min_item_cost": (1024, 2048, 4096, 8192),
    },
}
PROMPTS = (64, 256, 512)
Step = Callable[[], mx.array]


@dataclass(frozen=True)
class Workload:
    """The last ``query_len`` tokens of ``batch`` sequences of ``context_len``."""

    context_len: int
    batch: int
    query_len: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16


DECODES = tuple(Workload(n, b) for b, n in ((1, 256), (1, 1024), (1, 8192), (8, 1024)))


@dataclass
class Tuner:
    """Measures one device.

    Args:
        device: ``"gpu"`` or ``"cpu"``.
        clock: Seconds, as ``time.perf_counter``.
        seconds: When no more is begun.
        say: Called with each of ``lines`` as it is found.
    """

    device: str
    dtype: mx.Dtype = mx.float16
    decodes: tuple[Workload, ...] = DECODES
    prompts: tuple[int, ...] = PROMPTS
    clock: Callable[[], float] = time.perf_counter
    seconds: float = SECONDS
    rounds: int = 3
    say: Callable[[str], object] = lambda line: None
    lines: list[str] = field(default_factory=list)
    _made: dict[Workload, list[mx.array]] = field(default_factory=dict)

    def tune(self) -> dict[str, int]:
        """The thresholds that are the fastest here; ``lines`` says how they were found."""
        self._end = self.clock() + self.seconds
        best, _ = _ext.plan_thresholds(self.device == "gpu", self.dtype.size)
        for name, values in CANDIDATES[self.device].items():
            best = self._choose(best, name, values)
        best["sdpa_prompt"] = self._prompt_from(best["sdpa_prompt"])
        return best

    def _note(self, line: str) -> None:
        self.lines.append(line)
        self.say(line)

    def seconds_of_both(self, a: Step, b: Step) -> tuple[float, float]:
        """Median seconds of two steps, taken in turns: a machine that others use drifts."""
        mx.eval(a(), b())
        times: dict[Step, list[float]] = {a: [], b: []}
        for step in (a, b, b, a) * self.rounds:
            begin = self.clock()
            mx.eval(step())
            times[step].append(self.clock() - begin)
            if len(times[b]) > 1 and self.clock() > self._end:
                break
        one, other = (max(1e-9, statistics.median(times[step])) for step in (a, b))
        return one, other

    def _choose(self, best: dict[str, int], name: str, values: tuple[int, ...]) -> dict[str, int]:
        found, least = best, GAIN
        for value in values:
            if value == best[name]:
                continue
            if self.clock() > self._end:
                self._note(f"{name}: no time for {value} and what follows")
                break
            tried = best | {name: value}
            ratio = math.exp(
                statistics.fmean(self._log_ratio(w, best, tried) for w in self.decodes)
            )
            self._note(f"{name} = {value}: {ratio:.2f}x the time of {best[name]}")
            if ratio < least:
                found, least = tried, ratio
        return found

    def _log_ratio(self, work: Workload, present: dict[str, int], tried: dict[str, int]) -> float:
        plans = [self._plan(work, limits) for limits in (present, tried)]
        if np.array_equal(np.array(plans[0].array), np.array(plans[1].array)):
            return 0.0
        one, other = self.seconds_of_both(*(self._step(work, plan) for plan in plans))
        return math.log(other / one)

    def _plan(self, work: Workload, limits: dict[str, int]) -> AttentionPlan:
        pages = -(-work.context_len // work.page_size)
        with thresholds.planned_with(self.device, self.dtype.size, **limits):
            return fast.plan(
                np.arange(pages * work.batch, dtype=np.int32).reshape(work.batch, pages),
                [work.context_len] * work.batch,
                cu_seqlens_q=np.arange(work.batch + 1) * work.query_len,
                num_q_heads=work.num_q_heads,
                num_kv_heads=work.num_kv_heads,
                page_size=work.page_size,
                dtype=self.dtype,
                head_dim=work.head_dim,
                stream=self._stream(),
            )

    def _step(self, work: Workload, plan: AttentionPlan) -> Step:
        q, k, v = self._arrays(work)
        return lambda: fast.paged_attention(q, k, v, plan=plan, stream=self._stream())

    def _arrays(self, work: Workload) -> list[mx.array]:
        """Queries and pages, the same for every plan."""
        if work not in self._made:
            pages = -(-work.context_len // work.page_size) * work.batch
            tokens = work.batch * work.query_len
            shapes: list[tuple[int, ...]] = [(tokens, work.num_q_heads, work.head_dim)]
            shapes += [(pages, work.num_kv_heads, work.page_size, work.head_dim)] * 2
            self._made[work] = [mx.random.normal(shape).astype(self.dtype) for shape in shapes]
            mx.eval(self._made[work])
        return self._made[work]

    def _prompt_from(self, present: int) -> int:
        """The shortest prompt from which MLX's attention is the faster route; 0: none is."""
        least = 0
        for tokens in sorted(self.prompts, reverse=True):
            if self.clock() > self._end:
                self._note(f"prompts: no time for {tokens} tokens and fewer")
                return present
            on_pages, by_mlx = self.seconds_of_both(*self._prompt(tokens))
            self._note(
                f"a fresh prompt of {tokens:,} tokens: MLX's attention takes "
                f"{by_mlx / on_pages:.2f}x the time of pages"
            )
            if by_mlx > GAIN * on_pages:
                break
            least = tokens
        return least

    def _prompt(self, tokens: int) -> tuple[Step, Step]:
        """A fresh prompt on pages, and through MLX's attention."""
        work = replace(self.decodes[0], context_len=tokens, batch=1, query_len=tokens)
        q, k, v = self._arrays(work)
        plan = self._plan(work, {})
        own = [a.swapaxes(1, 2).reshape(-1, *a.shape[1::2])[:tokens] for a in (k, v)]
        options = AttentionOptions()
        return (
            self._step(work, plan),
            lambda: fresh_prompt.attend(q, own[0], own[1], plan, options, stream=self._stream()),
        )

    def _stream(self):
        return mx.cpu if self.device == "cpu" and not _ext.has_host_launch() else None


def main(arguments: list[str] | None = None, tuner: Callable[..., Tuner] = Tuner) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="paged-mlx tune", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", choices=("gpu", "cpu"), help="one device (the default device's)")
    parser.add_argument("--float32", action="store_true", help="for float32 instead of 16 bits")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"when nothing more is begun ({SECONDS:.0f})"
    )
    parser.add_argument("--directory", type=Path, help="where to remember; the user's cache")
    parser.add_argument("--dry", action="store_true", help="measure and print, remember nothing")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    options = parser.parse_args(arguments)
    if not BUILT:
        said = "MLX's own operations run here, which have no thresholds: nothing was measured."
        print(said, file=sys.stderr)
        return 2
    device = options.only or ("gpu" if runs_kernels(None) else "cpu")
    if device == "gpu" and not runs_kernels(None):
        print("There is no GPU here that MLX can use: nothing was measured.", file=sys.stderr)
        return 2
    dtype = mx.float32 if options.float32 else mx.float16

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    one = tuner(device, dtype, seconds=options.seconds, say=say)
    say(f"{thresholds.identity()}\n{device}, elements of {dtype.size} bytes")
    before, _ = _ext.plan_thresholds(device == "gpu", dtype.size)
    found = one.tune()
    if options.json:
        about = {"machine": thresholds.identity(), "device": device, "element_bytes": dtype.size}
        print(json.dumps(about | {"before": before, "thresholds": found}, indent=1))
    else:
        _print_table(found, before)
    if options.dry:
        return 0
    try:
        path = thresholds.remember(device, dtype.size, found, options.directory)
    except OSError as error:
        print(f"Not remembered: {error}", file=sys.stderr)
        return 1
    say(f"\nPlans use these from now on. Remembered in {path}; remove it to forget.")
    return 0


def _print_table(found: dict[str, int], before: dict[str, int]) -> None:
    print()
    for name, value in found.items():
        kept = "as before" if value == before[name] else f"was {before[name]}"
        print(f"{name:<24} {value:>6}   {kept}")
