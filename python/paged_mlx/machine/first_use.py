"""The first time a kernel variant runs on a GPU, it is compared with the oracle.

A proof is a small problem of the same variant, poisoned where nothing may be read: it takes
milliseconds, needs none of the user's data, and its verdict is remembered on disk for this
GPU, system, mlx and native module. An operation whose kernels are wrong, or do not compile,
runs on the CPU backend instead, and says so.
"""

import hashlib
import logging
import platform
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx._native import BUILT, _ext
from paged_mlx.formats.page_format import PageFormats, open_arrays, page_arrays
from paged_mlx.formats.stored import stored
from paged_mlx.machine.cache import cache_directory, machine_file, read_dict, write_dict
from paged_mlx.options import AttentionOptions, OptionKinds
from paged_mlx.reference import moves
from paged_mlx.reference.case import Case, with_options
from paged_mlx.reference.dtypes import decode, encode
from paged_mlx.reference.problem import Problem
from paged_mlx.reference.yardstick import Verdict

#: Bound of a proof, in bounds of the conformance suite: it looks for wrong pages, not for ulps.
COARSE = 4.0

Known = dict[tuple, object]  # kinds of calls, and the guard that has proven them

_log = logging.getLogger("paged_mlx")
_thread = threading.local()


@dataclass(frozen=True)
class Variant:
    """What decides which kernel text runs. ``rows``: of a body of attention, per KV head."""

    op: str
    dtype: str
    head_dim: int
    v_head_dim: int
    page_size: int = 16
    rows: int = 1
    merged: bool = False
    window: bool = False
    ragged: bool = False
    options: OptionKinds = OptionKinds()
    formats: PageFormats = PageFormats()


class Guard:
    """Lets operations run on one device once their kernels are proven there.

    Args:
        identity: The GPU and whatever else makes a verdict stale.
        device: Where the kernels run.
        fallback: Stream or device that runs what is not right there.
        directory: Where verdicts are remembered. None: the user's cache.
    """

    def __init__(self, identity: str, device, fallback, directory: Path | None = None):
        self.identity = identity
        self.device = device
        self.fallback = fallback
        self._calls: dict[tuple, bool] = {}
        self._verdicts: dict[str, bool] | None = None
        self._path = machine_file(directory or cache_directory("first_use"), identity)
        self._lock = threading.RLock()

    def applies(self, stream) -> bool:
        """Whether operations on ``stream`` are to be proven."""
        if getattr(_thread, "unchecked", False):
            return False
        stream = mx.default_device() if stream is None else stream
        if not isinstance(stream, mx.Stream):
            return stream == self.device
        spared = isinstance(self.fallback, mx.Stream) and stream == self.fallback
        return stream.device == self.device and not spared

    def stream(
        self,
        key: tuple,
        variants: Callable[[], Iterable[Variant]],
        stream,
        known: Known | None = None,
    ):
        """Where a call runs: ``stream`` if its kernels are right, else the fallback.

        Args:
            key: Names the kind of call: the operation, the kind, the geometry.
            variants: The variants that such a call may launch.
            stream: Where it is to run.
            known: Is told of a kind whose kernels are right.
        """
        if not self.applies(stream):
            return stream
        right = self._calls.get(key)
        if right is None:
            with self._lock:
                wrong = [v for v in variants() if not self._is_right(v, stream)]
                right = self._calls[key] = not wrong
            if wrong:
                _tell(wrong[0], self.identity)
        if right and known is not None:
            known[key[:2]] = self
        return stream if right else self.fallback

    def _is_right(self, variant: Variant, stream) -> bool:
        if self._verdicts is None:
            self._verdicts = {
                n: True for n, right in read_dict(self._path).items() if right is True
            }
        name = repr(variant)
        if name not in self._verdicts:
            where = self.device if stream is None else stream
            # Twice: what passes on the second try was the moment's, not the kernel's.
            self._verdicts[name] = any(prove(variant, where) for _ in range(2))
            if self._verdicts[name]:
                self._remember(name)
        return self._verdicts[name]

    def _remember(self, name: str) -> None:
        """Add a good verdict; what another process loses by doing the same is proven again.

        A bad one is never written: it may be the moment's, and the next process asks again.
        """
        try:
            write_dict(self._path, read_dict(self._path) | {name: True})
        except OSError as error:
            _log.info("[first_use] the verdict on %s is not remembered: %s", name, error)


def prove(variant: Variant, stream) -> bool:
    """Whether a variant is right on ``stream``: its pages are, the last bits may be off."""
    try:
        return _PROOFS[variant.op](proof_case(variant), variant, stream)
    except Exception as error:  # a kernel that does not compile; out of memory
        _log.error("[first_use] %s raised %s", variant, error)
        return False


