"""enable(): what it changes, what it leaves alone, and how it is undone."""

import copy
import inspect
import pathlib
import sys

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache  # noqa: E402
from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx._native import BUILT  # noqa: E402
from paged_mlx.cli import mains  # noqa: E402
from paged_mlx.forward import seams  # noqa: E402
from paged_mlx.mlx_lm import PagedKVCache, enable, explain  # noqa: E402

STOCK_ATTENTION = mx.fast.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def attention_is_stock_afterwards():
    yield
    assert mx.fast.scaled_dot_product_attention is STOCK_ATTENTION


def test_disable_leaves_model_and_mlx_as_they_were():
    model = zoo.tiny("llama")
    before = dict(vars(model)), set(model.keys())
    paged = enable(model)
    assert mx.fast.scaled_dot_product_attention is not STOCK_ATTENTION
    assert isinstance(make_prompt_cache(model)[0], PagedKVCache)
    paged.disable()
    paged.disable()
    assert (dict(vars(model)), set(model.keys())) == before
    assert "make_cache" not in vars(model)
    assert type(make_prompt_cache(model)[0]) is KVCache


def patched() -> dict:
    """What can be replaced: all that mlx-lm's modules and classes, and MLX, hold by name."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name == "mlx.core.fast" or name.split(".")[0] == "mlx_lm":
            for owner in [module, *(x for x in vars(module).values() if isinstance(x, type))]:
                found |= {(name, repr(owner), key): value for key, value in vars(owner).items()}
    return found


FUNCTIONS = ("generate_step", "speculative_generate_step", "stream_generate", "batch_generate")


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_what_is_replaced_is_listed_and_says_what_it_said(prefix_cache):
    model = zoo.tiny("llama")
    before = patched()
    shown = [str(inspect.signature(getattr(zoo.GENERATE, name))) for name in FUNCTIONS]
    with enable(model, prefix_cache=prefix_cache):
        now = patched()
        names = {key[2] for key in now if now[key] is not before.get(key)}
        generate = [getattr(zoo.GENERATE, name) for name in FUNCTIONS]
        assert [str(inspect.signature(function)) for function in generate] == shown
        assert [inspect.isgeneratorfunction(f) for f in generate] == [True, True, True, False]
    replaced = {"scaled_dot_product_attention"}
    if prefix_cache:
        replaced |= {"__call__", "prompt", "insert_cache", "trim_to", *FUNCTIONS[:2]}
    assert names == replaced
    assert patched() == before


def test_the_table_of_what_is_replaced_is_in_the_docs():
    assert mains.SEAMS  # those of the commands
    with enable(zoo.tiny("llama"), prefix_cache=True, num_pages=9):
        docs = pathlib.Path(__file__).parents[2] / "docs" / "mlx_lm.md"
        assert seams.table() in docs.read_text("utf-8")


@pytest.mark.parametrize("order", ["theirs first", "ours first", "theirs between"])
def test_wrappers_of_others_stay_in_any_order(order, monkeypatch):
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt, 5)
    calls = []

    def wrap(before):
        def theirs(*args, **options):
            calls.append(1)
            return before(*args, **options)

        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", theirs)
        monkeypatch.setattr(zoo.GENERATE, "generate_step", wrapped_generator(calls))

    if order == "theirs first":
        wrap(mx.fast.scaled_dot_product_attention)
    paged = enable(model, page_size=8, prefix_cache=True)
    if order != "theirs first":
        wrap(mx.fast.scaled_dot_product_attention)
    for _ in range(2):
        assert zoo.single(model, prompt, 5) == expected
        assert (paged.paged_calls > 0) == BUILT
        paged.disable()
        calls.clear()
        assert zoo.single(model, prompt, 5) == expected
        assert calls, "theirs was taken away"
        if order == "theirs between":
            paged.enable()
    paged.disable()
    monkeypatch.undo()
    mx.fast.scaled_dot_product_attention = STOCK_ATTENTION


def wrapped_generator(calls):
    before = zoo.GENERATE.generate_step

    def generate_step(*args, **options):
        calls.append(2)
        yield from before(*args, **options)

    return generate_step


def test_disable_gives_back_a_make_cache_of_the_instance():
    model = zoo.tiny("llama")
    model.make_cache = make_cache = lambda: [KVCache() for _ in model.layers]
    with enable(model):
        assert model.make_cache is not make_cache
    assert model.make_cache is make_cache


def test_leaving_the_block_by_an_error_disables():
    model = zoo.tiny("llama")
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    assert "make_cache" not in vars(model)


def test_other_models_keep_their_caches():
    model, other = zoo.tiny("llama"), zoo.tiny("llama", seed=1)
    prompt = zoo.prompt(20, seed=1)
    expected = zoo.single(other, prompt, max_tokens=5)
    with enable(model) as paged:
        assert type(make_prompt_cache(other)[0]) is KVCache
        assert zoo.single(other, prompt, max_tokens=5) == expected
        assert paged.paged_calls == 0


@pytest.mark.native
def test_two_models_can_be_enabled_and_disabled_in_any_order():
    first, second = enable(zoo.tiny("llama")), enable(zoo.tiny("llama", seed=1))
    first.disable()
    assert mx.fast.scaled_dot_product_attention is not STOCK_ATTENTION
    second.disable()


def test_a_cache_outlives_disable_and_stays_right():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt, max_tokens=8)
    with enable(model) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([prompt[:-1]]), cache=cache)
        calls = paged.paged_calls
    assert zoo.single(model, prompt[-1:], max_tokens=8, cache=cache) == expected
    assert paged.paged_calls == calls


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_copy_of_an_enabled_model_is_a_model_of_its_own(family, prefix_cache):
    model, prompt = zoo.tiny(family), zoo.prompt(20, seed=1)
    with enable(model, page_size=8, prefix_cache=prefix_cache) as paged:
        expected = zoo.single(model, prompt, max_tokens=5)
        copied, shared = copy.deepcopy(model), copy.copy(model)
        assert type(make_prompt_cache(copied)[0]) is KVCache
        calls = paged.paged_calls
        assert zoo.single(copied, prompt, max_tokens=5) == expected
        assert paged.paged_calls == calls
        with enable(copied, page_size=8, prefix_cache=prefix_cache) as other:
            assert zoo.single(copied, prompt, max_tokens=5) == expected
            assert (other.paged_calls > 0) == BUILT
            other.check()
        # Another name of the same weights, or so it was: its prompts are not shared.
        assert zoo.single(shared, prompt, max_tokens=5) == expected
        paged.check()


@pytest.mark.parametrize(
    "options, word",
    [({"page_size": 0}, "page_size"), ({"num_pages": 0}, "num_pages"), ({"retain": -1}, "retain")],
)
def test_options_out_of_range_are_refused_and_change_nothing(options, word):
    model = zoo.tiny("llama")
    with pytest.raises(ValueError, match=rf"\[enable\] {word} must be"):
        enable(model, **options)
    assert "make_cache" not in vars(model)


def test_enabling_twice_is_refused():
    model = zoo.tiny("llama")
    with enable(model), pytest.raises(ValueError, match="must not be enabled already"):
        enable(model)


def test_a_full_pool_says_so_and_changes_nothing():
    model = zoo.tiny("llama")
    with enable(model, page_size=8, num_pages=3) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([zoo.prompt(20, seed=1)]), cache=cache)
        with pytest.raises(OutOfPages):
            model(mx.array([zoo.prompt(20, seed=2)]), cache=cache)
        assert [layer.offset for layer in cache] == [20] * 3
        assert paged.groups[None].pages_used == 3
        logits = model(mx.array([[1]]), cache=cache)
        mx.eval(logits)
        paged.check()


def test_pools_grow_on_demand_to_little_more_than_is_needed_and_then_stay():
    model, prompt = zoo.tiny("llama"), zoo.prompt(600, seed=1)
    expected = zoo.single(model, prompt, max_tokens=6, chunk=128)
    with enable(model, page_size=4) as paged:
        group = paged.groups[None]
        for _ in range(2):  # what was needed once goes back
            assert zoo.single(model, prompt, max_tokens=6, chunk=128) == expected
        grown = paged.nbytes
        assert group.peak_pages == 152 and group.allocator.total_pages <= 152 + 19
        zoo.single(model, prompt, max_tokens=6, chunk=128)
        assert paged.nbytes == grown
        paged.check()


def test_fork_moves_no_bytes_and_diverges_by_copy_on_write():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    tails = [[3], [9], [27]]
    expected = [zoo.single(model, prompt + tail, max_tokens=6) for tail in tails]
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        assert paged.groups[None].pages_used == 3
        forks = paged.fork(cache, 3)
        assert paged.groups[None].pages_used == 3
        found = [zoo.single(model, t, max_tokens=6, cache=c) for t, c in zip(tails, forks)]
        assert found == expected
        # Two full pages are still shared by all; each fork has its own copy of the third.
        shared = {tuple(ids[:2]) for ids in paged.groups[None].page_map()}
        assert len(shared) == 1


def test_a_deep_copy_layer_by_layer_is_one_sequence():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        copied = [copy.deepcopy(layer) for layer in cache]
        assert len({layer.rows[0].name for layer in copied}) == 1
        again = [copy.deepcopy(layer) for layer in cache]
        assert again[0].rows[0].name != copied[0].rows[0].name
        assert paged.groups[None].pages_used == 3


def test_a_copy_of_one_layer_is_not_taken_for_the_copy_of_a_later_time():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt + [7, 5], max_tokens=6)
    with enable(model, page_size=8):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        early = copy.deepcopy(cache[0])
        model(mx.array([[7]]), cache=cache)
        later = copy.deepcopy(cache)
        assert early.offset == 20
        assert len({layer.rows[0].name for layer in later}) == 1
        assert zoo.single(model, [5], max_tokens=6, cache=later) == expected


def test_caches_given_to_a_batch_are_not_modified():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    tails = [[3, 5], [9], [27, 81, 11]]
    expected = [zoo.single(model, prompt + tail, max_tokens=6) for tail in tails]
    with enable(model, page_size=8):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        assert zoo.batched(model, tails, [6] * 3, caches=[cache] * 3) == expected
        assert [layer.offset for layer in cache] == [20] * 3
        assert zoo.single(model, tails[0], max_tokens=6, cache=cache) == expected[0]


def test_nbytes_divides_a_shared_page_among_its_holders():
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([zoo.prompt(16, seed=1)]), cache=cache)
        alone = sum(layer.nbytes for layer in cache)
        assert alone == paged.nbytes_used == 2 * 8 * 2 * 8 * 2 * 4 * 3
        forks = paged.fork(cache, 3)
        assert sum(layer.nbytes for c in [cache, *forks] for layer in c) == alone


def test_a_merge_of_caches_of_two_models_is_refused():
    with enable(zoo.tiny("llama")) as first, enable(zoo.tiny("llama")) as second:
        ours, theirs = first.make_cache()[0], second.make_cache()[0]
        with pytest.raises(ValueError, match=r"\[merge\] caches must be of one layer"):
            ours.merge([ours, theirs])


def test_kv_bits_goes_on_in_mlx_lms_quantised_cache(caplog):
    model, prompt = zoo.tiny("llama", head_dim=64), zoo.prompt(30, seed=1)

    def tokens(cache):
        steps = zoo.GENERATE.generate_step(
            mx.array(prompt),
            model,
            max_tokens=8,
            kv_bits=8,
            quantized_kv_start=0,
            prompt_cache=cache,
        )
        return [int(token) for token, _ in steps]

    expected = tokens(make_prompt_cache(model))
    with enable(model):
        cache = make_prompt_cache(model)
        assert tokens(cache) == expected
        assert all(type(layer) is QuantizedKVCache for layer in cache)
    assert "kv_bits" in caplog.text


def test_the_batch_of_a_cache_cannot_change():
    model = zoo.tiny("llama")
    with enable(model):
        cache = make_prompt_cache(model)
        model(mx.array([[1, 2]]), cache=cache)
        with pytest.raises(ValueError, match="keys must have a batch of 1"):
            model(mx.array([[1, 2], [3, 4]]), cache=cache)


def test_max_kv_size_is_for_models_without_make_cache_which_an_enabled_one_has():
    model, prompt = zoo.tiny("qwen2"), zoo.prompt(40, seed=1)
    expected = zoo.single(model, prompt, 8)
    with enable(model):
        cache = make_prompt_cache(model, max_kv_size=16)
        assert zoo.single(model, prompt, max_tokens=8, cache=cache) == expected


def test_with_prefix_cache_max_kv_size_gets_mlx_lms_rotating_cache(caplog):
    model, prompt = zoo.tiny("qwen2"), mx.array(zoo.prompt(40, seed=1))

    def tokens():
        steps = zoo.GENERATE.generate_step(prompt, model, max_tokens=8, max_kv_size=16)
        return [int(token) for token, _ in steps]

    expected = tokens()
    with enable(model, prefix_cache=True) as paged:
        assert tokens() == expected
        assert paged.paged_calls == 0
    assert "max_kv_size=16" in caplog.text


@pytest.mark.parametrize("model", [None, object(), "llama", nn.Linear(3, 3)])
@pytest.mark.parametrize("function", [enable, explain])
def test_what_is_no_model_is_refused(function, model):
    name = function.__name__
    with pytest.raises(ValueError, match=rf"^\[{name}\] model must be a model of mlx-lm; got"):
        function(model)


def test_a_model_that_another_has_taken_over_is_not_taken_back():
    model = zoo.tiny("llama")
    first = enable(model)
    first.disable()
    with enable(model) as second:
        with pytest.raises(ValueError, match="must not be enabled already"):
            first.enable()
        assert model.make_cache.paged is second
    assert "make_cache" not in vars(model)


def test_a_cache_of_another_model_is_refused():
    model, other = zoo.tiny("llama"), zoo.tiny("llama", seed=1)
    with enable(model, prefix_cache=True) as paged, enable(other):
        cache = make_prompt_cache(other)
        with pytest.raises(ValueError, match=r"^\[model\] cache must be of this model"):
            zoo.single(model, [1, 2, 3], 2, cache=cache)
        with pytest.raises(ValueError, match=r"^\[fork\] prompt_cache must be of this model"):
            paged.fork(cache, 2)


def test_a_batch_that_began_before_enable_goes_on_as_it_began():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(n, seed=n) for n in (20, 9)]
    expected = zoo.batched(model, prompts, [12, 6], late={1: 4})
    opened, steps = [], []

    def enable_in_the_middle():
        steps.append(1)
        if len(steps) == 2:
            opened.append(enable(model))

    assert zoo.batched(model, prompts, [12, 6], late={1: 4}, watch=enable_in_the_middle) == expected
    opened[0].disable()


def test_a_prompt_that_joins_pages_after_disable_is_refused():
    model = zoo.tiny("llama")
    paged = enable(model)
    steps = []

    def disable_in_the_middle():
        steps.append(1)
        if len(steps) == 2:
            paged.disable()

    prompts = [zoo.prompt(n, seed=n) for n in (20, 9)]
    with pytest.raises(ValueError, match=r"^\[extend\] caches must be of one layer of one enabled"):
        zoo.batched(model, prompts, [12, 6], late={1: 4}, watch=disable_in_the_middle)
    pages, plain = paged.make_cache(), make_prompt_cache(model)
    for cache in (pages, plain):
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    for caches in ([pages[0], plain[0]], [plain[0], pages[0]]):
        merged = caches[0].merge(caches)
        assert mx.allclose(merged.keys[0, :, :3], merged.keys[1, :, :3])


def test_a_batch_begun_while_disabled_stays_on_mlx_lms_own_caches():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(9, seed=seed) for seed in range(2)]
    with enable(model) as paged:
        plain = [paged.stock_cache() for _ in prompts]
        paged.disable()
        generator = BatchGenerator(model, max_tokens=3)
        generator.insert(prompts, caches=plain)
        paged.enable()
        while generator.next_generated():
            kinds = {type(cache).__name__ for cache in generator._generation_batch.prompt_cache}
            assert kinds <= {"BatchKVCache"}
        assert paged.paged_calls == 0
