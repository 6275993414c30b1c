"""What paged caches promise to models and to mlx-lm beyond the numbers: kinds, layouts, masks."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from paged_mlx.forward.gathered import PagedMask  # noqa: E402
from paged_mlx.mlx_lm import PagedKVCache, enable, versions  # noqa: E402

LENGTHS = (3, 21, 10)


def test_a_cache_is_of_the_kind_that_the_stock_cache_is():
    model = zoo.tiny("gemma3_text")
    kinds = [type(cache) for cache in stock.make_prompt_cache(model)]
    with enable(model):
        caches = stock.make_prompt_cache(model)
    for cache, kind in zip(caches, kinds):
        assert isinstance(cache, PagedKVCache)
        assert isinstance(cache, kind)
    assert [cache.max_size for cache in caches[:2]] == [zoo.WINDOW] * 2


def test_keys_values_and_state_are_this_sequences_as_the_stock_caches(tmp_path):
    model = zoo.tiny("gemma3_text")
    prompts = [zoo.prompt(n, seed=n) for n in (40, 9)]
    plain = [stock.make_prompt_cache(model) for _ in prompts]
    for prompt, cache in zip(prompts, plain):
        model(mx.array([prompt]), cache=cache)
    with enable(model, page_size=8):
        ours = [stock.make_prompt_cache(model) for _ in prompts]
        for prompt, cache in zip(prompts, ours):
            model(mx.array([prompt]), cache=cache)
        for cache, expected in zip(ours, plain):
            for layer, other in zip(cache, expected):
                held = layer.keys.shape[2]
                for found, whole in zip((layer.keys, layer.values), other.keys_and_values()):
                    assert mx.allclose(found[:, :, -9:], whole[:, :, -9:], atol=1e-5)
                assert held >= 9 and len(layer.state) == len(other.state)
                assert [type(x) for x in layer.state] == [type(x) for x in other.state]
        # mlx-lm's own function saves it as what it says it is.
        path = str(tmp_path / "prompt.safetensors")
        stock.save_prompt_cache(path, ours[0])
        loaded = stock.load_prompt_cache(path)
        assert [type(layer) for layer in loaded] == [type(layer) for layer in plain[0]]
    answers = [zoo.single(model, [5], 6, cache=cache) for cache in (loaded, plain[0])]
    assert answers[0] == answers[1]


def test_a_batch_is_trimmed_by_a_number_for_each_row():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(n, seed=n) for n in (20, 9, 14)]
    cut = [prompt[: len(prompt) - n] for prompt, n in zip(prompts, (7, 0, 3))]
    expected = [zoo.single(model, prompt + [5], 6) for prompt in cut]
    with enable(model, page_size=8) as paged:
        rows = [paged.make_cache() for _ in prompts]
        for prompt, cache in zip(prompts, rows):
            model(mx.array([prompt]), cache=cache)
        batch = [layers[0].merge(list(layers)) for layers in zip(*rows)]
        for layer in batch:
            with pytest.raises(ValueError, match="n must have a number for each of 3 sequences"):
                layer.trim([1, 2])
            for bad in ([1, -2, 0], [1, 0.5, 0], [[1], [2], [0]], mx.array(-1)):
                with pytest.raises(ValueError, match=r"\[trim\] n must be"):
                    layer.trim(bad)
            assert layer.trim(mx.array(0)) == 0
            assert layer.lens.tolist() == [20, 9, 14]
        assert [layer.trim([7, 0, 3]) for layer in batch] == [[7, 0, 3]] * 3
        alone = [[layer.extract(i) for layer in batch] for i in range(3)]
        assert [zoo.single(model, [5], 6, cache=cache) for cache in alone] == expected
        with pytest.raises(ValueError, match=r"\[trim\] n must be"):
            rows[0][0].trim(-5)
        paged.check()


def test_a_refused_trim_changes_nothing_in_any_layer():
    model = zoo.tiny("llama")
    model.make_cache = lambda: [
        stock.KVCache(),
        stock.RotatingKVCache(zoo.WINDOW),
        stock.RotatingKVCache(zoo.WINDOW),
    ]
    with enable(model, page_size=8, retain=8):
        cache = stock.make_prompt_cache(model)
        zoo.single(model, zoo.prompt(90, seed=1), 2, cache=cache)
        before = [layer.offset for layer in cache]
        with pytest.raises(ValueError, match="n must leave the window's pages in place"):
            stock.trim_prompt_cache(cache, 70)
        assert [layer.offset for layer in cache] == before
        mx.eval(model(mx.array([[3]]), cache=cache))


def test_a_trim_that_one_row_refuses_changes_no_row_of_a_batch():
    model = zoo.tiny("gemma3_text")
    prompts = [zoo.prompt(n, seed=n) for n in (90, 30)]
    with enable(model, page_size=8, retain=8) as paged:
        rows = [paged.make_cache() for _ in prompts]
        for prompt, cache in zip(prompts, rows):
            zoo.single(model, prompt, 1, cache=cache)
        batch = [layers[0].merge(list(layers)) for layers in zip(*rows)]
        before = [layer.lens.tolist() for layer in batch]
        for layer in batch:
            with pytest.raises(ValueError, match="n must leave the window's pages in place"):
                layer.trim([50, 3])
        assert [layer.lens.tolist() for layer in batch] == before
        assert [layer.trim([3, 20]) for layer in batch] == [[3, 20]] * 3


def test_rows_named_again_are_kept_as_forks():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(n, seed=n) for n in (20, 9)]
    expected = [zoo.single(model, prompts[i] + [t], 6) for i, t in ((1, 3), (1, 5), (0, 7))]
    with enable(model, page_size=8) as paged:
        rows = [paged.make_cache() for _ in prompts]
        for prompt, cache in zip(prompts, rows):
            model(mx.array([prompt]), cache=cache)
        batch = [layers[0].merge(list(layers)) for layers in zip(*rows)]
        for layer in batch:
            with pytest.raises(ValueError, match="batch_indices must be below 2"):
                layer.filter([2])
            for bad in ([-1], [0.5]):
                with pytest.raises(ValueError, match=r"\[filter\] batch_indices must be a whole"):
                    layer.filter(bad)
            for bad in (-1, 2):
                with pytest.raises(ValueError, match=r"\[extract\] idx must be"):
                    layer.extract(bad)
            layer.filter([1, 1, 0])
        model(mx.array([[3], [5], [7]]), cache=batch)
        alone = [[layer.extract(i) for layer in batch] for i in range(3)]
        for cache in alone:
            for layer in cache:
                layer.trim(1)
        found = [zoo.single(model, [t], 6, cache=c) for t, c in zip((3, 5, 7), alone)]
        assert found == expected
        paged.check()


def ragged(model, layer: int):
    """A batch cache of a layer, of sequences of LENGTHS, after a step of four tokens."""
    rows = [stock.make_prompt_cache(model)[layer] for _ in LENGTHS]
    for length, row in zip(LENGTHS, rows):
        row.update_and_fetch(*kv(1, length, seed=length))
    batch = rows[0].merge(rows)
    mask = batch.make_mask(4, return_array=True)
    return mask, batch.update_and_fetch(*kv(len(LENGTHS), 4, seed=0))


def kv(batch: int, tokens: int, seed: int):
    return mx.random.normal((2, batch, 2, tokens, 8), key=mx.random.key(seed))


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_gathered_batches_and_their_masks_are_laid_out_as_stocks(page_size):
    # Models count columns from the right: new tokens stand in the last ones, of every row.
    model = zoo.tiny("llama")
    expected_mask, expected = ragged(model, layer=0)
    with enable(model, page_size=page_size):
        mask, found = ragged(model, layer=0)
        assert mx.array_equal(mask, expected_mask)
        for ours, theirs in zip(found, expected):
            assert mx.array_equal(ours, theirs)


def test_gathered_batches_leave_out_pages_that_every_row_gave_back():
    model = zoo.tiny("gemma3_text")
    written = kv(2, 60, seed=1)
    with enable(model, page_size=8, retain=0):
        rows = [stock.make_prompt_cache(model)[0] for _ in range(2)]
        batch = rows[0].merge(rows)
        for start in range(0, 60, 10):
            found = batch.update_and_fetch(*written[..., start : start + 10, :])
        first = batch.step.first_column
        assert 0 < first <= 50 - zoo.WINDOW + 1
        for ours, expected in zip(found, written):
            assert mx.array_equal(ours, expected[:, :, first:])


def test_a_mask_that_passes_the_window_is_not_taken_for_the_window():
    # plamo3 asks for a token more than its window caches keep.
    model, asked = zoo.tiny("gemma3_text"), zoo.WINDOW + 1
    caches = [stock.make_prompt_cache(model)[0]]
    with enable(model):
        caches.append(stock.make_prompt_cache(model)[0])
        for cache in caches:
            cache.update_and_fetch(*kv(1, 40, seed=1))
        masks = [cache.make_mask(5, window_size=asked) for cache in caches]
        assert type(masks[1]) is mx.array
        assert type(caches[1].make_mask(5, window_size=zoo.WINDOW)) is PagedMask
        for ours, theirs in zip(*(cache.update_and_fetch(*kv(1, 5, seed=2)) for cache in caches)):
            assert ours.shape == theirs.shape
    assert mx.array_equal(*masks)


def test_an_older_mlx_lm_is_refused_in_one_sentence():
    with pytest.raises(ImportError) as error:
        versions.check("0.29.1")
    assert str(error.value) == (
        "paged_mlx.enable needs mlx-lm 0.31.3 or newer, because the caches of older ones have "
        "another contract; mlx-lm 0.29.1 is installed: run `pip install -U mlx-lm`."
    )


def test_a_newer_mlx_lm_is_taken_with_a_warning(caplog):
    versions.check("0.40.0.dev1+abc")
    assert "tested with mlx-lm 0.32.2; mlx-lm 0.40.0.dev1+abc is installed" in caplog.text


@pytest.mark.parametrize("installed", [*versions.TESTED, "0.32.1"])
def test_a_tested_mlx_lm_is_taken_in_silence(installed, caplog):
    versions.check(installed)
    assert not caplog.text
