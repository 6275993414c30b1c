"""K and V that a paged cache hands out: one node when attention takes them, and right always."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from metal_on_host import metal_on_host  # noqa: E402
from mlx_lm.models.cache import KVCache  # noqa: E402
from paged_mlx._native import _ext  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

BATCH, HEADS, DIM = 1, 2, 8


@pytest.fixture
def paged():
    with enable(zoo.tiny("llama"), page_size=8, num_pages=6) as paged:
        yield paged


def tokens(n: int, seed: int, heads: int = HEADS, batch: int = BATCH) -> mx.array:
    """``[batch, heads, n, dim]``, evaluated, with the strides of a model's transpose."""
    x = mx.random.normal((batch, n, heads, DIM), key=mx.random.key(seed)).transpose(0, 2, 1, 3)
    mx.eval(x)
    return x


def attend(q, k, v, mask=None):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask)


def close(a, b) -> bool:
    return a.shape == b.shape and mx.abs(a - b).max().item() < 1e-5


def nodes(*arrays) -> list[str]:
    """Names of the graph's nodes that have not run."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return re.findall(r'label ?="([A-Za-z]\w+)", shape=rectangle', dot.getvalue())


def prefill(cache, n: int, seed: int):
    """A pass of ``n`` tokens, evaluated; returns its K and V."""
    k, v = tokens(n, seed), tokens(n, seed + 1)
    attend(tokens(n, seed + 2, heads=4), *cache.update_and_fetch(k, v), "causal")
    mx.eval(cache.state)
    return k, v


# One node


@pytest.mark.parametrize("n, mask", [(1, None), (5, "causal")])
def test_a_layer_is_one_node_that_writes_and_attends(paged, n, mask):
    cache = paged.make_cache()[0]
    prefill(cache, 11, seed=1)
    k, v = cache.update_and_fetch(tokens(n, 2), tokens(n, 3))
    out = attend(tokens(n, 4, heads=4), k, v, mask)
    del k, v
    assert nodes(
        out, *(array for pool in cache.group.pools for pair in pool.versions() for array in pair)
    ) == ["WriteAttend"]
    assert paged.gathered_calls == {}


def test_layers_share_a_steps_metadata(paged):
    caches = paged.make_cache()
    for cache in caches:
        x = tokens(1, 1)
        attend(tokens(1, 2, heads=4), *cache.update_and_fetch(x, x))
    step = caches[0].step
    assert all(cache.step is step for cache in caches)
    assert step.served == {0, 1, 2} and len(step.plans) == 1


def test_a_batch_with_padding_is_one_node_too(paged):
    rows = [paged.make_cache()[0] for _ in range(2)]
    batch = rows[0].merge(rows)
    batch.prepare(lengths=[4, 2], right_padding=[0, 2])
    k, v, q = tokens(4, 1, batch=2), tokens(4, 2, batch=2), tokens(4, 3, heads=4, batch=2)
    mask = batch.make_mask(4)
    found = attend(q, *batch.update_and_fetch(k, v), mask)
    assert nodes(found).count("WriteAttend") == 1 and "GatherHandle" not in nodes(found)
    for row, length in enumerate((4, 2)):
        x, y, z = (t[row : row + 1, :, :length] for t in (q, k, v))
        assert close(found[row : row + 1, :, :length], attend(x, y, z, "causal"))


# Handles are right in every order


@pytest.mark.parametrize("n, mask", [(1, None), (5, "causal")])
@pytest.mark.parametrize("order", ["before", "after", "never", "with", "late"])
def test_handles_are_stocks_k_and_v_whenever_they_are_read(paged, n, mask, order):
    stock, cache = KVCache(), paged.make_cache()[0]
    stock.update_and_fetch(*prefill(cache, 11, seed=1))
    x, y, q = tokens(n, 4), tokens(n, 5), tokens(n, 6, heads=4)
    expected = stock.update_and_fetch(x, y)
    k, v = cache.update_and_fetch(x, y)
    assert k.shape == expected[0].shape and k.dtype == expected[0].dtype
    if order == "before":
        assert close(k, expected[0]) and close(v, expected[1])
    if order != "never":
        out = attend(q, k, v, mask)
        if order == "with":
            mx.eval(out, k, v)
        assert close(out, attend(q, *expected, mask))
        assert paged.gathered_calls == {}
    if order == "late":
        for seed in range(20, 23):
            prefill(cache, 3, seed)
    assert close(k, expected[0]) and close(v, expected[1])
    expected = stock.update_and_fetch(*prefill(cache, 2, seed=30)) if order != "late" else None
    if expected:
        assert close(cache.keys_and_values()[0], expected[0])


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_handle_outlives_its_pages(paged, evaluated):
    cache = paged.make_cache()[0]
    x, y = prefill(cache, 39, seed=1)
    k, v = cache.update_and_fetch(tokens(1, 4), tokens(1, 5))
    attend(tokens(1, 6, heads=4), k, v)
    lazy = k * 1
    if evaluated:
        mx.async_eval(v)
    del cache
    other = paged.make_cache()[0]  # five of six pages were taken: it must have some of them
    prefill(other, 30, seed=7)
    for found in (lazy, k):
        assert close(found, mx.concatenate([x, tokens(1, 4)], axis=2))
    assert close(v, mx.concatenate([y, tokens(1, 5)], axis=2))


def test_a_handle_outlives_a_rewind_over_its_tokens(paged):
    cache = paged.make_cache()[0]
    prefill(cache, 5, seed=1)
    x = tokens(3, 4)
    k, _ = cache.update_and_fetch(x, x)
    attend(tokens(3, 5, heads=4), k, _, "causal")
    cache.trim(6)
    prefill(cache, 6, seed=8)
    assert close(k[:, :, 5:], x) and close(k[:, :, :5], tokens(5, 1))


def test_a_handle_outlives_the_growth_of_the_pool():
    with enable(zoo.tiny("llama"), page_size=8) as paged:
        cache = paged.make_cache()[0]
        x, _ = prefill(cache, 499, seed=1)
        k, _ = cache.update_and_fetch(tokens(1, 4), tokens(1, 5))
        cache.trim(500)
        prefill(cache, 2000, seed=7)
        assert paged.groups[None].allocator.total_pages > 64
        assert close(k, mx.concatenate([x, tokens(1, 4)], axis=2))


def test_a_handle_read_on_another_stream_is_read_before_the_pages_change(paged):
    other, slow = mx.new_stream(mx.cpu), mx.random.normal((700, 700))
    x = tokens(40, 1)
    with mx.stream(other):
        cache = paged.make_cache()[0]
        prefill(cache, 1, seed=5)
        k, _ = cache.update_and_fetch(x, x)
        attend(tokens(40, 2, heads=4), k, _, "causal")
        mx.eval(cache.state)
        k, _ = cache.keys_and_values()  # reads the pages, and no token of its own
        for _ in range(5):
            slow = slow @ slow / 700
        mx.async_eval(slow)  # the gather waits behind it
        mx.async_eval(k)
    del cache
    prefill(paged.make_cache()[0], 40, seed=7)
    assert close(k[:, :, 1:], x)


def test_two_calls_with_one_layers_handles_write_once_and_attend_twice(paged):
    cache = paged.make_cache()[0]
    x, y = prefill(cache, 9, seed=1)
    k, v = cache.update_and_fetch(tokens(1, 4), tokens(1, 5))
    keys, values = (mx.concatenate(pair, axis=2) for pair in ((x, tokens(1, 4)), (y, tokens(1, 5))))
    first, second = tokens(1, 6, heads=4), tokens(1, 7, heads=4)
    outs = attend(first, k, v), attend(second, k, v)
    assert nodes(*outs).count("WriteAttend") == 2 and paged.gathered_calls == {}
    assert close(outs[1], attend(second, keys, values))
    assert close(outs[0], attend(first, keys, values))
    again = cache.keys_and_values()  # what a layer that shares K and V asks for
    assert close(attend(second, *again), outs[1])
    assert paged.gathered_calls == {} and paged.paged_calls == 4


def test_attention_over_the_handles_of_a_past_step_is_gathered(paged):
    cache = paged.make_cache()[0]
    prefill(cache, 9, seed=1)
    x, q = tokens(1, 4), tokens(1, 6, heads=4)
    k, v = cache.update_and_fetch(x, x)
    expected = attend(q, k, v)
    mx.eval(expected)
    assert paged.gathered_calls == {}
    cache.trim(3)
    prefill(cache, 8, seed=7)
    assert close(attend(q, k, v), expected)
    assert list(paged.gathered_calls) == ["another step has begun, and may have changed the pages"]


def test_steps_in_flight_do_not_disturb_each_other(paged):
    stock, cache = KVCache(), paged.make_cache()[0]
    found, expected = [], []
    for seed in range(0, 60, 3):
        x, y, q = tokens(1, seed), tokens(1, seed + 1), tokens(1, seed + 2, heads=4)
        k, v = cache.update_and_fetch(x, y)
        found += [attend(q, k, v), v * 2]
        mx.async_eval(found)
        k, v = stock.update_and_fetch(x, y)
        expected += [attend(q, k * 1, v * 1), v * 2]
    assert all(close(a, b) for a, b in zip(found, expected))


# The write that waits


def without_attention(cache, n: int, seed: int):
    """A pass whose K and V are handed to nobody."""
    k, v = tokens(n, seed), tokens(n, seed + 1)
    cache.update_and_fetch(k, v)
    return k, v


@pytest.mark.parametrize(
    "then",
    ["the next step", "a fork", "a merge", "the state", "a copy for mlx-lm", "keys and values"],
)
def test_a_write_that_nobody_has_taken_is_done(paged, then):
    cache = paged.make_cache()[0]
    k, v = without_attention(cache, 11, seed=1)
    reader = cache
    if then == "the next step":
        without_attention(cache, 1, seed=3)
        cache.trim(1)
    elif then == "a fork":
        (reader,) = cache.fork(1)
        without_attention(reader, 1, seed=3)  # copies the last page before it writes
        reader.trim(1)
    elif then == "a merge":
        reader = cache.merge([cache, paged.make_cache()[0]])
        reader.update_and_fetch(tokens(1, 3, batch=2), tokens(1, 4, batch=2))
        reader = reader.extract(0)
        reader.trim(1)
    elif then == "the state":
        mx.eval(cache.state)
    if then == "a copy for mlx-lm":
        plain = cache.to_stock()
        found = plain.keys, plain.values
    else:
        found = reader.keys_and_values()
    assert close(found[0], k) and close(found[1], v)


def test_a_saved_cache_has_the_tokens_that_wait(paged, tmp_path):
    caches = paged.make_cache()
    written = [without_attention(cache, 11, seed=10 * i) for i, cache in enumerate(caches)]
    paged.save(str(tmp_path / "prompt.safetensors"), caches)
    for cache, (k, v) in zip(paged.load(str(tmp_path / "prompt.safetensors")), written):
        found = cache.keys_and_values()
        assert close(found[0], k) and close(found[1], v)


@pytest.mark.parametrize("taken", [True, False])
def test_a_step_is_written_once(paged, taken):
    cache = paged.make_cache()[0]
    with metal_on_host(instrument=False) as launches:
        for seed in range(1, 4):
            x = tokens(1, seed)
            k, v = cache.update_and_fetch(x, x)
            if taken:
                mx.eval(attend(tokens(1, 9, heads=4), k, v))
            del k, v
            mx.eval(cache.state)
        mx.eval(cache.state)
        assert launches.kernels["write_pages"] == 3
        assert launches.kernels["gather_pages"] == 0


def test_a_call_that_fails_leaves_the_write_waiting(paged):
    cache = paged.make_cache()[0]
    x = tokens(1, 1)
    k, v = cache.update_and_fetch(x, x)
    with pytest.raises(ValueError, match=r"^\[write_attend\] scale must be finite"):
        mx.fast.scaled_dot_product_attention(tokens(1, 2, heads=4), k, v, scale=float("nan"))
    del k, v
    assert close(cache.keys_and_values()[0], x)


# What the handles keep alive


def test_a_prompts_tokens_are_let_go_layer_by_layer():
    with enable(zoo.tiny("llama", num_hidden_layers=12)) as paged:
        n, held = 1000, []
        for cache in paged.make_cache():
            x = mx.random.normal((1, HEADS, n, DIM))
            mx.eval(attend(tokens(n, 2, heads=4), *cache.update_and_fetch(x, x), "causal"))
            held.append(mx.get_active_memory())
            del x
        grown = max(held[6:]) - max(held[3:6])
        assert grown < n * HEADS * DIM * 4


def test_a_handle_is_known_to_be_gone_when_no_graph_holds_it(paged):
    cache = paged.make_cache()[0]
    x = tokens(1, 1)
    k, v = cache.update_and_fetch(x, x)
    fetches = paged.groups[None].pools[0]._fetches
    lazy = v + 1
    del k, v
    assert fetches.read_pages()
    del lazy
    assert not fetches.read_pages()


def test_only_k_and_v_of_one_layer_have_a_source(paged):
    first, second, _ = paged.make_cache()
    x = tokens(1, 1)
    k, v = first.update_and_fetch(x, x)
    other, _ = second.update_and_fetch(x, x)
    assert _ext.source_of(k, v) is k.source
    for pair in ((v, k), (k, k), (v, v), (other, v), (k, x), (x, v), (x, x), (None, 3)):
        assert _ext.source_of(*pair) is None


UNAWAITED = """
import mlx.core as mx
import mlx_lm_zoo as zoo
from paged_mlx.mlx_lm import enable

