"""Memory of K and V behind mlx-lm: near the ideal, and none taken once warm."""

from itertools import chain

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx._native import _ext  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

BYTES_PER_TOKEN = 2 * 2 * 8 * 4 * 3  # K and V, heads, head_dim, float32, layers


@pytest.mark.parametrize(
    "lengths",
    [
        (2000, 700, 120, 15),
        (512,) * 8,
        pytest.param((4000, *[30] * 7), marks=pytest.mark.long),
    ],
)
def test_a_ragged_batch_holds_at_most_5_percent_more_than_its_tokens(lengths):
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(length, seed=length) for length in lengths]

    def held(count):
        """What is held when all have begun to answer, for each byte of their tokens."""
        generator = BatchGenerator(model, max_tokens=20, prefill_step_size=256)
        generator.insert(prompts)
        while len(generator.next_generated()) < len(lengths):
            pass
        tokens = sum(map(len, generator._generation_batch.tokens))
        return count(generator) / (tokens * BYTES_PER_TOKEN)

    def of_stock(generator):
        return sum(cache.nbytes for cache in generator._generation_batch.prompt_cache)

    assert held(of_stock) >= 1.3
    with enable(model) as paged:
        assert 1 <= held(lambda _: paged.nbytes_used) <= 1.05
        # A pool that grows on demand is a little larger than was ever needed.
        peak = paged.groups[None].peak_pages
        assert paged.groups[None].allocator.total_pages <= max(64, 9 / 8 * peak + 2 * len(lengths))
        assert paged.gathered_calls == {}


def churn(model, num_steps: int) -> None:
    """Joins and leaves at every few steps, lengths that repeat."""
    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=4)
    joined = 0
    for step in range(num_steps):
        if step % 3 == 0:
            generator.insert(
                [zoo.prompt(5 + joined % 29, seed=joined % 7)], max_tokens=[3 + joined % 11]
            )
            joined += 1
        generator.next()


@pytest.mark.parametrize("num_steps", [80, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "family, prefix_cache", [("llama", False), ("llama", True), ("gemma3_text", True)]
)
def test_joins_and_leaves_take_no_memory_once_warm(family, prefix_cache, num_steps):
    model = zoo.tiny(family)
    # One array of K of one layer is larger than all that a step computes.
    with enable(model, page_size=8, num_pages=2048, prefix_cache=prefix_cache) as paged:
        churn(model, 60)
        pools = [pool for group in paged.groups.values() for pool in group.pools]
        for pool in pools:
            pool.check()
        smallest = min(pool.nbytes // (2 * pool.num_layers) for pool in pools)
        assert smallest == 2048 * 2 * 8 * 8 * 4

        def memory():
            mx.eval([pool.state for pool in pools])
            addresses = [_ext.data_address(array) for pool in pools for array in chain(*pool.state)]
            return addresses, paged.nbytes, _ext.buffer_copies()

        before, active = memory(), mx.get_active_memory()
        mx.clear_cache()
        mx.reset_peak_memory()
        churn(model, num_steps)
        assert memory() == before
        # No array as large as the K of a layer was made, not for a moment.
        assert mx.get_peak_memory() - active < smallest
        if not prefix_cache:
            assert paged.groups[None].pages_used == 0
        paged.check()


def test_a_pool_that_grows_takes_no_memory_once_warm():
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        churn(model, 60)
        nbytes = paged.nbytes
        churn(model, 60)
        assert paged.nbytes == nbytes


def test_a_limited_pool_at_the_memory_limit_is_out_of_pages_and_goes_on():
    model = zoo.tiny("llama")
    prompt = zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt, max_tokens=5)
    with enable(model, page_size=8, max_bytes=10**8) as paged:
        assert zoo.single(model, prompt, max_tokens=5) == expected
        (pool,) = paged.groups[None].pools
        pool.memory_limit = 0
        with pytest.raises(OutOfPages, match=r"^\[update_and_fetch\] the pool must have"):
            zoo.single(model, zoo.prompt(2000, seed=2), max_tokens=5)
        assert zoo.single(model, prompt, max_tokens=5) == expected
        pool.check()


def test_without_a_limit_pools_grow_past_the_memory_limit_as_mlx_lms_caches_do(caplog):
    model = zoo.tiny("llama")
    prompt = zoo.prompt(900, seed=2)
    expected = zoo.single(model, prompt, max_tokens=5)
    with enable(model, page_size=8) as paged:
        zoo.single(model, prompt[:20], max_tokens=5)
        (pool,) = paged.groups[None].pools
        pool.memory_limit = 0
        assert zoo.single(model, prompt, max_tokens=5) == expected
        pool.check()
    assert "enable takes max_bytes" in caplog.text


@pytest.mark.parametrize("before, after", [("float16", "float32"), ("float32", "bfloat16")])
def test_pages_follow_the_dtype_of_the_model(before, after):
    model, prompt = zoo.tiny("llama"), zoo.prompt(40, seed=1)
    model.set_dtype(getattr(mx, after))
    model.set_dtype(getattr(mx, before))  # rounded by both
    model.set_dtype(getattr(mx, after))
    plain = model(mx.array([prompt]))[:, -1]
    model.set_dtype(getattr(mx, before))
    with enable(model, page_size=8) as paged:
        going_on = make_prompt_cache(model)
        model(mx.array([prompt[:20]]), cache=going_on)
        model.set_dtype(getattr(mx, after))
        for cache in (make_prompt_cache(model), going_on):
            start = cache[0].offset
            found = model(mx.array([prompt[start:]]), cache=cache)[:, -1]
            assert found.dtype == getattr(mx, after)
            rounding = 1e-4 if after == "float32" and start == 0 else 0.1
            assert mx.abs(found - plain).max().item() < rounding
        assert {pool.dtype for pool in paged.groups[None].pools} == {getattr(mx, after)}
        assert paged.gathered_calls == {}
        paged.check()


def test_memory_is_estimated_and_given_back():
    model = zoo.tiny("gemma3_text")
    prompts = [zoo.prompt(200, seed=seed) for seed in range(4)]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        estimate = paged.estimate([200] * 4, 10)
        zoo.batched(model, prompts, [10] * 4)
        assert estimate.fits and abs(paged.nbytes / estimate.nbytes - 1) <= 0.05
        assert sum(g.pages_used for g in paged.groups.values()) > 0
        before = paged.nbytes
        assert paged.trim_memory() == before - paged.nbytes > before / 2
        assert zoo.batched(model, prompts, [10] * 4) == zoo.batched(model, prompts, [10] * 4)
        paged.check()
    with enable(model, page_size=8, num_pages=20) as paged:
        assert not paged.estimate([200], 10).fits
