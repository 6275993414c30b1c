"""The one hook: ``mx.fast.scaled_dot_product_attention`` takes pages where it can.

A call whose K and V are ours, and whose mask means what the pages' plan means, reads the
pages. Any other call goes on as it came: our arrays are real, so it is right, and slower.
Of a fresh prompt, where the plan says so, MLX's attention takes the K and V that it brings.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.forward import fresh_prompt
from paged_mlx.forward.gathered import GatheredKV, PagedMask
from paged_mlx.forward.group import FRESH_PROMPT
from paged_mlx.forward.seams import Seam
from paged_mlx.options import AttentionOptions, has_kernel

source_of = _ext.source_of

LATENT = "K is V too, of latent attention"
NOT_ONE_LAYERS = "K and V are not one layer's, or were changed in place"
PAST = "another step has begun, and may have changed the pages"


def reading_pages(before):
    """``mx.fast.scaled_dot_product_attention``, reading pages where K and V are ours."""

    def scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None, **options):
        if type(k) is not GatheredKV or ATTENTION.ours is not scaled_dot_product_attention:
            return before(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        group = k.source.place.group
        with group.passes.turn:
            return attend_handles(before, q, k, v, scale, mask, sinks, options)

    return scaled_dot_product_attention


def attend_handles(before, q, k, v, scale, mask, sinks, options):
    """Attention over handles, which the passes' turn is held for; by ``before`` if not by pages."""
    source = source_of(k, v)
    if source is None:
        place, step = k.source.place, k.source.step
        reason = LATENT if v is k else NOT_ONE_LAYERS
    else:
        place, step = source.place, source.step
        route = step.route
        if route is None or not route.answers(source, q, mask):
            route = find_route(source, q, mask)
        reason = route.reason
        if route.is_fresh_prompt and source.keys is not None:
            reason = FRESH_PROMPT
    group = place.group
    group.calls[place.layer, reason] += 1
    if reason is None:
        out = attend(q, source, route.plan, scale, sinks)
    elif reason is FRESH_PROMPT:
        out = attend_fresh_prompt(q, source, scale, sinks)
    else:
        out = before(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    group.attended.add(place.layer)
    group.passes.attended(step, q)
    return out


ATTENTION = Seam(
    mx.fast, "scaled_dot_product_attention", reading_pages, "a model is enabled", "reads pages"
)


@dataclass(eq=False, slots=True)
class Route:
    """What was decided for one layer's call; the layers after it mostly ask the same.

    Attributes:
        step: The step. As soon as another begins in its group, the answer is another.
        pool, num_sealed: Of the layer; and how often pages were sealed there.
        shape, dtype: Of the queries.
        mask: The mask.
        reason: Why the pages cannot be read; None when they can.
        plan: The attention plan then.
        is_fresh_prompt: Whether MLX's attention takes the step's own K and V.
    """

    step: Any
    pool: Any
    shape: tuple
    dtype: mx.Dtype
    mask: object
    reason: str | None
    plan: object = None
    is_fresh_prompt: bool = False
    num_sealed: int = 0

    def answers(self, source, q, mask) -> bool:
        place = source.place
        return (
            self.mask is mask
            and not (type(mask) is PagedMask and mask.is_changed)
            and self.pool is place.pool
            and self.num_sealed == place.pool.num_sealed
            and self.step is place.group.newest
            and self.shape == q.shape
            and self.dtype == q.dtype
        )


def find_route(source, q, mask) -> Route:
    """Decide whether a call reads the pages, and remember it for layers that ask the same."""
    step, pool, group = source.step, source.place.pool, source.place.group
    reason = refusal(q, source, pool, mask)
    plan, is_fresh_prompt = None, False
    if reason is None:
        window = mask.window if type(mask) is PagedMask else group.window
        plan = step.plan(pool, q.shape[1], window)
        is_fresh_prompt = q.dtype == pool.dtype and fresh_prompt.takes(plan, AttentionOptions())
    kind = step, pool, q.shape, q.dtype, mask
    step.route = Route(*kind, reason, plan, is_fresh_prompt, pool.num_sealed)
    return step.route


def refusal(q, source, pool, mask) -> str | None:
    """Why this call cannot read the pages; None when it can."""
    step = source.step
    if step is not source.place.group.newest:
        return PAST
    batch, heads, tokens, head_dim = q.shape
    if batch != step.batch or tokens != step.num_tokens:
        return "the queries are not this step's tokens"
    if head_dim != pool.head_dim or heads % pool.num_kv_heads:
        return "the heads of q do not fit those of K"
    if q.dtype != pool.dtype and mx.float32 not in (q.dtype, pool.dtype):
        return f"q is {q.dtype} and the pages are {pool.dtype}"
    if not (has_kernel(head_dim) and has_kernel(pool.v_head_dim)):
        return f"head_dim {head_dim} has no kernel"
    return mask_refusal(mask, source)


def mask_refusal(mask, source) -> str | None:
    step, group = source.step, source.place.group
    if mask is None:
        return None if step.num_tokens == 1 else "attention is not causal"
    if isinstance(mask, str):
        even = not step.batched or (step.ends == step.ends[0]).all()
        return None if mask == "causal" and even else "the mask is of another kind"
    if type(mask) is not PagedMask or mask.group is not group or mask.is_changed:
        return "the mask is not the cache's"
    same_step = mask.starts is step.starts or np.array_equal(mask.starts, step.starts)
    if not same_step or mask.num_tokens != step.num_tokens:
        return "the mask is of another step"
    return None


def attend_fresh_prompt(q, source, scale, sinks):
    """Attention of one layer over what the step brings, which goes to the pages as well.

    Padding stands at the end, where no token before it sees it.
    """
    pool = source.place.pool
    k, v = pool.write_fetched(source)
    options = AttentionOptions(scale=scale, sinks=sinks)
    return fresh_prompt.attend_batch(q, k, v, options, stream=pool.stream)


def attend(q, source, plan, scale, sinks):
    """Attention of one layer over its pages; q and the result ``[batch, heads, tokens, dim]``.

    Where only one of q and the pages is float32, q is rounded to the pages' dtype and the result
    is float32, as stock's: models widen a q of K's dtype, so that rounding it loses nothing.
    """
    step, pool = source.step, source.place.pool
    if q.dtype != pool.dtype:
        return attend(q.astype(pool.dtype), source, plan, scale, sinks).astype(mx.float32)
    if not step.padded:
        return pool.attend_fetched(source, q, plan, scale, sinks)
    real, back = step.packing
    batch, heads, tokens, dim = q.shape
    packed = q.swapaxes(1, 2).reshape(batch * tokens, heads, dim)[real]
    out = pool.attend_fetched(source, packed.swapaxes(0, 1)[None], plan, scale, sinks)
    return out[0].swapaxes(0, 1)[back].reshape(batch, tokens, heads, -1).swapaxes(1, 2)
