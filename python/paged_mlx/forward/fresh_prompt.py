"""Fresh prompts: their own K and V are the whole context, so that MLX's attention can take them.

Pages are written all the same; they are only not read. Whether this is the faster route, the plan
knows (``AttentionPlan.fresh_prompt``), from the table of ``csrc/plan/targets.cpp`` or from what
``python -m paged_mlx tune`` measured.
"""

from __future__ import annotations

from collections import Counter

import mlx.core as mx

from paged_mlx.attention_plan import AttentionPlan
from paged_mlx.options import AttentionOptions

#: Calls of ``attend`` and ``attend_batch``, by the number of their sequences.
calls: Counter[int] = Counter()


def takes(plan: AttentionPlan, options: AttentionOptions) -> bool:
    """Whether a step is a fresh prompt that MLX's attention takes, and takes faster."""
    return plan.fresh_prompt and options.kinds.is_plain


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array:
    """Causal attention of a step for which ``takes`` holds, to its own K and V.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``.
        k, v: The step's keys and values, ``[tokens, num_kv_heads, head_dim]``.
        plan: The step's plan.
        options: Scale and sinks; the others are not taken.

    Returns:
        ``[tokens, num_q_heads, v_head_dim]``.
    """
    bounds = plan.query_bounds
    calls[len(bounds) - 1] += 1
    outs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if begin < end:
            own = [a[begin:end].swapaxes(0, 1)[None] for a in (q, k, v)]
            outs.append(_causal(own[0], own[1], own[2], options, stream)[0].swapaxes(0, 1))
    return outs[0] if len(outs) == 1 else mx.concatenate(outs, stream=stream)


def attend_batch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    options: AttentionOptions,
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array:
    """The same for ``[batch, heads, tokens, dim]``, whose rows may have padding at their end."""
    calls[len(q)] += 1
    return _causal(q, k, v, options, stream)


def _causal(q, k, v, options, stream):
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=scale, mask="causal", sinks=options.sinks, stream=stream
    )
