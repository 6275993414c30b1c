"""Models on quantised pages: what mlx-lm does with pages, it does with these."""

import functools
from concurrent import futures
from itertools import product

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.cache import load_prompt_cache, trim_prompt_cache  # noqa: E402
from paged_mlx._native import BUILT  # noqa: E402
from paged_mlx.formats.page_format import PageFormats  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

PAIRS = ["q8", ("q8", "q4"), "q4", ("q4", None), (None, "q8")]
EVERY_PAIR = [pair for pair in product((None, "q8", "q4"), repeat=2) if pair != (None, None)]
SIZE = 8


def model(name="llama", **changes):
    sizes = dict(head_dim=64, num_key_value_heads=2, num_attention_heads=4) | changes
    return zoo.tiny(name, **sizes)


@pytest.mark.parametrize("kv_format", PAIRS, ids=str)
def test_answers_are_near_stocks_and_all_attention_reads_the_pages(kv_format):
    llama, tokens = model(), zoo.prompt(45, seed=1)
    stock: list = []
    expected = zoo.single(llama, tokens, 6, logprobs=stock)
    with enable(llama, kv_format=kv_format, page_size=SIZE) as paged:
        cache, logprobs = paged.make_cache(), []
        found = zoo.single(llama, tokens, 6, cache=cache, logprobs=logprobs)
        assert paged.paged_calls and not paged.gathered_calls
        paged.check()
        if paged.formats.have_open_pages:
            assert len(paged.groups[None].allocator.sealed) >= 5
    error = mx.abs(logprobs[0] - stock[0]).max().item()
    assert error < (0.02 if kv_format in ("q8", (None, "q8")) else 0.5)
    assert kv_format != "q8" or found == expected


@pytest.mark.parametrize("kv_format", PAIRS, ids=str)
def test_a_batch_that_prompts_join_and_leave_answers_as_each_prompt_alone(kv_format):
    llama = model()
    prompts = [zoo.prompt(length, seed=length) for length in (5, 33, 17)]
    with enable(llama, kv_format=kv_format, page_size=SIZE) as paged:
        together = zoo.batched(llama, prompts, (8, 3, 6), {2: 2})
        alone = [zoo.single(llama, p, n) for p, n in zip(prompts, (8, 3, 6))]
        assert together == alone and not paged.gathered_calls
        paged.check()
        paged.passes.reclaim()
        assert not paged.groups[None].allocator.sealed


@pytest.mark.parametrize("kv_format", ["q8", "q4"])
def test_drafts_that_are_taken_back_leave_the_codes_alone(kv_format):
    llama, draft = model(), model(seed=5)
    tokens = zoo.prompt(SIZE * 3 - 2, seed=2)
    with enable(llama, kv_format=kv_format, page_size=SIZE) as paged, enable(draft):
        plain = zoo.single(llama, tokens, 12)
        found = zoo.speculative(llama, draft, tokens, 12)
        paged.check()
    assert kv_format != "q8" or found == plain
    assert len(found) == 12


def test_a_trim_into_a_sealed_page_makes_the_table_ragged():
    llama, tokens = model(), zoo.prompt(30, seed=3)
    with enable(llama, kv_format="q4", page_size=SIZE) as paged:
        cache = paged.make_cache()
        llama(mx.array([tokens]), cache=cache)
        before = [np.array(layer.keys) for layer in cache]
        for layer in cache:
            assert layer.trim(9) == 9
        llama(mx.array([tokens[21:24]]), cache=cache)
        table = cache[0].rows[0].tables[None]
        assert table.is_ragged and table.num_tokens == 24
        for layer, keys in zip(cache, before):
            np.testing.assert_array_equal(np.array(layer.keys)[:, :, :21], keys[:, :, :21])
        llama(mx.array([tokens[24:]]), cache=cache)
        paged.check()


