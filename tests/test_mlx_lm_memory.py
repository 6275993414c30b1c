"""Memory of K and V behind mlx-lm: near the ideal, and none taken once warm."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402

from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx._native import _ext  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

BYTES_PER_TOKEN = 2 * 2 * 8 * 4 * 3  # K and V, heads, head_dim, float32, layers


@pytest.mark.parametrize("lengths", [(2000, 700, 120, 15), (512,) * 8, (900, 30, 30, 30)])
def test_a_ragged_batch_holds_at_most_5_percent_more_than_its_tokens(lengths):
    model = zoo.tiny("llama")
    with enable(model) as paged:
        prompts = [zoo.prompt(length, seed=length) for length in lengths]
        generator = BatchGenerator(model, max_tokens=4)
        generator.insert(prompts)
        steps = 0
        while generator.next_generated():
            steps += 1
            used, tokens = paged.nbytes_used, sum(lengths) + len(lengths) * (steps + 1)
            if steps < 3:
                assert tokens * BYTES_PER_TOKEN <= used <= 1.05 * tokens * BYTES_PER_TOKEN
        assert steps == 4


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


@pytest.mark.parametrize("num_steps", [120, pytest.param(1000, marks=pytest.mark.long)])
def test_joins_and_leaves_take_no_memory_once_warm(num_steps):
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        churn(model, 60)
        (pool,) = paged.groups[None].pools
        pool.check()
        addresses = [_ext.data_address(array) for array in pool.state]
        nbytes = paged.nbytes
        churn(model, num_steps)
        mx.eval(pool.state)
        assert [_ext.data_address(array) for array in pool.state] == addresses
        assert paged.nbytes == nbytes
        assert paged.groups[None].pages_used == 0


def test_a_pool_at_its_memory_limit_is_out_of_pages_and_goes_on():
    model = zoo.tiny("llama")
    prompt = zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt, max_tokens=5)
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, prompt, max_tokens=5) == expected
        (pool,) = paged.groups[None].pools
        pool.memory_limit = 0
        with pytest.raises(OutOfPages, match=r"^\[append_tokens\] the pool must have"):
            zoo.single(model, zoo.prompt(2000, seed=2), max_tokens=5)
        assert zoo.single(model, prompt, max_tokens=5) == expected
        pool.check()
