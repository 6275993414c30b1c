"""Checks of an operation's arrays, made before anything runs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paged_mlx.errors import fail
from paged_mlx.fallback.plan import HEADER, MARK, TokenRows
from paged_mlx.fallback.traces import is_tracer
from paged_mlx.formats.page_format import BITS, PageFormats, page_arrays, sides_of
from paged_mlx.formats.stored import Stored, stored
from paged_mlx.options import FLOATS, AttentionOptions, check_array, has_kernel


class Shapes:
    """Checks shapes by the names of their axes: a name has one size in a call."""

    def __init__(self, op: str):
        self.op = op
        self.known: dict[str, tuple[int, str]] = {}

    def __call__(self, name, array, *dims):
        check_array(self.op, name, array)
        known = {dim: self.known[dim] for dim in dims if dim in self.known}
        sizes = dict(zip(dims, array.shape))
        if array.ndim != len(dims) or any(sizes[dim] != size for dim, (size, _) in known.items()):
            where = " and ".join(f"{dim} = {size} from {of}" for dim, (size, of) in known.items())
            must = f"{name} must have shape [{', '.join(dims)}]" + (where and f", where {where}")
            fail(self.op, must, array.shape)
        self.known |= {dim: (sizes[dim], name) for dim in dims if dim not in known}


def floats(op, name, array) -> None:
    if array.dtype not in FLOATS:
        fail(op, f"{name} must be float32, float16 or bfloat16", _named(array.dtype))


def same_dtype(op, name, array, dtype, why) -> None:
    if array.dtype != dtype:
        fail(op, f"{name} must be {_named(dtype)}, {why}", _named(array.dtype))


def _named(dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def layer(op, arrays, formats, shape: Shapes | None = None) -> tuple[Stored, Stored]:
    """K and V of a layer, after checking the arrays of its pages."""
    shape, formats = shape or Shapes(op), PageFormats(*formats)
    count = sum(1 if name is None else 3 for name in formats) + 2 * formats.have_open_pages
    if len(arrays) != count:
        must = f"pages must be the {count} arrays of a layer whose formats are {formats}"
        fail(op, must, len(arrays))
    sides = sides_of(arrays, formats)
    for letter, side, name in zip(("k", "v"), sides, formats):
        axes = ("num_kv_heads", "page_size", "head_dim" if letter == "k" else "v_head_dim")
        if name is None:
            shape(f"{letter}_pages", side[0], "num_pages", *axes)
        else:
            _quantised(op, letter, side, name, axes, shape)
        for opened in sides.open[letter == "v" :][:1]:
            shape(f"open {letter}_pages", opened, "num_open", *axes)
    k, v = found = stored(arrays, formats)
    if op != "paged_attention":  # which compares them with q
        floats(op, "k_pages", k)
        same_dtype(op, "v_pages", v, k.dtype, "the dtype of k_pages")
    return found


def _quantised(op, letter, arrays, name, axes, shape: Shapes) -> None:
    """Check the codes, scales and biases of K, or of V."""
    codes, *others = (f"{part} of {letter}_pages" for part in ("codes", "scales", "biases"))
    shape(codes, arrays[0], "num_pages", *axes[:2], f"words of {letter}")
    dim = arrays[0].shape[3] * 32 // BITS[name]
    if shape.known.setdefault(axes[2], (dim, codes))[0] != dim:
        fail(op, f"{codes} must be of {axes[2]} = {shape.known[axes[2]][0]}", dim)
    num_pages, heads, size = (shape.known[axis][0] for axis in ("num_pages", *axes[:2]))
    formats = PageFormats(name) if letter == "k" else PageFormats(None, name)
    formats.check(op, dim, dim, size)
    specs = page_arrays(formats, heads, size, dim, dim, arrays[1].dtype)
    for part, array, spec in zip((codes, *others), arrays, specs[letter == "v" :]):
        if array.shape != (wanted := (num_pages, *spec.shape)):
            fail(op, f"{part} must have shape {wanted}, as {name} has it", array.shape)
        same_dtype(op, part, array, spec.dtype, f"as {name} has it")


def attention_geometry(q, pages, formats=(None, None)) -> dict[str, int]:
    """Heads, page size and counts, after checking shapes and dtypes."""
    op, shape = "paged_attention", Shapes("paged_attention")
    shape("q", q, "tokens", "num_q_heads", "head_dim")
    floats(op, "q", q)
    k, v = layer(op, pages, formats, shape)
    for name, side in (("k_pages", k), ("v_pages", v)):
        same_dtype(op, name, side, q.dtype, "the dtype of q")
    if not k.page_size:
        fail(op, "k_pages must have a page_size of at least 1", 0)
    for name, dim in (("q", q.shape[2]), ("v_pages", v.dim)):
        if not has_kernel(dim):
            must = f"{name} must have a head_dim that is a multiple of 8 up to 256, or 512"
            fail(op, must, dim)
    num_kv_heads = k.num_kv_heads
    if not num_kv_heads or q.shape[1] % num_kv_heads:
        must = f"num_q_heads of q must be a multiple of num_kv_heads = {num_kv_heads} from k_pages"
        fail(op, must, q.shape[1])
    known = {dim: size for dim, (size, _) in shape.known.items()}
    known["num_pages"] += known.get("num_open", 0)
    names = ("tokens", "num_q_heads", "num_kv_heads", "page_size", "num_pages")
    return {name: known[name] for name in names}


def options(op, q, given: AttentionOptions) -> None:
    given.check(op)
    for name, value, least in zip(AttentionOptions.__annotations__, given, (-np.inf, 0)):
        if value is not None and not (np.isfinite(value) and value > least):
            fail(op, f"{name} must be finite{' and greater than 0' if least == 0 else ''}", value)
    num_tokens, num_q_heads, _ = q.shape
    for name in ("alibi_slopes", "sinks"):
        value = getattr(given, name)
        if value is not None:
            if value.shape != (num_q_heads,):
                must = f"{name} must have shape [num_q_heads], where num_q_heads = {num_q_heads}"
                fail(op, f"{must} from q", value.shape)
            floats(op, name, value)
    mask = given.mask
    if mask is not None:
        if mask.dtype != mx.bool_:
            floats(op, "mask (unless bool)", mask)
        heads, *shape = mask.shape if mask.ndim == 3 else (1, *mask.shape)
        if len(shape) != 2 or heads not in (1, num_q_heads) or shape[0] != num_tokens:
            must = "mask must have shape [tokens, keys] or [num_q_heads or 1, tokens, keys]"
            fail(op, f"{must}, where tokens = {num_tokens} from q", mask.shape)


def plan(words, geometry, mask) -> TokenRows:
    """The rows of a plan that is known, after checking that it is one for these arrays."""
    op = "paged_attention"
    if words.ndim != 1 or words.dtype != np.int32 or words.size < HEADER or words[0] != MARK:
        fail(op, "plan must be the array of an AttentionPlan", "other words")
    for name, planned in zip(geometry, words[1:HEADER].tolist()):
        if planned != geometry[name]:
            array = "q" if name in ("tokens", "num_q_heads") else "k_pages"
            fail(op, f"plan must be made for {name} = {geometry[name]} of {array}", planned)
    rows, num_pages = TokenRows.of(words, geometry["tokens"]), geometry["num_pages"]
    largest, longest = rows.pages.max(initial=-1), rows.end.max(initial=0)
    if largest >= num_pages:
        must = f"block_tables must hold page ids in [0, {num_pages}), the pages of the pool"
        fail(op, must, largest)
    if mask is not None and longest > mask.shape[-1]:
        must = f"mask must have a column for each key of the longest context ({longest})"
        fail(op, must, mask.shape[-1])
    return rows


def write_attend(q, k, v) -> None:
    op, shape = "write_attend", Shapes("write_attend")
    shape("q", q, "batch", "num_q_heads", "length", "head_dim")
    not_traced(op, "q", q)
    if k is not None:
        for name, array, dim in (("k", k, "head_dim"), ("v", v, "v_head_dim")):
            shape(name, array, "batch", "num_kv_heads", "length", dim)
            floats(op, name, array)
            not_traced(op, name, array)


def not_traced(op, name, array) -> None:
    if is_tracer(array):
        fail(op, f"{name} must not be traced: a plan is good for one step", "a traced array")


def write(k, v, arrays, slots, formats) -> tuple[Stored, Stored]:
    """K and V of the layer, after checking a write to it."""
    op, shape = "write_pages", Shapes("write_pages")
    sides = layer(op, arrays, formats, shape)
    shape("k", k, "tokens", "num_kv_heads", "head_dim")
    shape("v", v, "tokens", "num_kv_heads", "v_head_dim")
    shape("slot_mapping", slots, "tokens")
    same_dtype(op, "k", k, sides[0].dtype, "the dtype of k_pages")
    same_dtype(op, "v", v, sides[1].dtype, "the dtype of v_pages")
    return sides


def pools(arrays) -> None:
    for pool in arrays:
        if pool.ndim < 3 or pool.shape[0] != arrays[0].shape[0]:
            must = "every array of pools must have shape [num_pages, num_kv_heads, ...]"
            fail("copy_pages", f"{must}, num_pages alike", pool.shape)


def parts(outs, lses) -> None:
    op, shape = "merge_states", Shapes("merge_states")
    if not outs or len(outs) != len(lses):
        got = f"{len(outs)} outs and {len(lses)} lses"
        fail(op, "outs and lses must hold one array for each part, at least one", got)
    for out in outs:
        shape("outs", out, "tokens", "num_q_heads", "v_head_dim")
        floats(op, "outs", out)
        same_dtype(op, "outs", out, outs[0].dtype, "the dtype of the first")
    for lse in lses:
        shape("lses", lse, "tokens", "num_q_heads")
        same_dtype(op, "lses", lse, mx.float32, "as merging needs")