@pytest.mark.parametrize("kv_format", PAIRS, ids=str)
def test_handles_read_what_the_pages_held_however_late(kv_format):
    llama = model()
    with enable(llama, kv_format=kv_format, page_size=SIZE) as paged:
        cache, held = paged.make_cache()[0], []
        x = mx.random.normal((4, 2, 1, 2, 11, 64))  # steps, K and V
        for k, v in x:
            held.append(cache.update_and_fetch(k, v))
        mx.eval(paged.groups[None].pools[0].state)
        cache.trim(30)
        cache.update_and_fetch(*x[3])  # the slots are another's now
        for step, (k, v) in enumerate(held):
            assert k.shape == (1, 2, 11 * (step + 1), 64)
            np.testing.assert_array_equal(np.array(k)[:, :, -11:], np.array(x[step, 0]))
            for found, side in ((k, 0), (v, 1)):
                whole = np.concatenate([np.array(x[i, side]) for i in range(step + 1)], axis=2)
                assert np.abs(np.array(found) - whole).max() < 0.6
        k, v = cache.keys, cache.values
        assert k.shape == v.shape == (1, 2, 25, 64)


@pytest.mark.parametrize("kv_format", ["q8", "q4"])
def test_prompts_that_begin_alike_share_quantised_pages(kv_format):
    llama, tokens = model(), zoo.prompt(40, seed=4)
    with enable(llama, kv_format=kv_format, page_size=SIZE, prefix_cache=True) as paged:
        first = zoo.single(llama, tokens, 5)
        group = paged.groups[None]
        known = sorted(group.allocator.sealed) or list(range(5))
        codes = [np.array(a)[known] for a in group.pools[0].state[0][:3]]
        second = zoo.single(llama, tokens, 5)
        assert paged.known(tokens) >= 32
        for a, before in zip(group.pools[0].state[0], codes):
            np.testing.assert_array_equal(np.array(a)[known], before)
        assert second == first
        cache, rest = paged.begin([*tokens, 7, 8])
        keys = cache[0].rows[0].history.keys
        assert PageFormats(*paged.formats).extra_keys[0] in keys and len(rest) <= 10
        paged.check()


@pytest.mark.parametrize("kv_format", PAIRS, ids=str)
def test_windows_forks_and_copies(kv_format):
    gemma = model("gemma3_text: window 5", sliding_window=SIZE * 2 + 1)
    tokens = zoo.prompt(50, seed=6)
    with enable(gemma, kv_format=kv_format, page_size=SIZE, retain=4) as paged:
        cache = paged.make_cache()
        gemma(mx.array([tokens]), cache=cache)
        fork = paged.fork(cache, 1)[0]
        for step in range(10):
            a = gemma(mx.array([[step]]), cache=cache)
            b = gemma(mx.array([[step]]), cache=fork)
            np.testing.assert_array_equal(np.array(a), np.array(b))
        paged.check()
        assert all(group.allocator.num_used for group in paged.groups.values())


@pytest.mark.parametrize("kv_format", PAIRS, ids=str)
@pytest.mark.parametrize("name, dtype", [("llama", mx.float16), ("gemma2", mx.float32)])
@pytest.mark.parametrize("length", [3 * SIZE - 1, 4 * SIZE])
def test_a_file_gives_the_codes_back_as_they_were(tmp_path, kv_format, name, dtype, length):
    changes, path = (
        {} if name == "llama" else dict(sliding_window=16),
        str(tmp_path / "cache.safetensors"),
    )
    own = model(name, **changes)
    own.set_dtype(dtype)
    with enable(own, kv_format=kv_format, page_size=SIZE) as paged:
        cache = paged.make_cache()
        mx.eval(own(mx.array([zoo.prompt(length, seed=7)]), cache=cache))
        mx.eval(own(mx.array([[5]]), cache=cache))
        paged.save(path, cache)
        again = paged.load(path)
        sealed = [group.allocator.sealed.copy() for group in paged.groups.values()]
        for a, b in zip(cache, again):
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                np.testing.assert_array_equal(*(np.array(z.astype(mx.float32)) for z in (x, y)))
        for step in range(2 * SIZE):  # pages are filled and sealed as in the first one
            logits = [own(mx.array([[step]]), cache=c).astype(mx.float32) for c in (cache, again)]
            np.testing.assert_array_equal(*map(np.array, logits))
        assert not paged.formats.have_open_pages or all(sealed)
        assert len(load_prompt_cache(path)) == len(cache)  # mlx-lm reads it too
        paged.check()