def proof_case(variant: Variant) -> Case:
    """The problem that a variant is proven with: its rows are tokens times query heads."""
    gqa_factor = min(2, variant.rows)
    tokens = max(1, variant.rows // gqa_factor)
    page_size = variant.page_size
    context_len = 2 * max(page_size, 64) + 5
    return Case(
        dtype=variant.dtype,
        num_q_heads=2 * gqa_factor,
        num_kv_heads=2,
        head_dim=variant.head_dim,
        v_head_dim=variant.v_head_dim,
        page_size=page_size,
        sequences=((tokens, context_len + tokens), (tokens, page_size + tokens)),
        sliding_window=page_size + 3 if variant.window else None,
        ragged=variant.ragged,
        k_format=variant.formats.k,
        v_format=variant.formats.v,
        **with_options(*variant.options),
    )


def _prove_attention(case: Case, variant: Variant, stream) -> bool:
    problem = case.build()
    pages = _layer_of(problem)
    num_sealed, told = len(problem.k_pages), variant.formats.told
    num_open = pages[-1].shape[0] if variant.formats.have_open_pages else 0
    plan = _ext.NativePlan(
        op="first_use",
        block_tables=problem.block_tables,
        context_lens=problem.context_lens,
        cu_seqlens_q=problem.cu_seqlens_q,
        page_starts=problem.page_starts,
        page_lens=problem.page_lens,
        num_pages=num_sealed + num_open,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        page_size=case.page_size,
        causal=problem.causal,
        sliding_window=problem.sliding_window or 0,
        dtype=_DTYPES[case.dtype],
        head_dim=case.head_dim,
        v_head_dim=case.value_dim,
        share_prefixes=True,
        fixed_partition=64 if variant.merged else 0,
        workers=0,
        kernels=True,
        num_sealed_pages=num_sealed if num_open else -1,
        **told,
    )
    q = _to_mlx(problem.q, case.dtype)
    scoring: dict[str, Any] = {
        name: mx.array(value) if isinstance(value, np.ndarray) else value
        for name, value in problem.scoring.items()
    }
    options = AttentionOptions(**scoring)
    out, lse, *_ = _ext.paged_attention(q, pages, plan.array(), *options, stream=stream, **told)
    return _finds_its_pages(problem.judge(decode(_from_mlx(out), case.dtype), np.array(lse)))


def _finds_its_pages(verdict: Verdict) -> bool:
    """Whether an error is too small for a wrong page, whatever a GPU's exp2 and log2 round to."""
    return verdict.ratio <= COARSE


def _layer_of(problem: Problem) -> list[mx.array]:
    """The arrays of a problem's pages."""
    arrays = problem.stored or (problem.k_pages, problem.v_pages)
    return [mx.array(a) if a.dtype == np.uint32 else _to_mlx(a, problem.dtype) for a in arrays]


#: How far what is read may be from what was written, of normal values: a wrong one is farther.
_LARGEST_ERROR = {None: 0.05, "q8": 0.1, "q4": 1.5}


class _Moved:
    """Normal tokens of a case, and pages of its formats to put them into."""

    def __init__(self, case: Case, variant: Variant):
        self.formats = variant.formats
        rng = np.random.default_rng(case.seed)
        shapes = [(6, 2, case.page_size, dim) for dim in (case.head_dim, case.value_dim)]
        dense = [rng.standard_normal(shape, np.float32) for shape in shapes]
        self.dense = [_to_mlx(encode(x, case.dtype), case.dtype) for x in dense]
        sizes = 2, case.page_size, case.head_dim, case.value_dim, _DTYPES[case.dtype]
        specs = [*page_arrays(self.formats, *sizes), *open_arrays(self.formats, *sizes)]
        self.pages = [mx.zeros((6, *spec.shape), spec.dtype) for spec in specs]

    def are_read(self, pages: list[mx.array], first_id: int = 0) -> bool:
        """Whether MLX's own operations read the tokens in the pages from an id on."""
        with mx.stream(mx.cpu):
            sides = stored(pages, self.formats)
            ids = np.arange(first_id, first_id + 6)
            for side, name, dense in zip(sides, self.formats, self.dense):
                name = name if first_id == 0 or name is None else "q8"  # open pages are dense
                error = mx.abs(side.pages(ids).astype(mx.float32) - dense.astype(mx.float32)).max()
                if not float(error) <= _LARGEST_ERROR[name]:
                    return False
        return True


def _prove_quantised_write(case: Case, variant: Variant, stream) -> bool:
    moved, size = _Moved(case, variant), case.page_size
    tokens = [x.swapaxes(1, 2).flatten(0, 1) for x in moved.dense]
    slots = mx.array(np.random.default_rng(1).permutation(6 * size).astype(np.int32))
    shuffled = [x[slots] for x in tokens]
    found = _ext.write_pages(shuffled, moved.pages, slots, stream=stream, **variant.formats.told)
    return moved.are_read(found, 6 if variant.formats.have_open_pages else 0)


def _prove_seal(case: Case, variant: Variant, stream) -> bool:
    moved = _Moved(case, variant)
    order = np.random.default_rng(2).permutation(6)
    pairs = np.stack([np.arange(6), order, np.full(6, case.page_size)], axis=1).astype(np.int32)
    sources = [x[mx.array(order)] for x in moved.dense]
    (found,) = _ext.seal_pages(
        sources, [moved.pages], mx.array(pairs), formats=variant.formats, rotated=False,
        stream=stream,
    )  # fmt: skip
    return moved.are_read(found)


def _prove_quantised_gather(case: Case, variant: Variant, stream) -> bool:
    problem, _ = moves.gather(case)
    ragged = _ragged(problem)
    tables, lens = mx.array(problem.block_tables), mx.array(problem.context_lens)
    longest, told = int(problem.context_lens.max()), variant.formats.told
    gathered = _ext.gather_pages(
        _layer_of(problem), tables, lens, longest, **ragged, stream=stream, **told
    )
    for found, contexts in zip(gathered, (problem.keys, problem.values)):
        read = decode(_from_mlx(found), case.dtype)
        for row, context in zip(read, contexts):
            if not np.abs(row[:, : len(context)].swapaxes(0, 1) - context).max() <= 0.1:
                return False
    return True


def _ragged(problem: Problem) -> dict[str, mx.array]:
    return {
        name: mx.array(getattr(problem, name))
        for name in ("page_starts", "page_lens")
        if getattr(problem, name) is not None
    }


def _prove_write(case: Case, variant: Variant, stream) -> bool:
    if not variant.formats.are_dense:
        return _prove_quantised_write(case, variant, stream)
    (k, v, k_pages, v_pages, slots), expected = moves.write(case)
    tokens, pages = (
        [_to_mlx(a, case.dtype) for a in arrays] for arrays in ((k, v), (k_pages, v_pages))
    )
    found = _ext.write_pages(tokens, pages, mx.array(slots), stream=stream)
    return moves.difference([_from_mlx(a) for a in found], expected) is None


def _prove_copy(case: Case, variant: Variant, stream) -> bool:
    (pools, pairs), expected = moves.copy(case)
    arrays = [_to_mlx(a, case.dtype) for a in pools]
    found = _ext.copy_pages(arrays, mx.array(pairs), stream=stream)
    return moves.difference([_from_mlx(a) for a in found], expected) is None


def _prove_gather(case: Case, variant: Variant, stream) -> bool:
    if not variant.formats.are_dense:
        return _prove_quantised_gather(case, variant, stream)
    problem, expected = moves.gather(case)
    pages, ragged = _layer_of(problem), _ragged(problem)
    tables = mx.array(problem.block_tables), mx.array(problem.context_lens)
    length = int(problem.context_lens.max())
    found = _ext.gather_pages(pages, *tables, length, **ragged, stream=stream)
    return moves.difference([_from_mlx(a) for a in found[:2]], expected) is None


def _prove_merge(case: Case, variant: Variant, stream) -> bool:
    merge = moves.Merge(case)
    outs = [_to_mlx(a, case.dtype) for a in merge.outs]
    out, lse = _ext.merge_states(outs, [mx.array(a) for a in merge.lses], stream=stream)
    return _finds_its_pages(merge.judge(decode(_from_mlx(out), case.dtype), np.array(lse)))


_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PROOFS = {
    "paged_attention": _prove_attention,
    "write_pages": _prove_write,
    "copy_pages": _prove_copy,
    "gather_pages": _prove_gather,
    "merge_states": _prove_merge,
    "seal_pages": _prove_seal,
}


def _to_mlx(stored: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(stored)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def _from_mlx(array: mx.array) -> np.ndarray:
    mx.eval(array)  # an error of the evaluation comes out here; numpy would try another way
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@contextmanager
def unchecked() -> Iterator[None]:
    """Calls of this thread run where they are told to: for what checks kernels itself."""
    before = getattr(_thread, "unchecked", False)
    _thread.unchecked = True
    try:
        yield
    finally:
        _thread.unchecked = before


@contextmanager
def guarded_by(guard: Guard | None) -> Iterator[None]:
    """Put another guard in the place of this machine's."""
    global guard_of_this_machine
    before, guard_of_this_machine = guard_of_this_machine, guard
    try:
        yield
    finally:
        guard_of_this_machine = before


def _tell(variant: Variant, identity: str) -> None:
    text = (
        f"[{variant.op}] the kernel must agree with the oracle on its first use, and did not, twice, "
        f"on this machine ({identity.splitlines()[0]}): {variant}. In this process such calls run on "
        "the CPU, slowly but right; the next process tries again. Please open an issue and attach the "
        "output of `python -m paged_mlx doctor --all --json FILE` and this line."
    )
    _log.error(text)
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _identity() -> str:
    gpu = mx.device_info()
    native = hashlib.sha256(
        Path(_ext.__file__).read_bytes()
    ).hexdigest()  # kernel text, launch code
    name = f"{gpu.get('device_name')} {gpu.get('architecture')}, macOS {platform.mac_ver()[0]}"
    return f"{name}, mlx {mx.__version__}\n{native}"  # type: ignore[attr-defined]


# MLX's own operations need no proof.
guard_of_this_machine = (
    Guard(_identity(), mx.gpu, mx.cpu) if BUILT and mx.metal.is_available() else None
)
