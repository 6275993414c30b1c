"""The one hook: ``mx.fast.scaled_dot_product_attention`` takes pages where it can.

A call whose K and V are ours, and whose mask means what the pages' plan means, reads the
pages. Any other call goes on as it came: our arrays are real, so it is right, and slower.
"""

import mlx.core as mx
import numpy as np

from paged_mlx.mlx_lm.gathered import GatheredKV, PagedMask

_installed = 0
_stock = None


def install() -> None:
    """Put the hook in place, once however often it is asked for."""
    global _installed, _stock
    if not _installed:
        _stock = mx.fast.scaled_dot_product_attention
        mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
    _installed += 1


def uninstall() -> None:
    """Undo one ``install``; the last one leaves ``mx.fast`` as it was."""
    global _installed, _stock
    _installed -= 1
    if not _installed:
        if mx.fast.scaled_dot_product_attention is scaled_dot_product_attention:
            mx.fast.scaled_dot_product_attention = _stock
            _stock = None


def scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None, **options):
    """``mx.fast.scaled_dot_product_attention``, reading pages where K and V are ours."""
    if type(k) is GatheredKV:
        reason = refusal(q, k, v, mask)
        k.source.group.count(k.source.layer, reason)
        if reason is None:
            return attend(q, k.source, scale, mask, sinks)
    return _stock(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


def refusal(q, k, v, mask) -> str | None:
    """Why this call cannot read the pages; None when it can."""
    source = k.source
    if v is k:
        return "K is V too, of latent attention"
    if type(v) is not GatheredKV or v.source is not source or not k.is_key or v.is_key:
        return "K and V are not one layer's"
    step = source.step
    pool, _ = source.group.placed(source.layer)
    batch, heads, tokens, head_dim = q.shape
    if batch != step.batch or tokens != step.num_tokens:
        return "the queries are not this step's tokens"
    if head_dim != pool.head_dim or heads % pool.num_kv_heads:
        return "the heads of q do not fit those of K"
    if q.dtype != pool.dtype:
        return f"q is {q.dtype} and the pages are {pool.dtype}"
    if not (supported(head_dim) and supported(pool.v_head_dim)):
        return f"head_dim {head_dim} has no kernel"
    return mask_refusal(mask, source)


def mask_refusal(mask, source) -> str | None:
    step = source.step
    if mask is None:
        return None if step.num_tokens == 1 else "attention is not causal"
    if isinstance(mask, str):
        even = not source.batched or (step.ends == step.ends[0]).all()
        return None if mask == "causal" and even else "the mask is of another kind"
    if type(mask) is not PagedMask or mask.group is not source.group:
        return "the mask is not the cache's"
    same_step = mask.starts is step.starts or np.array_equal(mask.starts, step.starts)
    if not same_step or mask.num_tokens != step.num_tokens:
        return "the mask is of another step"
    return None


def supported(head_dim: int) -> bool:
    """Whether paged attention has a kernel for it."""
    return head_dim % 8 == 0 and (8 <= head_dim <= 256 or head_dim == 512)


def attend(q, source, scale, mask, sinks):
    """Attention of one layer over its pages; q and the result ``[batch, heads, tokens, dim]``."""
    group, step = source.group, source.step
    pool, i = group.placed(source.layer)
    window = mask.window if type(mask) is PagedMask else group.window
    batch, heads, tokens, dim = q.shape
    if tokens == 1:
        q = q.reshape(batch, heads, dim)
    else:
        q = q.swapaxes(1, 2).reshape(batch * tokens, heads, dim)
    if step.padded:
        real, back = step.packing()
        q = q[real]
    out = pool.attend(i, q, step.plan(pool, heads, window), scale=scale, sinks=sinks)
    group.taken(source.layer)
    if step.padded:
        out = out[back]
    if tokens == 1:
        return out.reshape(batch, heads, 1, -1)
    return out.reshape(batch, tokens, heads, -1).swapaxes(1, 2)
