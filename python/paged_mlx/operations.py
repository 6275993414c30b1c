"""The native operations, each proven where it runs before a GPU is trusted with it.

The arguments and results are those of the native module's functions; ``plan`` may be an
AttentionPlan. On the CPU, and once a kind of call is known, a call costs a look-up more.
"""

from itertools import product

import mlx.core as mx

from paged_mlx import first_use
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, plan_array
from paged_mlx.first_use import Variant

_ANY_TOKENS = (*range(1, 17), 1024)  # of an item: every body, the widest last


def paged_attention(q, k_pages, v_pages, plan, *, stream=None, **options):
    guard = first_use.guard_of_this_machine
    if guard is not None and guard.applies(stream):
        kind, attention = _attention(q, k_pages, v_pages, plan, **options)

        def variants():
            _ext.attention_geometry(q, k_pages, v_pages)
            return attention()

        stream = guard.stream(("paged_attention", *kind), variants, stream)
    return _ext.paged_attention(q, k_pages, v_pages, plan_array(plan), stream=stream, **options)


def write_attend(q, k_pages, v_pages, plan, k, v, slots, scale, sinks, stream):
    guard = first_use.guard_of_this_machine
    if guard is not None and guard.applies(stream):
        kind, attention = _attention(q, k_pages, v_pages, plan, sinks=sinks)

        def variants():
            _ext.write_attend(q, k_pages, v_pages, plan.array, k, v, slots, scale, sinks)
            return [_mover("write_pages", k_pages, v_pages), *attention()]

        stream = guard.stream(("write_attend", *kind), variants, stream)
    return _ext.write_attend(q, k_pages, v_pages, plan.array, k, v, slots, scale, sinks, stream)


def fetch_pages(fetches, layer, source, tables, k_pages, v_pages, k, v, stream):
    guard = first_use.guard_of_this_machine
    if guard is not None and guard.applies(stream):

        def variants():
            _ext.Fetches().fetch(layer, source, tables, k_pages, v_pages, k, v)
            return [
                _mover(op, pages, pages, tables.ragged and op == "gather_pages")
                for op in ("gather_pages", "write_pages")
                for pages in (k_pages, v_pages)
            ]

        key = ("fetch_pages", k_pages.dtype, k_pages.shape[1:], v_pages.shape[1:], tables.ragged)
        stream = guard.stream(key, variants, stream)
    return fetches.fetch(layer, source, tables, k_pages, v_pages, k, v, stream)


def _attention(q, k_pages, v_pages, plan, **options):
    """What kind of call attends, and the function that tells what such calls may launch.

    q: ``[tokens, num_q_heads, head_dim]`` or ``[batch, num_q_heads, tokens, head_dim]``.
    """
    mask = options.get("mask")
    flags = {
        "softcap": options.get("softcap") is not None,
        "alibi": options.get("alibi_slopes") is not None,
        "sinks": options.get("sinks") is not None,
        "mask": None if mask is None else "boolean" if mask.dtype == mx.bool_ else "additive",
    }
    work = plan.work if isinstance(plan, AttentionPlan) else None
    shapes = (q.shape[1], q.shape[-1], k_pages.shape[1:], v_pages.shape[1:])
    kind = (q.dtype, *shapes, *flags.values(), work)
    return kind, lambda: attention_variants(q, k_pages, v_pages, work, flags)


def attention_variants(q, k_pages, v_pages, work, flags: dict) -> list[Variant]:
    """What a plan's work may launch; a plan known only as an array may launch any body."""
    head_dim, v_head_dim = q.shape[-1], v_pages.shape[3]
    gqa_factor = q.shape[1] // k_pages.shape[1]
    if work is None:
        tokens, kinds = _ANY_TOKENS, list(product((False, True), repeat=3))
    else:
        tokens, kinds = [n for n in work[0] if n], [work[1:]]
    rows = {_ext.attention_body(n * gqa_factor, head_dim, v_head_dim, q.dtype)[1] for n in tokens}
    return [
        Variant(
            "paged_attention", _name(q.dtype), head_dim, v_head_dim, k_pages.shape[2],
            rows=n, merged=merged, window=window, ragged=ragged, **flags,
        )
        for n, (merged, window, ragged) in product(sorted(rows), kinds)
    ]  # fmt: skip


def write_pages(k, v, k_pages, v_pages, slots, *, stream=None, **options):
    arguments = (k, v, k_pages, v_pages, slots)
    stream = _proven("write_pages", arguments, k_pages, v_pages, stream)
    return _ext.write_pages(*arguments, stream=stream, **options)


def copy_pages(pools, pairs, *, stream=None, **options):
    for pool in pools[:2]:  # a pool's arrays repeat those of its first layer
        stream = _proven("copy_pages", (pools, pairs), pool, pool, stream)
    return _ext.copy_pages(pools, pairs, stream=stream, **options)


def gather_pages(k_pages, v_pages, *arguments, stream=None, **options):
    whole = (k_pages, v_pages, *arguments)
    stream = _proven("gather_pages", whole, k_pages, v_pages, stream, **options)
    return _ext.gather_pages(*whole, stream=stream, **options)


def merge_states(outs, lses, *, stream=None):
    guard = first_use.guard_of_this_machine
    if outs and guard is not None and guard.applies(stream):
        key = ("merge_states", outs[0].dtype, outs[0].shape[1:])

        def variants():
            _ext.merge_states(outs, lses)
            dim = outs[0].shape[2]
            return [Variant("merge_states", _name(outs[0].dtype), dim, dim)]

        stream = guard.stream(key, variants, stream)
    return _ext.merge_states(outs, lses, stream=stream)


def _proven(op, arguments, k_pages, v_pages, stream, **options):
    """Where an operation that moves pages runs. Building its node checks the arguments."""
    guard = first_use.guard_of_this_machine
    if guard is None or not guard.applies(stream):
        return stream

    def variants():
        getattr(_ext, op)(*arguments, **options)
        return [_mover(op, k_pages, v_pages, ragged)]

    ragged = options.get("page_starts") is not None
    key = (op, k_pages.dtype, k_pages.shape[1:], v_pages.shape[1:], ragged)
    return guard.stream(key, variants, stream)


def _mover(op, k_pages, v_pages, ragged=False) -> Variant:
    """The variant of an operation that moves pages."""
    dims = (k_pages.shape[3], v_pages.shape[3], k_pages.shape[2])
    return Variant(op, _name(k_pages.dtype), *dims, ragged=ragged)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
