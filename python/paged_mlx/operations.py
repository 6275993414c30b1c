"""The native operations, each proven where it runs before a GPU is trusted with it.

Arguments and results are those of the native module's functions. On the CPU a call costs an
attribute more; on a GPU, once a kind of call is known, a few flags and a look-up in ``known``: a
pool's kinds of calls, whose arrays have one geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.formats.raw_pages import head_dim_of
from paged_mlx.machine import first_use
from paged_mlx.machine.first_use import Known, Variant
from paged_mlx.options import AttentionOptions, OptionKinds, check_array, check_stream

_ANY_TOKENS = (*range(1, 17), 1024)  # of an item: every body, the widest last


def proven(
    name: str,
    kind: Callable[[tuple, dict, AttentionPlan | None], Hashable],
    geometry: Callable[..., tuple],
    variants: Callable[..., Iterable[Variant]],
    check: Callable[..., None],
) -> Callable[[Callable], Callable]:
    """Let a native operation run on a guarded device only where its kernels are right.

    Args:
        name: The operation.
        kind: Of a call's arguments, options and plan, at every call: what decides beside the arrays.
        geometry: Of a call's arguments: what of the arrays decides it.
        variants: Of a call's arguments: the kernel variants that it may launch.
        check: Of a call's arguments: refuses values of wrong types, and says which.
    """

    def guarded(native: Callable) -> Callable:
        def operation(
            *arguments, stream=None, known: Known | None = None, plan=None, formats=None, **options
        ):
            if formats is not None:
                options["formats"] = formats
            guard = first_use.guard_of_this_machine
            try:
                if guard is not None:
                    key = kind(arguments, options, plan)
                    if known is None or known.get((name, key)) is not guard:
                        shapes = geometry(*arguments)
                        stream = guard.stream(
                            (name, key, shapes),
                            lambda: variants(*arguments, plan=plan, **options),
                            stream,
                            known,
                        )
                return native(*arguments, stream=stream, **options)
            except (AttributeError, TypeError, ValueError):
                check(*arguments)
                check_stream(name, stream)
                raise

        return operation

    return guarded


def check_attention(q, pages, formats=(None, None)) -> dict[str, int]:
    """The sizes of attention's arrays, after checking shapes and dtypes."""
    _check_arrays("paged_attention", q=q)
    _check_pages("paged_attention", pages)
    if formats == (None, None):
        return _ext.attention_geometry(q, pages)
    return _ext.attention_geometry(q, pages, formats)


def attention_variants(
    q, k_pages, v_pages, work, kinds: OptionKinds, formats: PageFormats = PageFormats()
) -> list[Variant]:
    """What a plan's work may launch; a plan known only as an array may launch any body.

    Args:
        k_pages, v_pages: Pages, or their codes.
    """
    head_dim, v_head_dim = q.shape[-1], head_dim_of(v_pages, formats.v)
    gqa_factor = q.shape[1] // k_pages.shape[1]
    if work is None:
        tokens: Sequence[int] = _ANY_TOKENS
        flags = list(product((False, True), repeat=3))
    else:
        tokens, flags = [n for n in work[0] if n], [work[1:]]
    sizes = head_dim, v_head_dim, q.dtype
    rows = {_ext.attention_body(n * gqa_factor, *sizes, **formats.told)[1] for n in tokens}
    return [
        Variant(
            "paged_attention", _name(q.dtype), head_dim, v_head_dim, k_pages.shape[2],
            rows=n, merged=merged, window=window, ragged=ragged, options=kinds, formats=formats,
        )
        for n, (merged, window, ragged) in product(sorted(rows), flags)
    ]  # fmt: skip


def _attention_kind(arguments, options, plan):
    q, _, _, _, cap, slopes, sinks, mask = arguments
    without = cap is None, slopes is None, sinks is None, mask is None or mask.dtype
    return q.shape[1], None if plan is None else plan.work, without


def _attention_geometry(q, pages, *_):
    return q.dtype, q.shape[-1], *(array.shape[1:] for array in pages)


def _attention_variants(q, pages, words, *options, plan, formats=PageFormats()):
    check_attention(q, pages, formats)
    work, firsts = None if plan is None else plan.work, _firsts(pages, formats)
    return attention_variants(q, *firsts, work, AttentionOptions(*options).kinds, formats)


def _firsts(pages, formats: PageFormats) -> tuple[mx.array, mx.array]:
    """Pages of K and V, or their codes."""
    return pages[0], pages[1 if formats.k is None else 3]


def _write_attend_geometry(q, k_pages, v_pages, *_):
    return _attention_geometry(q, (k_pages, v_pages))


def _write_attend_kind(arguments, options, plan):
    q, _, _, _, k, _, _, _, sinks = arguments
    return q.shape[1], plan.work, k is None, sinks is None


def _write_attend_variants(q, k_pages, v_pages, words, k, v, slots, scale, sinks, *, plan):
    _ext.write_attend(q, k_pages, v_pages, words, k, v, slots, scale, sinks)
    kinds = OptionKinds(sinks=sinks is not None)
    found = attention_variants(q, k_pages, v_pages, plan.work, kinds)
    return [_mover("write_pages", k_pages, v_pages), *found]


def _fetch_kind(arguments, options, plan):
    return arguments[3].ragged


def _fetch_variants(fetches, layer, source, tables, k_pages, v_pages, k, v, *, plan):
    _ext.Fetches().fetch(layer, source, tables, k_pages, v_pages, k, v)
    return [
        _mover(op, pages, pages, tables.ragged and op == "gather_pages")
        for op in ("gather_pages", "write_pages")
        for pages in (k_pages, v_pages)
    ]


