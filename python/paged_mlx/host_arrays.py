"""Tables, lengths, slots and pairs are host data: lists, numpy arrays, evaluated mx.arrays."""

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.errors import fail, kind_of
from paged_mlx.options import check_array

INT32 = np.iinfo(np.int32)

Ints: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | mx.array


def host_ints(op: str, name: str, values: object) -> np.ndarray:
    """``values`` as a contiguous int32 numpy array.

    An mx.array is read on the host, which evaluates it if it is lazy.

    Raises:
        ValueError: The values are not integers that fit in 32 bits, or stand
            for an input while ``mx.compile`` traces.
    """
    if type(values) is np.ndarray and values.dtype == np.int32 and values.flags.c_contiguous:
        return values
    if isinstance(values, mx.array):
        if _ext.is_tracer(values):
            fail(
                op,
                f"{name} must be host data, known when the step is built; inside mx.compile make "
                "the plan outside and pass plan=plan.array as an input",
                "a traced array",
            )
        if values.dtype in (mx.float16, mx.bfloat16, mx.float32):
            fail(op, f"{name} must hold integers", values.dtype)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        fail(op, f"{name} must be an array of integers", kind_of(values))
    if array.dtype == np.int32:
        return np.ascontiguousarray(array)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        fail(op, f"{name} must hold integers", f"dtype {array.dtype}")
    if array.min() < INT32.min or array.max() > INT32.max:
        worst = max(array.min(), array.max(), key=abs)
        fail(op, f"{name} must fit in 32 bits", worst)
    return np.ascontiguousarray(array, np.int32)


def optional_ints(op: str, name: str, values: object) -> np.ndarray | None:
    """``host_ints`` of what may be left out."""
    return None if values is None else host_ints(op, name, values)


def slot_array(op: str, slot_mapping, k_pages: mx.array) -> mx.array:
    """``slot_mapping`` as int32, checked where its values are known."""
    if isinstance(slot_mapping, mx.array) and _ext.is_tracer(slot_mapping):
        return slot_mapping
    slots = host_ints(op, "slot_mapping", slot_mapping)
    if slots.ndim != 1:
        fail(op, "slot_mapping must have shape [tokens]", slots.shape)
    if k_pages.ndim == 4 and slots.size:
        num_slots = k_pages.shape[0] * k_pages.shape[2]
        if slots.max() >= num_slots:
            must = f"slot_mapping must be less than num_pages * page_size = {num_slots}"
            fail(op, must, slots.max())
        if slots.min() < -1:
            fail(op, "slot_mapping must be a slot, or -1 to skip the token", slots.min())
        used = np.sort(slots[slots >= 0])
        repeated = used[1:][used[1:] == used[:-1]]
        if repeated.size:
            fail(op, "slot_mapping must name each slot at most once", f"{repeated[0]} twice")
    return mx.array(slots)


def pair_array(op: str, pairs, num_pages: int) -> mx.array:
    """Page pairs as int32 ``[n, 2]``, checked: no chain, no target twice."""
    pairs = host_ints(op, "pairs", pairs)
    if pairs.size == 0:
        return mx.zeros((0, 2), mx.int32)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        fail(op, "pairs must have shape [n, 2]", pairs.shape)
    if pairs.min() < 0 or pairs.max() >= num_pages:
        worst = pairs.min() if pairs.min() < 0 else pairs.max()
        fail(op, f"pairs must hold page ids in [0, {num_pages}), the pages of the pool", worst)
    targets = set(pairs[:, 1].tolist())
    if len(targets) < len(pairs):
        fail(op, "pairs must name each target once", f"{len(pairs) - len(targets)} repeats")
    chained = targets.intersection(pairs[:, 0].tolist())
    if chained:
        fail(op, "pairs must not use a page as source and as target", f"page {min(chained)}")
    return mx.array(pairs)


def gather_inputs(
    op: str, k_pages: mx.array, block_tables, context_lens, page_starts, page_lens
) -> tuple[mx.array, mx.array, int, dict[str, mx.array]]:
    """Checked block_tables, context_lens, longest context, and those that ragged tables add."""
    check_array(op, "k_pages", k_pages)
    if k_pages.ndim != 4 or 0 in k_pages.shape:
        must = (
            "k_pages must have shape [num_pages, num_kv_heads, page_size, head_dim], none of them 0"
        )
        fail(op, must, k_pages.shape)
    tables = host_ints(op, "block_tables", block_tables)
    lens = host_ints(op, "context_lens", context_lens)
    ragged = {
        "page_starts": optional_ints(op, "page_starts", page_starts),
        "page_lens": optional_ints(op, "page_lens", page_lens),
    }
    num_pages, _, page_size, _ = k_pages.shape
    _ext.check_tables(op, tables, lens, **ragged, num_pages=num_pages, page_size=page_size)
    added = {name: mx.array(a) for name, a in ragged.items() if a is not None}
    return mx.array(tables), mx.array(lens), int(lens.max()), added
