"""Prompt caches in files, and to and from mlx-lm's own."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_prompts as prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from paged_mlx.mlx_lm import enable  # noqa: E402

# Plain, windows, latent attention, and recurrent states beside attention.
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1"]
PROMPT = zoo.prompt(61, seed=1)


def read_prompt(model, cache):
    model(mx.array([PROMPT[:40]]), cache=cache)
    for i in range(40, 61):
        model(mx.array([PROMPT[i : i + 1]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache


@pytest.fixture(params=FAMILIES)
def model(request):
    return zoo.tiny(request.param)


@pytest.fixture
def expected(model):
    return zoo.single(model, [5], max_tokens=30, cache=read_prompt(model, make_prompt_cache(model)))


def test_a_saved_prompt_goes_on_after_a_restart(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(model, page_size=8) as paged:
        paged.save(path, read_prompt(model, paged.make_cache()), {"about": "a test"})
        assert os.path.getsize(path) < paged.nbytes / 2
    with enable(model, page_size=16) as paged:
        cache, metadata = paged.load(path, return_metadata=True)
        assert metadata == {"about": "a test"}
        assert zoo.single(model, [5], max_tokens=30, cache=cache) == expected
        assert paged.paged_calls > 0 or paged.gathered_calls
        paged.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_takes_the_bytes_of_its_tokens_whatever_the_size_of_the_pool(family, tmp_path):
    path, sizes = str(tmp_path / "prompt.safetensors"), []
    model = zoo.tiny(family)
    plain = read_prompt(model, make_prompt_cache(model))
    for num_pages in (64, 512):
        with enable(model, page_size=8, num_pages=num_pages) as paged:
            paged.save(path, read_prompt(model, paged.make_cache()))
            sizes.append(os.path.getsize(path))
            assert paged.nbytes > num_pages * 8 * sizes[0] / 150
    assert sizes[0] == sizes[1]
    needed = sum(nbytes_of(cache) for cache in plain)
    assert needed < sizes[0] < needed + 4096  # names, shapes and scalars


def nbytes_of(cache) -> int:
    """Bytes of what a stock cache remembers, unused room left out."""
    if hasattr(cache, "caches"):
        return sum(map(nbytes_of, cache.caches))
    if not hasattr(cache, "keys"):
        return cache.nbytes
    held = min(cache.offset, getattr(cache, "max_size", cache.offset))
    return sum(x.nbytes // x.shape[2] * held for x in (cache.keys, cache.values))


def test_mlx_lms_own_function_saves_the_tokens_of_a_paged_cache(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(model, page_size=8) as paged:
        cache = read_prompt(model, paged.make_cache())
        save_prompt_cache(path, cache, {"about": "a test"})  # imported before enable
        assert os.path.getsize(path) < paged.nbytes / 2
        found, metadata = paged.load(path, return_metadata=True)
        assert metadata == {"about": "a test"}
        assert zoo.single(model, [5], max_tokens=30, cache=found) == expected
    assert zoo.single(model, [5], max_tokens=30, cache=load_prompt_cache(path)) == expected


def test_mlx_lm_reads_our_file(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(model, page_size=8) as paged:
        paged.save(path, read_prompt(model, paged.make_cache()))
    assert zoo.single(model, [5], max_tokens=30, cache=load_prompt_cache(path)) == expected


def test_we_read_mlx_lms_file(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    save_prompt_cache(path, read_prompt(model, make_prompt_cache(model)))
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, [5], max_tokens=30, cache=paged.load(path)) == expected
        assert paged.paged_calls > 0 or paged.gathered_calls


def test_a_window_cache_that_holds_more_than_its_window_is_read(model):
    def read_at_once(cache):
        model(mx.array([PROMPT]), cache=cache)
        return cache

    stock = read_at_once(make_prompt_cache(model))
    expected = zoo.single(model, [5], max_tokens=20, cache=read_at_once(make_prompt_cache(model)))
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, [5], max_tokens=20, cache=paged.from_stock(stock)) == expected


def test_a_window_read_from_a_file_cannot_be_rewound_before_its_first_token():
    model = zoo.tiny("gemma3_text")
    stock = read_prompt(model, make_prompt_cache(model))
    with enable(model, page_size=64) as paged:
        cache = paged.from_stock(stock)
        assert can_trim_prompt_cache(cache)
        # One page holds all; what was not in the file is not in it.
        with pytest.raises(ValueError, match=r"\[trim\] n must leave the window's pages"):
            trim_prompt_cache(cache, 20)


def test_a_batch_can_be_joined_by_a_prompt_from_mlx_lm(model, expected):
    stock = read_prompt(model, make_prompt_cache(model))
    with enable(model, page_size=8) as paged:
        for cache in (paged.from_stock(stock), stock):
            # One of mlx-lm's own makes the batch mlx-lm's, and stays as it is.
            for caches in ([cache, paged.make_cache()], [paged.make_cache(), cache]):
                asked = [[5] if given is cache else PROMPT[:9] for given in caches]
                found = zoo.batched(model, asked, [9, 9], caches=caches)
                assert found[caches.index(cache)] == expected[:9]
        paged.check()
    again = zoo.single(model, [5], max_tokens=30, cache=stock)
    assert again == expected


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_hidden_layers": 2}, "must have 3 caches"),
        ({"num_key_value_heads": 4}, r"must hold \(batch, heads, dim of K, dim of V\)"),
    ],
)
def test_a_prompt_of_another_model_is_refused(other, message):
    cache = make_prompt_cache(zoo.tiny("llama", **other))
    zoo.tiny("llama", **other)(mx.array([[1, 2]]), cache=cache)
    with enable(zoo.tiny("llama")) as paged:
        with pytest.raises(ValueError, match=message):
            paged.from_stock(cache)
        assert paged.groups[None].pages_used == 0


def test_a_prompt_with_another_kind_of_cache_is_refused():
    cache = make_prompt_cache(zoo.tiny("llama"))
    with enable(zoo.tiny("gemma3_text")) as paged:
        with pytest.raises(ValueError, match="must have a RotatingKVCache of 24"):
            paged.from_stock(cache)


def test_a_prompt_whose_layers_differ_is_refused():
    model = zoo.tiny("llama")
    cache = read_prompt(model, make_prompt_cache(model))
    cache[1].trim(3)
    with enable(model) as paged:
        with pytest.raises(ValueError, match=r"equally many tokens in all layers; got \[58, 61\]"):
            paged.from_stock(cache)
        assert paged.groups[None].pages_used == 0


def test_a_window_of_a_long_prompt_takes_the_pages_that_its_file_holds():
    model = zoo.tiny("gemma3_text")
    stock = make_prompt_cache(model)
    model(mx.array([zoo.prompt(900, seed=1)]), cache=stock)
    model(mx.array([[3]]), cache=stock)
    expected = zoo.single(model, [5], max_tokens=8, cache=copy.deepcopy(stock))
    with enable(model, page_size=8) as paged:
        cache = paged.from_stock(stock)
        assert paged.groups[zoo.WINDOW].pages_used == 4
        assert paged.groups[zoo.WINDOW].peak_pages == 4
        assert zoo.single(model, [5], max_tokens=8, cache=cache) == expected
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_other_prompts_begin_with_one_that_was_saved(family, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    model = zoo.tiny(family)
    expected = zoo.single(model, PROMPT + [1, 2], max_tokens=6)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = paged.make_cache()
        zoo.single(model, PROMPT, max_tokens=1, cache=cache)
        paged.save(path, cache, {"about": "a test"})
        told = PROMPT + zoo.single(model, PROMPT, max_tokens=1)
    with enable(model, page_size=16, prefix_cache=True) as paged:
        cache, metadata = paged.load(path, return_metadata=True)
        assert metadata == {"about": "a test"}
        assert paged.prefixes.known(told + [1]) == len(told) == 62
        if family == "llama":  # without the file's pages a window or a state is of no use
            del cache
            assert zoo.single(model, PROMPT + [1, 2], max_tokens=6) == expected
            assert paged.prefixes.tokens_reused == 61
        paged.check()
    # Nobody knows which tokens are in a file of mlx-lm's.
    save_prompt_cache(path, read_prompt(model, make_prompt_cache(model)))
    with enable(model, page_size=8, prefix_cache=True) as paged:
        paged.load(path)
        assert all(cache.num_pages == 0 for cache in paged.prefixes.caches.values())


def test_a_prompt_of_mlx_lms_own_is_used_as_it_is():
    model = zoo.tiny("llama")
    stock = read_prompt(model, make_prompt_cache(model))
    expected = zoo.single(model, [5], max_tokens=6, cache=copy.deepcopy(stock))
    with enable(model) as paged:
        assert zoo.single(model, [5], max_tokens=6, cache=stock) == expected
        assert paged.paged_calls == 0


def older_file(path):
    """As mlx-lm 0.31 wrote it: strings of each cache's first, then metadata and classes."""
    k = mx.zeros((1, 2, 5, 8))
    arrays = {f"{layer}.{side}": k for layer in range(3) for side in range(2)}
    strings = {f"0.{layer}": "" for layer in range(3)} | {"1.model": "a name"}
    classes = {f"2.{layer}": "KVCache" for layer in range(3)}
    mx.save_safetensors(path, arrays, strings | classes)