def test_a_file_of_ragged_pages_is_quantised_anew(tmp_path):
    llama, path = model(), str(tmp_path / "cache.safetensors")
    with enable(llama, kv_format="q4", page_size=SIZE) as paged:
        cache = paged.make_cache()
        mx.eval(llama(mx.array([zoo.prompt(3 * SIZE, seed=7)]), cache=cache))
        trim_prompt_cache(cache, 3)
        mx.eval(llama(mx.array([[5, 6]]), cache=cache))
        assert cache[0].rows[0].tables[None].is_ragged
        paged.save(path, cache)
        again = paged.load(path)
        assert not again[0].rows[0].tables[None].is_ragged
        a, b = (llama(mx.array([[3]]), cache=c) for c in (cache, again))
        assert mx.abs(a - b).max() < 0.1 * mx.abs(a).max()
        paged.check()


def test_a_file_of_another_format_is_refused(tmp_path):
    llama, tokens, path = model(), zoo.prompt(30, seed=7), str(tmp_path / "cache.safetensors")
    with enable(llama, kv_format="q8", page_size=SIZE) as paged:
        cache = paged.make_cache()
        llama(mx.array([tokens]), cache=cache)
        paged.save(path, cache)
        paged.load(path)
    for other in (None, "q4", ("q8", "q4")):
        with enable(llama, kv_format=other, page_size=SIZE) as paged:
            with pytest.raises(ValueError, match=r"^\[load\] path must be a file of pages of the"):
                paged.load(path)


def test_formats_that_a_model_cannot_have_are_refused():
    llama = model()
    for wrong, words in (
        (dict(kv_format="q5"), "kv_format must be None"),
        (dict(kv_format=("q8",)), "kv_format must be None"),
        (dict(kv_format="q4", page_size=4), "page_size must be at least 8"),
    ):
        with pytest.raises(ValueError, match=rf"^\[enable\] {words}"):
            enable(llama, **wrong)
    with pytest.raises(ValueError, match=r"^\[enable\] head_dim must be a multiple of 32"):
        enable(zoo.tiny("llama", head_dim=80), kv_format="q8")
    assert "make_cache" not in vars(llama)


def test_bytes_of_pages_are_those_of_the_format_and_max_bytes_holds_more_of_them():
    llama = model()
    sizes = {}
    for kv_format in (None, "q8", "q4"):
        with enable(llama, kv_format=kv_format, page_size=64, max_bytes=600_000) as paged:
            group = paged.groups[None]
            sizes[kv_format] = group.page_bytes
            assert group.most_pages == 600_000 // (group.page_bytes * 4 // 3)  # one layer twice
            zoo.single(llama, zoo.prompt(100, seed=8), 4)
            assert paged.nbytes <= 600_000
    assert sizes["q8"] < sizes[None] / 3 and sizes["q4"] < sizes["q8"] * 0.6  # of float32
    with enable(llama, kv_format="q4") as paged:
        assert paged.page_size == 64
    with enable(llama, kv_format="q8") as paged:
        assert paged.page_size == 16


