"""More families of mlx-lm: latent attention, recurrent layers beside attention, experts."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm_zoo as zoo  # noqa: E402

from paged_mlx.mlx_lm import enable, explain  # noqa: E402

LATENT = {"deepseek_v3"}
OWN_ATTENTION = {"gear"}
HYBRID = {"lfm2": 1, "qwen3_next": 1}  # layers of three that attend
ALWAYS = LATENT | set(HYBRID)


def families():
    for family in zoo.MORE:
        yield pytest.param(family, marks=() if family in ALWAYS else pytest.mark.long)


@pytest.mark.parametrize("family", list(families()))
def test_tokens_equal_stock(family):
    model, prompt = zoo.tiny(family), zoo.prompt(40, seed=1)
    prompts = [zoo.prompt(length, seed=length) for length in (5, 33, 17)]
    single = zoo.single(model, prompt, max_tokens=8)
    batched = zoo.batched(model, prompts, [8, 3, 6], late={2: 2})
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, prompt, max_tokens=8) == single
        assert zoo.batched(model, prompts, [8, 3, 6], late={2: 2}) == batched
        paged.check()
        assert [group.pages_used for group in paged.groups.values()] == [0] * len(paged.groups)
        if family in LATENT:
            assert set(paged.gathered_calls) == {"K is V too, of latent attention"}
        elif family in OWN_ATTENTION:
            assert paged.paged_calls == 0
        else:
            assert paged.paged_calls > 0
            assert paged.gathered_calls == {}


@pytest.mark.parametrize("family", list(HYBRID))
def test_attention_beside_recurrent_layers_is_paged(family):
    found = explain(zoo.tiny(family))
    assert found.num_paged == HYBRID[family]
    others = {layer.reason for layer in found.layers if not layer.is_paged}
    assert others == {"ArraysCache holds no pages of K and V"}