def unknown_class(path):
    mx.save_safetensors(path, {"0.0": mx.zeros(1)}, {"1.0": "OtherCache", "2.0": ""})


def no_prompt(path):
    mx.save_safetensors(path, {"weight": mx.zeros((2, 2))})


def no_safetensors(path):
    with open(path, "w") as file:
        file.write("hello")


@pytest.mark.parametrize(
    "write",
    [unknown_class, no_prompt, no_safetensors, lambda path: None] + [older_file] * prompts.LATER,
)
def test_a_file_of_another_kind_is_refused(write, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    write(path)
    with enable(zoo.tiny("llama")) as paged:
        with pytest.raises(ValueError, match=r"^\[load\] path must be a file that this mlx-lm's"):
            paged.load(path)
        assert paged.groups[None].pages_used == 0


def test_several_sequences_have_no_file(tmp_path):
    model = zoo.tiny("llama")
    with enable(model) as paged:
        cache = paged.make_cache()
        model(mx.array([[1, 2], [3, 4]]), cache=cache)
        with pytest.raises(ValueError, match="must hold one sequence"):
            paged.save(str(tmp_path / "two.safetensors"), cache)


# Before mlx-lm 0.32 llama4 cannot read more tokens at a time than its chunks hold.
@pytest.mark.parametrize("family", ["qwen3_next"] + ["llama4"] * prompts.LATER)
def test_caches_that_are_converted_share_nothing_that_is_written_in_place(family):
    model = zoo.tiny(family)
    expected = zoo.single(model, PROMPT, max_tokens=6)
    with enable(model, page_size=8) as paged:
        plain = paged.stock_cache()
        model(mx.array([PROMPT[:-1]]), cache=plain)
        mx.eval([cache.state for cache in plain])
        ours = paged.from_stock(plain)
        again = paged.to_stock(ours)
        for cache in (ours, again, plain):
            assert zoo.single(model, PROMPT[-1:], max_tokens=6, cache=cache) == expected


@pytest.mark.parametrize("change", ["another seed", "one row", "rope", "architecture"])
def test_a_file_of_another_model_is_refused_and_nothing_is_remembered(change, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(zoo.tiny("llama"), page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(paged.model)
        zoo.single(paged.model, PROMPT, max_tokens=1, cache=cache)
        paged.save(path, cache)
    model = zoo.tiny("llama", seed=int(change == "another seed"))
    if change == "one row":
        model.model.embed_tokens.weight[5] += 0.1
    elif change == "rope":
        model.layers[1].self_attn.rope.base = 1000.0
    elif change == "architecture":
        model = zoo.tiny("qwen3")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        with pytest.raises(ValueError, match=r"^\[load\] path must be a file of this model"):
            paged.load(path)
        assert all(cache.num_pages == 0 for cache in paged.prefixes.caches.values())


def test_a_damaged_file_is_refused_and_nothing_is_remembered(tmp_path):
    path = tmp_path / "prompt.safetensors"
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        zoo.single(model, PROMPT, max_tokens=1, cache=cache)
        paged.save(str(path), cache)
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        told = whole.index(b"paged_mlx_tokens") + len(b'paged_mlx_tokens":"')
        paged.prefixes.reset()
        for place, flip in ((header + 5, 1), (len(whole) - 1, 64), (told, 1), (told + 9, 2)):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^\[load\] "):
                paged.load(str(path))
        assert all(cache.num_pages == 0 for cache in paged.prefixes.caches.values())
        path.write_bytes(whole)
        assert paged.load(str(path))[0].offset == cache[0].offset


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        cache = read_prompt(model, make_prompt_cache(model))
        paged.save(str(path), cache)
        before = path.read_bytes()

        def interrupted(name, *args):
            with open(name, "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(mx, "save_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            paged.save(str(path), cache)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


SAVES_FOR_EVER = """
import sys
import mlx_lm_zoo as zoo
from mlx_lm.models.cache import make_prompt_cache
from paged_mlx.mlx_lm import enable

model, path = zoo.tiny("llama"), sys.argv[1]
with enable(model, page_size=8) as paged:
    caches = [make_prompt_cache(model) for _ in range(2)]
    for length, cache in zip((300, 700), caches):
        zoo.single(model, zoo.prompt(length, seed=length), max_tokens=1, cache=cache)
    while True:
        for cache in caches:
            paged.save(path, cache)
            print(flush=True)
"""


@pytest.mark.long
def test_a_save_that_is_killed_leaves_the_old_file_or_the_new(tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(zoo.__file__)}
    model, found = zoo.tiny("llama"), []
    for kill in range(3):
        command = [sys.executable, "-c", SAVES_FOR_EVER, path]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as saving:
            for _ in range(3 + kill):
                saving.stdout.readline()
            time.sleep(kill * 0.002)  # in the middle of the next, wherever that is
            saving.kill()
        assert saving.returncode == -signal.SIGKILL
        with enable(model, page_size=8) as paged:
            found.append(paged.load(path)[0].offset)
    assert set(found) <= {301, 701}