@functools.cache
def peak_beside_the_pages(kv_format, context: int = 2048) -> int:
    """Most bytes that passes over ``context`` tokens and some steps take beside a model's pages."""
    llama = model()
    with enable(llama, kv_format=kv_format, page_size=64, num_pages=context // 64 + 2) as paged:
        cache = paged.make_cache()
        for n, count in enumerate([64] * (context // 64) + [1] * 4):
            mx.eval(llama(mx.array([zoo.prompt(count, seed=n)]), cache=cache))
            if n == 0:  # the pages have their memory
                mx.clear_cache()
                mx.reset_peak_memory()
                before = mx.get_active_memory()
        return mx.get_peak_memory() - before


@pytest.mark.skipif(not BUILT, reason="MLX's own operations copy pages as they write")
@pytest.mark.parametrize("kv_format", EVERY_PAIR, ids=str)
def test_a_model_takes_as_much_beside_quantised_pages_as_beside_dense_ones(kv_format):
    open_page = len(model().layers) * 2 * 64 * (64 + 64) * 4  # of a sequence, in all layers
    assert peak_beside_the_pages(kv_format) <= peak_beside_the_pages(None) + open_page


def test_pages_follow_the_dtype_of_the_model():
    llama, tokens = model(), zoo.prompt(30, seed=9)
    with enable(llama, kv_format="q4", page_size=SIZE) as paged:
        cache = paged.make_cache()
        llama(mx.array([tokens]), cache=cache)
        before = np.array(cache[0].keys)
        llama.set_dtype(mx.bfloat16)
        llama(mx.array([tokens[:5]]), cache=cache)
        assert paged.groups[None].pools[0].dtype == mx.bfloat16
        keys = np.array(cache[0].keys.astype(mx.float32))
        assert np.abs(keys[:, :, :30] - before).max() < 0.1 * np.abs(before).max()
        paged.check()


class Fault(Exception):
    pass


def passes_of(model, cache, between=lambda: None, length=21):
    """Logits of passes over a prompt and a token, computed at the end: 16 tokens fill a page."""
    tokens, out = zoo.prompt(length, seed=1), []
    mx.eval(model(mx.array([tokens[:13]]), cache=cache))
    out.append(model(mx.array([tokens[13:]]), cache=cache))
    between()
    return [np.array(logits[0, -1]) for logits in (*out, model(mx.array([[3]]), cache=cache))]


def in_another_thread(do):
    def done():
        try:
            return do()
        finally:
            mx.synchronize()

    with futures.ThreadPoolExecutor(1) as other:
        return other.submit(done).result(timeout=60)


def in_the_middle(monkeypatch, model, do, calls=()):
    """Have ``do()`` called in the middle of the model's ``calls``-th passes from now on."""
    middle, passes = model.layers[1].mlp, []

    def stopping(self, x, before=type(middle).__call__):
        if self is middle:
            passes.append(1)
            if len(passes) in calls:
                do()
        return before(self, x)

    monkeypatch.setattr(type(middle), "__call__", stopping)


@pytest.mark.parametrize("kv_format", EVERY_PAIR, ids=str)
def test_a_pass_goes_on_in_memory_that_another_thread_has_taken(kv_format, monkeypatch):
    llama, held = model(), []
    with enable(llama, kv_format=kv_format, page_size=SIZE) as paged:
        expected = passes_of(llama, paged.make_cache())
        group = paged.groups[None]
        before = group.allocator.total_pages

        def grows():
            held.extend(paged.make_cache() for _ in range(before // 3))
            for cache in held:
                mx.eval(llama(mx.array([zoo.prompt(30, seed=2)]), cache=cache))

        in_the_middle(monkeypatch, llama, lambda: in_another_thread(grows), calls=(2,))
        found = passes_of(llama, paged.make_cache())
        assert group.allocator.total_pages > before
        np.testing.assert_array_equal(found, expected)  # codes and scales are moved as they are
        paged.check()


def test_memory_for_open_pages_that_a_failed_pass_took_is_there_for_other_threads(monkeypatch):
    llama, held = model(), []
    with enable(llama, kv_format="q4", page_size=SIZE) as paged:
        expected = passes_of(llama, paged.make_cache(), length=14)
        pages = paged.groups[None].pools[0].open_pages
        slots = pages.num_slots

        def fails():
            raise Fault

        def takes_memory():
            held.extend(paged.make_cache() for _ in range(slots + 1))
            for cache in held[:-1]:
                mx.eval(llama(mx.array([[5, 6]]), cache=cache))
            with pytest.raises(Fault):
                llama(mx.array([[5, 6]]), cache=held[-1])

        in_the_middle(monkeypatch, llama, fails, calls=(2 + slots + 1,))
        others = functools.partial(in_another_thread, takes_memory)
        found = passes_of(llama, paged.make_cache(), others, length=14)
        assert pages.num_slots > slots
        np.testing.assert_allclose(found, expected, atol=1e-3)
        paged.check()


def test_open_pages_stay_where_another_threads_handles_will_read_them():
    gemma, held = model("gemma2"), []
    other = futures.ThreadPoolExecutor(1)
    with other, enable(gemma, kv_format="q4", page_size=SIZE) as paged:
        expected = passes_of(gemma, paged.make_cache())

        def appends():
            for seed in range(4):
                held.append(paged.make_cache())
                mx.eval(gemma(mx.array([zoo.prompt(13, seed=seed)]), cache=held[-1]))
                mx.eval(gemma(mx.array([[1, 2, 3, 4]]), cache=held[-1]))
            mx.synchronize()

        found = passes_of(gemma, paged.make_cache(), lambda: other.submit(appends).result(60))
        np.testing.assert_array_equal(found[0], expected[0])
        paged.check()


def answer_of(model, cache, length, steps):
    """Logits of a prompt and of each step after it, on one sequence."""
    out = [model(mx.array([zoo.prompt(length, seed=1)]), cache=cache)]
    for token in range(steps):
        out.append(model(mx.array([[token + 3]]), cache=cache))
        mx.eval(out[-1])
    return [np.array(logits[0, -1]) for logits in out]


@pytest.mark.parametrize("other_is_another_thread", [False, True])
def test_pages_are_sealed_though_the_pass_of_another_sequence_has_failed(
    monkeypatch, other_is_another_thread
):
    llama = model()
    with enable(llama, kv_format="q4", page_size=SIZE) as paged:
        expected = answer_of(llama, paged.make_cache(), 5, 3 * SIZE)
        pages, idle = paged.groups[None].pools[0].open_pages, paged.make_cache()

        def fails():
            raise Fault

        def leaves_a_pass_unfinished():
            with pytest.raises(Fault):
                llama(mx.array([[5, 6]]), cache=idle)

        in_the_middle(monkeypatch, llama, fails, calls=(1,))
        threads = futures.ThreadPoolExecutor(1)
        if other_is_another_thread:
            threads.submit(leaves_a_pass_unfinished).result(60)
        else:
            leaves_a_pass_unfinished()
        cache = paged.make_cache()
        found = answer_of(llama, cache, 5, 3 * SIZE)
        assert pages.is_awaiting and pages.num_open == 2  # one of each sequence
        np.testing.assert_array_equal(found, expected)
        threads.submit(mx.synchronize).result(60)
        threads.shutdown()
        paged.check()


def test_a_sequence_is_quantised_alike_whatever_other_threads_are_in_the_middle_of(monkeypatch):
    llama, found = model(), []
    other = futures.ThreadPoolExecutor(1)
    with other, enable(llama, kv_format="q4", page_size=SIZE) as paged:
        expected = answer_of(llama, paged.make_cache(), 5, 3 * SIZE)

        def answers():
            try:
                return answer_of(llama, paged.make_cache(), 5, 3 * SIZE)
            finally:
                mx.synchronize()

        def in_another():
            found.extend(other.submit(answers).result(60))

        in_the_middle(monkeypatch, llama, in_another, calls=(1,))
        mx.eval(llama(mx.array([zoo.prompt(13, seed=2)]), cache=paged.make_cache()))
        np.testing.assert_array_equal(found, expected)
        paged.check()