model = zoo.tiny("llama")
with enable(model, page_size=8):
    for _ in range(20):
        cache = model.make_cache()[0]
        k = mx.ones((1, 2, 5, 8))
        keys, values = cache.update_and_fetch(k, k)
        before = mx.random.normal((700, 700))
        before = (before @ before @ before).sum()
        mx.async_eval(before, keys + before, values + before)
        del cache, keys, values
        mx.clear_cache()  # waits for MLX's thread and keeps Python's lock meanwhile
print("done")
"""


def test_mlxs_thread_never_waits_for_python():
    command = [sys.executable, "-c", UNAWAITED]
    run = subprocess.run(command, cwd=Path(zoo.__file__).parent, capture_output=True, timeout=900)
    assert run.stdout == b"done\n", run.stderr


# Operations in place


def test_tokens_that_the_model_changes_in_place_are_written_as_they_were_given(paged):
    cache = paged.make_cache()[0]
    k, v = prefill(cache, 11, seed=1)
    new_k, new_v, q = tokens(1, 4), tokens(1, 5), tokens(1, 6, heads=4)
    whole = mx.concatenate([k, new_k], axis=2), mx.concatenate([v, new_v], axis=2)
    expected = attend(q, *whole)
    handles = cache.update_and_fetch(new_k, new_v)
    new_k *= 3
    new_v[..., 0] = 7
    assert close(attend(q, *handles), expected)
    assert paged.gathered_calls == {}
    assert all(close(a, b) for a, b in zip(cache.keys_and_values(), whole))


@pytest.mark.parametrize("side", [0, 1])
def test_a_handle_that_the_model_changes_in_place_is_no_handle_any_more(paged, side):
    cache = paged.make_cache()[0]
    handles = list(cache.update_and_fetch(tokens(1, 4), tokens(1, 5)))
    plain = [mx.array(handle) for handle in handles]
    plain[side] = plain[side] * 3
    handles[side] *= 3
    q = tokens(1, 6, heads=4)
    assert close(attend(q, *handles), attend(q, *plain))
    assert sum(paged.gathered_calls.values()) == 1


@pytest.mark.parametrize("seen", [False, True])
def test_a_mask_that_the_model_changes_in_place_is_its_own(paged, seen):
    rows = [paged.make_cache() for _ in range(2)]
    batch = [layer[0].merge(list(layer)) for layer in zip(*rows)]
    k, v, q = (tokens(4, seed, heads=heads, batch=2) for seed, heads in ((1, 2), (2, 2), (3, 4)))
    mask = batch[0].make_mask(4)
    if seen:  # by an earlier layer, as it was made
        attend(q, *batch[1].update_and_fetch(k, v), mask)
    mask &= mx.eye(4, dtype=mx.bool_)
    found = attend(q, *batch[0].update_and_fetch(k, v), mask)
    assert close(found, mx.repeat(v, 2, axis=1))
    assert set(paged.gathered_calls) == {"the mask is not the cache's"}
