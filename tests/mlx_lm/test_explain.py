"""explain(): which layers read pages, and why the others do not."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from paged_mlx.forward import hook  # noqa: E402
from paged_mlx.mlx_lm import enable, explain  # noqa: E402
from paged_mlx.mlx_lm.model_seam import paged_model_of  # noqa: E402


def test_every_layer_of_a_window_model_is_paged():
    found = explain(zoo.tiny("gemma3_text"))
    assert [layer.window for layer in found.layers] == [zoo.WINDOW, zoo.WINDOW, None]
    assert all(layer.is_paged and layer.reason is None for layer in found.layers)
    assert str(found).startswith("gemma3_text: 3 of 3 layers read pages")


def test_attention_of_the_models_own_is_named():
    found = explain(zoo.tiny("gemma2"))
    assert found.num_paged == 0
    assert {layer.reason for layer in found.layers} == {
        "the model computes attention itself, from gathered K and V"
    }


def test_a_head_dim_without_a_kernel_is_named():
    found = explain(zoo.tiny("llama", head_dim=12))
    assert {layer.reason for layer in found.layers} == {"head_dim 12 has no kernel"}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_head_dim_without_a_kernel_still_gives_stock_tokens(family):
    model, prompt = zoo.tiny(family, head_dim=12), zoo.prompt(45, seed=1)
    prompts = [prompt, prompt[:7]]
    expected = zoo.single(model, prompt, max_tokens=8), zoo.batched(model, prompts, [20, 16])
    with enable(model, page_size=8) as paged:
        found = zoo.single(model, prompt, max_tokens=8), zoo.batched(model, prompts, [20, 16])
        assert found == expected
        assert paged.paged_calls == 0
        assert set(paged.gathered_calls) == {"head_dim 12 has no kernel"}


def test_explaining_leaves_the_model_as_it_was():
    model = zoo.tiny("llama")
    explain(model)
    assert paged_model_of(model) is None
    with enable(model) as paged:
        explain(model)
        assert paged_model_of(model) is paged
        assert paged.paged_calls == 0


def test_what_was_declined_is_counted_with_the_reason():
    model, prompt = zoo.tiny("llama"), mx.array(zoo.prompt(20, seed=1))
    with enable(model, page_size=8, prefix_cache=True):
        assert explain(model).declined == {}
        for count in (1, 2):
            list(zoo.GENERATE.generate_step(prompt, model, max_tokens=2, kv_bits=8))
            assert explain(model).declined == {"kv_bits is given": count}
        assert "prefixes declined 2 times: kv_bits is given" in repr(explain(model))


def test_what_is_counted_is_counted_once_where_somebody_has_wrapped_a_wrapper_of_ours():
    model, prompt = zoo.tiny("llama"), mx.array(zoo.prompt(20, seed=1))
    options = dict(page_size=8, prefix_cache=True)
    stock = zoo.GENERATE.generate_step
    attention = mx.fast.scaled_dot_product_attention
    try:
        with enable(model, **options):
            ours, attends = zoo.GENERATE.generate_step, mx.fast.scaled_dot_product_attention
            zoo.GENERATE.generate_step = lambda *args, **given: ours(*args, **given)
            mx.fast.scaled_dot_product_attention = lambda *args, **given: attends(*args, **given)
        with enable(model, **options) as paged:
            list(zoo.GENERATE.generate_step(prompt, model, max_tokens=2, kv_bits=8))
            assert explain(model).declined == {"kv_bits is given": 1}
            x = mx.random.normal((1, 2, 5, 8))
            k, v = model.make_cache()[0].update_and_fetch(x, x)
            mx.fast.scaled_dot_product_attention(x, k, v, scale=1.0)
            assert paged.gathered_calls == {"attention is not causal": 1}
    finally:
        zoo.GENERATE.generate_step = stock
        mx.fast.scaled_dot_product_attention = attention


@pytest.mark.parametrize(
    "mask, reason",
    [
        (None, "attention is not causal"),
        ("other", "the mask is of another kind"),
        (mx.ones((5, 5), mx.bool_), "the mask is not the cache's"),
    ],
)
def test_masks_that_are_not_the_caches_are_gathered(mask, reason):
    model = zoo.tiny("llama")
    x = mx.random.normal((1, 2, 5, 8))
    with enable(model):
        k, _ = model.make_cache()[0].update_and_fetch(x, x)
        assert reason_for(x, k, mask) == reason
        assert reason_for(x, k, "causal") is None
        assert reason_for(x[:, :, :3], k, "causal") == "the queries are not this step's tokens"


def test_a_q_of_the_other_half_precision_is_gathered():
    model = zoo.tiny("llama")
    x = mx.random.normal((1, 2, 5, 8)).astype(mx.bfloat16)
    with enable(model):
        k, _ = model.make_cache()[0].update_and_fetch(x, x)
        assert reason_for(x, k, "causal") is None
        assert reason_for(x.astype(mx.float32), k, "causal") is None
        assert reason_for(x.astype(mx.float16), k, "causal").startswith("q is ")


def reason_for(q, k, mask):
    return hook.find_route(k.source, q, mask).reason


def test_k_and_v_that_are_not_one_layers_are_gathered():
    model = zoo.tiny("llama")
    x = mx.random.normal((1, 2, 1, 8))
    with enable(model) as paged:
        first, second, _ = model.make_cache()
        k, v = first.update_and_fetch(x, x)
        _, other = second.update_and_fetch(2 * x, 3 * x)
        for keys, values, expected in ((k, other, 3 * x), (k, x, x), (k, k, x), (v, k, x)):
            found = mx.fast.scaled_dot_product_attention(x, keys, values, scale=1.0)
            assert mx.allclose(found, expected)
        assert paged.gathered_calls == {
            "K and V are not one layer's, or were changed in place": 3,
            "K is V too, of latent attention": 1,
        }


def test_the_mask_of_another_step_is_gathered():
    model = zoo.tiny("llama")
    x = mx.random.normal((1, 2, 5, 8))
    with enable(model):
        cache = model.make_cache()[0]
        old = cache.make_mask(5, return_array=True)
        cache.update_and_fetch(x, x)
        mask = cache.make_mask(5, return_array=True)
        k, _ = cache.update_and_fetch(x, x)
        assert reason_for(x, k, old) == "the mask is of another step"
        assert reason_for(x, k, mask) is None


def test_calls_that_are_not_ours_pass_through():
    q = mx.random.normal((1, 4, 3, 8))
    expected = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5, mask="causal")
    with enable(zoo.tiny("llama")) as paged:
        found = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5, mask="causal")
        assert mx.array_equal(found, expected)
        assert paged.paged_calls == 0


def test_the_mask_of_a_batch_is_the_windows():
    model = zoo.tiny("gemma3_text")
    with enable(model, page_size=8, retain=0) as paged:
        layer = model.make_cache()[0]
        x = mx.random.normal((1, 2, 40, 8))
        layer.update_and_fetch(x, x)
        batch = layer.merge([layer, paged.make_cache()[0]])
        mask = batch.make_mask(1)
        one = mx.repeat(x[:, :, :1], 2, axis=0)
        batch.update_and_fetch(one, one)
        columns = batch.step.num_columns
        assert batch.step.first_column == 0
        seen = [[17 <= j <= 40 for j in range(columns)], [j == 40 for j in range(columns)]]
        assert mask[:, 0, 0].tolist() == seen


def test_an_enabled_model_says_which_routes_each_layer_has_taken():
    model = zoo.tiny("gemma3_text")
    assert explain(model).calls == {}
    with enable(model, page_size=8) as paged:
        zoo.single(model, zoo.prompt(20, seed=1), max_tokens=5, chunk=32)  # 2 + 5 passes
        found = explain(model)
        calls = 3 * 7
        assert found.calls == paged.routes == {"pages": calls}
        assert [layer.calls for layer in found.layers] == [{"pages": 7}] * 3
        assert str(found).endswith(f"calls so far: {calls} pages")
        x = mx.random.normal((1, 2, 5, 8))
        k, v = model.make_cache()[2].update_and_fetch(x, x)
        mx.fast.scaled_dot_product_attention(x, k, v, scale=1.0, mask=None)
        declined = "gather: attention is not causal"
        assert explain(model).layers[2].calls == {"pages": 7, declined: 1}
        assert f"{calls} pages, 1 {declined}" in str(explain(model))
    assert explain(model).calls == {}