def _no_kind(arguments, options, plan):
    return None


def _write_variants(tokens, pages, slots, *, plan, formats=PageFormats(), **options):
    _ext.write_pages(tokens, pages, slots, **formats.told, **options)
    return [_mover("write_pages", *_firsts(pages, formats), dtype=pages[-1].dtype, formats=formats)]


def _copy_geometry(pools, pairs):
    return tuple((pool.dtype, pool.shape[1:]) for pool in _first_layer(pools))


def _copy_variants(pools, pairs, *, plan, **options):
    _ext.copy_pages(pools, pairs, **options)
    return [_copier(pool) for pool in _first_layer(pools)]


def _first_layer(pools):
    return pools[:8]  # a pool's arrays repeat those of its first layer, which are as many at most


def _copier(pool) -> Variant:
    """The variant of a copy, which moves bytes: words of 32 bits are as good as floats."""
    heads_and_more = pool.shape[1:] if pool.ndim == 4 else (*pool.shape[1:-1], 1, pool.shape[-1])
    dtype = "float32" if pool.dtype == mx.uint32 else _name(pool.dtype)
    return Variant("copy_pages", dtype, heads_and_more[2], heads_and_more[2], heads_and_more[1])


def _gather_kind(arguments, options, plan):
    return options.get("page_starts") is None


def _gather_variants(pages, *tables, plan, formats=PageFormats(), **options):
    _ext.gather_pages(pages, *tables, **formats.told, **options)
    ragged = options.get("page_starts") is not None
    firsts, dtype = _firsts(pages, formats), pages[-1].dtype
    return [_mover("gather_pages", *firsts, ragged, dtype=dtype, formats=formats)]


def _merge_geometry(outs, lses):
    return (outs[0].dtype, outs[0].shape[1:]) if outs else ()


def _merge_variants(outs, lses, *, plan):
    _ext.merge_states(outs, lses)
    dim = outs[0].shape[2]
    return [Variant("merge_states", _name(outs[0].dtype), dim, dim)]


def _mover(
    op, k_pages, v_pages, ragged=False, *, dtype=None, formats: PageFormats = PageFormats()
) -> Variant:
    """The variant of an operation that moves pages."""
    dims = head_dim_of(k_pages, formats.k), head_dim_of(v_pages, formats.v)
    name = _name(k_pages.dtype if dtype is None else dtype)
    return Variant(op, name, *dims, k_pages.shape[2], ragged=ragged, formats=formats)


def _pages_geometry(pages) -> tuple:
    return pages[0].dtype, *(array.shape[1:] for array in pages)


def _write_geometry(tokens, pages, slots):
    return _pages_geometry(pages)


def _gather_geometry(pages, *tables):
    return _pages_geometry(pages)


def _fetch_geometry(fetches, layer, source, tables, k_pages, v_pages, k, v):
    return _pages_geometry((k_pages, v_pages))


def _check_arrays(op: str, **arrays) -> None:
    for name, value in arrays.items():
        check_array(op, name, value)


def _check_pages(op: str, pages) -> None:
    for name, value in zip(("k_pages", "v_pages"), pages):
        check_array(op, name, value)


def _check_attention(q, pages, words, *options):
    _check_arrays("paged_attention", q=q)
    _check_pages("paged_attention", pages)
    _check_arrays("paged_attention", plan=words)
    AttentionOptions(*options).check("paged_attention")


def _check_write_attend(q, *_):
    _check_arrays("write_attend", q=q)


def _check_write(tokens, pages, slots):
    k, v = tokens
    _check_arrays("write_pages", k=k, v=v)
    _check_pages("write_pages", pages)


def _check_gather(pages, *tables):
    _check_pages("gather_pages", pages)


def _check_nothing(*arguments):
    """Of arguments whose types their callers have checked."""


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


paged_attention = proven(
    "paged_attention",
    _attention_kind,
    _attention_geometry,
    _attention_variants,
    _check_attention,
)(_ext.paged_attention)
write_attend = proven(
    "write_attend",
    _write_attend_kind,
    _write_attend_geometry,
    _write_attend_variants,
    _check_write_attend,
)(_ext.write_attend)
fetch_pages = proven("fetch_pages", _fetch_kind, _fetch_geometry, _fetch_variants, _check_nothing)(
    _ext.Fetches.fetch
)
write_pages = proven(
    "write_pages",
    _no_kind,
    _write_geometry,
    _write_variants,
    _check_write,
)(_ext.write_pages)
copy_pages = proven("copy_pages", _no_kind, _copy_geometry, _copy_variants, _check_nothing)(
    _ext.copy_pages
)
gather_pages = proven(
    "gather_pages",
    _gather_kind,
    _gather_geometry,
    _gather_variants,
    _check_gather,
)(_ext.gather_pages)
merge_states = proven("merge_states", _no_kind, _merge_geometry, _merge_variants, _check_nothing)(
    _ext.merge_states
)


def _seal_geometry(sources, pages, pairs):
    return _pages_geometry(pages[0])


def _seal_variants(sources, pages, pairs, *, plan, formats, rotated):
    _ext.seal_pages(sources, pages, pairs, formats=formats, rotated=rotated)
    firsts, dtype = _firsts(pages[0], formats), pages[0][-1].dtype
    return [_mover("seal_pages", *firsts, dtype=dtype, formats=formats)]


seal_pages = proven("seal_pages", _no_kind, _seal_geometry, _seal_variants, _check_nothing)(
    _ext.seal_pages
)
