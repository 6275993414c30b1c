"""What two models of mlx-lm have for Metal alone, in plain MLX, so that they run here.

The stand-ins have the shapes and the roles of the originals, not their rounding: a test
compares two runs of one model that differ in the cache alone.
"""

import mlx.core as mx
import mlx.nn as nn


def prepare(family: str, module) -> None:
    """Replace what needs Metal in a model's module, where there is no Metal."""
    if not mx.metal.is_available():
        for name, plain in STAND_INS.get(family, {}).items():
            setattr(module, name, plain)


class PlainLinear(nn.Linear):
    """For bitnet's ternary linear layers."""

    def __init__(self, in_features, out_features, bias=True, **options):
        super().__init__(in_features, out_features, bias)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    batch, tokens, _ = qkvg.shape
    heads = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(batch, tokens, -1, head_dim)
    heads = mx.fast.rms_norm(heads, None, eps)
    return heads[:, :, :n_heads] * query_scale, heads[:, :, n_heads:]


def qk_norm_rope(qkvg, *, head_dim, rope_base, offset, **options):
    def rotate(x):
        x = x.swapaxes(1, 2)
        x = mx.fast.rope(x, head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset)
        return x.swapaxes(1, 2)

    return [rotate(x) for x in qk_norm(qkvg, head_dim=head_dim, **options)]


def rms_norm_sigmoid_gate(x, gate, *, eps):
    batch, _, tokens, _ = x.shape
    x = mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).reshape(batch, tokens, -1)
    return x * mx.sigmoid(gate)


def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argpartition(-(scores + expert_bias), top_k - 1, axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return chosen, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    x = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (x * weights[..., None]).sum(-2).astype(experts.dtype)


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    scaled = branch if post_weight is None else branch * post_weight
    stream = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
    return stream, next_norm and pre_norm(stream, next_norm, dtype=branch.dtype)


def pre_norm(stream, norm, *, dtype):
    return norm(stream).astype(dtype)


STAND_INS = {
    "bitnet": {"BitLinear": PlainLinear},
    "muse_spark": {
        plain.__name__: plain
        for plain in (
            expert_routing,
            norm_add_norm,
            post_expert_norm_combine,
            pre_norm,
            qk_norm,
            qk_norm_rope,
            rms_norm_sigmoid_gate,
        )
    },
}
