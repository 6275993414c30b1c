"""Half precision and quantised weights on pages: logits are stock's to the rounding."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm_compare as compare  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

pytestmark = pytest.mark.long

CANNOT_QUANTIZE = {"afm7"}  # its fused layers take no mode
ROUNDING = {mx.float16: 2**-10, mx.bfloat16: 2**-7}
FAMILIES = [family for family in zoo.FAMILIES if family not in compare.CHUNK]


@pytest.fixture(autouse=True)
def uncompiled():
    """Without ``mx.compile``: on a CPU it runs a C++ compiler for each new function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(model) -> mx.array:
    """Of every token of one prompt, read in chunks and then one by one."""
    tokens, cache = mx.array([zoo.prompt(46, seed=2)]), make_prompt_cache(model)
    ends = [13, 26, 39, *range(40, 47)]
    chunks = [tokens[:, start:end] for start, end in zip([0, *ends], ends)]
    found = mx.concatenate([model(chunk, cache=cache).astype(mx.float32) for chunk in chunks], 1)
    mx.eval(found)
    return mx.where(mx.isinf(found), 0, found)


def errors(model) -> list[float]:
    """Largest difference at each token, of the largest logit; the smallest first."""
    expected = logits(model)
    with enable(model, page_size=8) as paged:
        found = logits(model)
        paged.check()
    return sorted((mx.abs(found - expected).max(-1) / mx.abs(expected).max())[0].tolist())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype):
    model = zoo.tiny(family)
    model.set_dtype(dtype)
    try:
        found = errors(model)
    except RuntimeError as error:
        pytest.skip(f"mlx on a CPU: {error}")
    # A rounding that sends a token to another expert is no small one.
    assert found[len(found) * 3 // 4] < 8 * ROUNDING[dtype]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - CANNOT_QUANTIZE))
def test_quantised_weights(family):
    def fits(path, layer):
        return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0

    model = zoo.tiny(family)
    nn.quantize(model, group_size=32, bits=4, class_predicate=fits)
    assert errors(model)[-1] < compare.HALF.get(family, compare.TOLERANCE)
