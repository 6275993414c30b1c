"""Memory of K and V behind mlx-lm: near the ideal, and none taken once warm."""

from itertools import chain

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache  # noqa: E402
from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx._native import _ext  # noqa: E402
from paged_mlx.machine import memory  # noqa: E402
from paged_mlx.machine.memory import memory_limit as memory_limit_of  # noqa: E402
from paged_mlx.mlx_lm import PromptStore, enable  # noqa: E402
from paged_mlx.pages.allocator import PageAllocator  # noqa: E402

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
        churn(model, 60)
        nbytes = paged.nbytes
        churn(model, 60)
        assert paged.nbytes == nbytes


def test_memory_of_a_burst_goes_back_by_itself_and_stays_for_what_comes_again():
    model, burst = zoo.tiny("gemma3_text"), [zoo.prompt(300, seed=seed) for seed in range(6)]
    expected = zoo.batched(model, burst, [4] * 6)
    with enable(model, page_size=8) as paged:
        for _ in range(2):
            zoo.single(model, burst[0][:20], max_tokens=5)
        small = paged.nbytes
        assert zoo.batched(model, burst, [4] * 6) == expected
        assert paged.nbytes == small
        assert zoo.batched(model, burst, [4] * 6) == expected
        warm = paged.nbytes
        assert warm > 1.5 * small
        assert zoo.batched(model, burst, [4] * 6) == expected
        assert paged.nbytes == warm
        assert paged.trim_memory() > 0.9 * warm
        paged.check()


@pytest.fixture
def memory_limit():
    """Sets the limit of MLX's memory, until the test is over."""
    before = mx.get_memory_limit()
    yield lambda room: mx.set_memory_limit(mx.get_active_memory() + room)
    mx.set_memory_limit(before)


@pytest.mark.parametrize("options", [{}, {"max_bytes": 10**8}])
def test_a_pool_at_mlxs_memory_limit_is_out_of_pages_and_goes_on(options, memory_limit):
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt, max_tokens=5)
    with enable(model, page_size=8, **options) as paged:
        assert zoo.single(model, prompt, max_tokens=5) == expected
        nbytes = paged.nbytes
        memory_limit(30_000)
        with pytest.raises(OutOfPages, match=r"^\[update_and_fetch\] the pool must have"):
            zoo.single(model, zoo.prompt(2000, seed=2), max_tokens=5)
        assert paged.nbytes <= nbytes + 60_000
        assert zoo.single(model, prompt, max_tokens=5) == expected
        paged.check()


def test_without_a_limit_pools_grow_past_a_share_of_the_machine_and_never_past_all_of_it(
    caplog, monkeypatch
):
    model, prompt = zoo.tiny("llama"), zoo.prompt(900, seed=2)
    expected = zoo.single(model, prompt, max_tokens=5)
    with enable(model, page_size=8) as paged:
        zoo.single(model, prompt[:20], max_tokens=5)
        machine = mx.get_active_memory() + 10 * paged.nbytes
        monkeypatch.setattr(memory, "_usable", lambda: machine)
        monkeypatch.setattr(memory_limit_of, "__defaults__", (0.1,))
        assert zoo.single(model, prompt, max_tokens=5) == expected
        assert "enable takes max_bytes" in caplog.text
        with pytest.raises(OutOfPages, match="the machine has no memory for more"):
            zoo.single(model, zoo.prompt(9000, seed=2), max_tokens=5)
        assert zoo.single(model, prompt, max_tokens=5) == expected
        paged.check()


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5"])
def test_max_bytes_bounds_pages_prefixes_checkpoints_and_growth_together(
    family, page_size, monkeypatch
):
    model, most, taken = zoo.tiny(family), 6 * 10**5, []
    with enable(model, page_size=page_size, max_bytes=most, prefix_cache=True) as paged:
        checkpoints = paged.prefixes.checkpoints

        def grow(self, num_pages, before=PageAllocator.grow):
            before(self, num_pages)
            [group] = [group for group in paged.groups.values() if group.allocator is self]
            kept = checkpoints.nbytes if checkpoints is not None else 0
            taken.append(paged.nbytes + kept + group.nbytes // group.num_layers)

        monkeypatch.setattr(PageAllocator, "grow", grow)
        for seed in range(24):
            zoo.single(model, zoo.prompt(60 + seed, seed=seed), max_tokens=4)
        assert most / 3 < max(taken) <= most
        assert checkpoints is None or 0 < checkpoints.nbytes <= most // 16
        paged.check()


@pytest.mark.parametrize(
    "how", [pytest.param("in place", marks=pytest.mark.native), "copied a layer at a time"]
)
def test_a_step_that_grows_holds_at_most_one_layer_twice(how, monkeypatch):
    if how == "in place" and mx.is_available(mx.gpu):
        pytest.skip("pools have no reserved addresses")
    if how != "in place":
        monkeypatch.setattr(_ext, "resized_in_place", lambda *pages: None, raising=False)
    model = zoo.tiny("llama")
    keys = mx.zeros((1, 2, 40_000, 8))
    mx.eval(keys)
    with enable(model, page_size=16) as paged:
        cache = make_prompt_cache(model)
        for layer in cache:  # a prompt without its attention
            layer.update_and_fetch(keys, keys)
        token, group = mx.array([[1]]), paged.groups[None]
        mx.eval(model(token, cache=cache))
        before, active = paged.nbytes, mx.get_active_memory()
        mx.reset_peak_memory()
        while paged.nbytes == before:
            group.allocator.allocate_page()  # so that the next token finds none
            mx.eval(model(token, cache=cache))
        layers = 0 if how == "in place" else 1
        more = paged.nbytes - before + layers * paged.nbytes // group.num_layers
        assert mx.get_peak_memory() - active < more + before / 10
        paged.passes.wait()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("lengths, new", [([40] * 20, 60), ([1500], 300), ([700, 300, 10], 5)])
def test_an_estimate_is_what_is_then_taken(family, lengths, new):
    model = zoo.tiny(family)
    prompts = [zoo.prompt(length, seed=length) for length in lengths]
    with enable(model, page_size=8) as paged:
        estimate, peak = paged.estimate(lengths, new), 0
        generator = BatchGenerator(model, max_tokens=new)
        generator.insert(prompts)
        while generator.next_generated():
            peak = max(peak, paged.nbytes)
        assert estimate.fits and abs(peak / estimate.nbytes - 1) <= 0.05


@pytest.mark.parametrize("kind", ["mlx-lm's", "mlx-lm's, trimmed", "PromptStore"])
def test_the_bytes_of_a_prompt_store_bound_cached_prefixes_too(kind):
    model, most = zoo.tiny("llama"), 60_000
    with enable(model, page_size=8, prefix_cache=kind != "PromptStore") as paged:
        bytes_of_store = {} if "trimmed" in kind else {"max_bytes": most}
        store = LRUPromptCache(max_size=1000, **bytes_of_store)
        if kind == "PromptStore":
            store = PromptStore(paged, max_size=1000, max_bytes=most)
        for seed in range(12):
            cache, prompt = make_prompt_cache(model), zoo.prompt(100, seed=seed)
            zoo.single(model, prompt, 4, cache=cache)
            store.insert_cache("key", prompt, cache)
            del cache
            if "trimmed" in kind:
                store.trim_to(n_bytes=most)
            assert paged.nbytes_used <= most + 100 * BYTES_PER_TOKEN
        assert paged.known(zoo.prompt(100, seed=11)) > 90
        paged.check()


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
