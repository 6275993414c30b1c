"""A pool in a lazy graph: in place, and right in every order of evaluation."""

import gc
import threading
from functools import partial
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PagePool, fast
from paged_mlx._native import _ext

HEADS, DIM, PAGE = 2, 8, 4


def make_pool(num_pages=8, layers=1, **options):
    return PagePool(layers, num_pages, PAGE, HEADS, DIM, mx.float32, **options)


def tokens(value, count=1):
    return mx.full((count, HEADS, DIM), float(value))


def decode_plan(block_tables, context_lens):
    return fast.plan(
        block_tables, context_lens, num_q_heads=HEADS, num_kv_heads=HEADS, page_size=PAGE
    )


def write_all(pool, value, count=1, slot=0, layer=0):
    pool.write(layer, tokens(value, count), tokens(value, count), list(range(slot, slot + count)))


def attend(pool, context_len, page=0, layer=0):
    """Mean of the values of the first tokens of one page: all keys score alike."""
    q = mx.zeros((1, HEADS, DIM))
    return pool[layer].attend(q, decode_plan([[page]], [context_len]))


def test_a_written_token_is_read_back():
    pool = make_pool()
    write_all(pool, 3)
    assert mx.all(attend(pool, 1) == 3)


def test_writes_keep_the_memory():
    pool = make_pool()
    before = [_ext.data_address(a) for a in chain(*pool.state)]
    for slot in range(10):
        write_all(pool, slot, slot=slot)
    mx.eval(pool.state)
    assert [_ext.data_address(a) for a in chain(*pool.state)] == before
    pool.check()


def test_a_read_before_a_write_sees_the_old_value_in_one_evaluation():
    for outputs_first in (True, False):
        pool = make_pool()
        write_all(pool, 1)
        old = attend(pool, 1)
        write_all(pool, 2)
        new = attend(pool, 1)
        mx.eval([old, new] if outputs_first else [new, old])
        assert mx.all(old == 1) and mx.all(new == 2)


def test_evaluating_the_state_alone_still_orders_pending_reads():
    pool = make_pool()
    write_all(pool, 1)
    old = attend(pool, 1)
    write_all(pool, 2)
    mx.eval(pool.state)
    assert mx.all(old == 1)


def test_pipelined_steps_read_what_was_there_at_their_time():
    pool = make_pool()
    outs = []
    for step in range(12):
        write_all(pool, step)
        outs.append(attend(pool, 1))
        mx.async_eval(outs[-1], pool.state)
    for step, out in enumerate(outs):
        assert mx.all(out == step)


def test_two_streams_keep_the_order():
    pool = make_pool(num_pages=64)
    streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    outs = []
    for step in range(16):
        pool.stream = streams[step % 2]
        write_all(pool, step, count=PAGE)
        outs.append(attend(pool, PAGE))
    mx.eval(outs[::-1])
    for step, out in enumerate(outs):
        assert mx.all(out == step)


@pytest.mark.native
def test_fifty_pipelined_steps_stay_within_one_percent_of_the_pool():
    pages, heads, dim, page = 2048, 4, 64, 64
    gc.collect()  # what earlier tests left is not the pool's
    mx.synchronize()
    others = mx.get_active_memory()
    pool = PagePool(1, pages, page, heads, dim, mx.float32)
    assert pool.nbytes == 256 * 2**20
    q = mx.zeros((1, heads, dim))
    k = mx.ones((1, heads, dim))
    mx.eval(q, k)
    mx.synchronize()
    mx.reset_peak_memory()
    for step in range(50):
        plan = fast.plan([[0]], [step + 1], num_q_heads=heads, num_kv_heads=heads, page_size=page)
        pool.write(0, k, k, [step])
        out = pool[0].attend(q, plan)
        mx.async_eval(out, pool.state)
    mx.eval(out, pool.state)
    assert mx.get_peak_memory() - others <= 1.01 * pool.nbytes
    pool.check()


def test_a_compiled_step_is_in_place_and_right():
    pool = make_pool()
    plan = decode_plan([[0]], [1])

    @partial(mx.compile, inputs=pool.state, outputs=pool.state)
    def step(k, slots, words):
        pool.write(0, k, k, slots)
        return pool[0].attend(mx.zeros((1, HEADS, DIM)), words)

    before = [_ext.data_address(a) for a in chain(*pool.state)]
    outs = [step(tokens(i), mx.array([0], mx.int32), plan.array) for i in range(5)]
    mx.eval(outs[::-1])
    assert [float(out[0, 0, 0]) for out in outs] == [0, 1, 2, 3, 4]
    assert [_ext.data_address(a) for a in chain(*pool.state)] == before


def test_a_compiled_step_follows_the_plan_it_is_given():
    pool = make_pool()
    write_all(pool, 1, slot=0)
    write_all(pool, 5, slot=PAGE)
    q = mx.zeros((1, HEADS, DIM))

    @partial(mx.compile, inputs=pool.state, outputs=pool.state)
    def step(words, q):
        return pool[0].attend(q, words)

    first = step(decode_plan([[0]], [1]).array, q)
    second = step(decode_plan([[1]], [1]).array, q)
    assert float(first[0, 0, 0]) == 1 and float(second[0, 0, 0]) == 5


def test_a_pool_captured_by_compile_unnamed_is_refused():
    pool = make_pool()

    @mx.compile
    def step(k, slots):
        pool.write(0, k, k, slots)
        return k

    with pytest.raises(ValueError, match=r"\[write\] the pool must be named to mx.compile"):
        step(tokens(1), mx.array([0], mx.int32))
    write_all(pool, 4)
    assert mx.all(attend(pool, 1) == 4)


def test_a_plan_captured_by_compile_is_refused():
    pool = make_pool()
    plan = decode_plan([[0]], [1])

    @partial(mx.compile, inputs=pool.state, outputs=pool.state)
    def step(q):
        return pool[0].attend(q, plan)

    with pytest.raises(ValueError, match="plan must be an input of the compiled function"):
        step(mx.zeros((1, HEADS, DIM)))
    with pytest.raises(ValueError, match=r"call pool.reset_versions\(\)"):
        write_all(pool, 3)
    pool.reset_versions()
    write_all(pool, 4)
    assert mx.all(attend(pool, 1) == 4)


def test_a_second_thread_cannot_evaluate_a_pending_write_and_the_pool_recovers():
    pool = make_pool()
    write_all(pool, 1)
    mx.eval(pool.state)
    errors = []

    def work():
        try:
            stream = mx.new_stream(mx.cpu)
            with mx.stream(stream):
                write_all(pool, 2)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    try:
        mx.eval(pool.state)
    except RuntimeError as error:
        errors.append(error)
        pool.reset_versions()
    pool.check()
    write_all(pool, 3)
    assert mx.all(attend(pool, 1) == 3)


def test_copy_moves_a_page_in_all_layers_in_one_operation():
    pool = make_pool(layers=3)
    for layer in range(3):
        write_all(pool, layer + 1, count=PAGE, layer=layer)
    pool.copy([(0, 5)])
    for layer in range(3):
        write_all(pool, 9, count=PAGE, layer=layer)
    for layer in range(3):
        assert mx.all(attend(pool, PAGE, page=5, layer=layer) == layer + 1)
    pool.check()


def test_a_gather_is_ordered_before_a_later_write():
    pool = make_pool()
    write_all(pool, 1, count=PAGE)
    k, v = pool[0].gather([[0]], [PAGE])
    write_all(pool, 2, count=PAGE)
    mx.eval(pool.state, k, v)
    assert mx.all(k == 1) and mx.all(v == 1)


def test_a_page_block_is_a_view_of_one_page():
    pool = make_pool()
    write_all(pool, 7, count=3, slot=PAGE)
    block = pool[0][1]
    assert (block.page_id, block.tokens_stored, block.max_tokens, block.ref_count) == (
        1,
        3,
        PAGE,
        0,  # nobody has allocated it
    )
    assert block.key_data.shape == (HEADS, PAGE, DIM)
    assert mx.all(block.value_data[:, :3] == 7)


def test_a_pool_is_a_mapping_of_its_pages():
    pool = make_pool(num_pages=3)
    assert list(pool[0]) == [0, 1, 2]
    with pytest.raises(KeyError):
        pool[0][3]


def test_growing_keeps_ids_and_contents():
    pool = make_pool(num_pages=2)
    write_all(pool, 6, count=PAGE, slot=PAGE)
    pool.grow(5)
    assert pool.num_pages == 5
    assert mx.all(attend(pool, PAGE, page=1) == 6)
    write_all(pool, 8, count=PAGE, slot=4 * PAGE)
    assert mx.all(attend(pool, PAGE, page=4) == 8)
    pool.check()


def test_shrinking_keeps_the_pages_below_and_gives_memory_back():
    pool = make_pool(num_pages=4096)
    write_all(pool, 6, count=PAGE, slot=PAGE)
    mx.eval(pool.state)
    before = mx.get_active_memory(), pool.nbytes
    pool.shrink(2)
    mx.synchronize()
    assert (pool.num_pages, pool.nbytes) == (2, before[1] // 2048)
    assert before[0] - mx.get_active_memory() >= 0.99 * before[1]
    assert mx.all(attend(pool, PAGE, page=1) == 6)
    pool.check()
    with pytest.raises(ValueError, match=r"num_pages must be in \[1, 2\]; got 0"):
        pool.shrink(0)


def test_fresh_pages_can_be_filled_with_nan():
    pool = make_pool(fill=float("nan"))
    write_all(pool, 2)
    assert mx.all(attend(pool, 1) == 2)
    assert np.isnan(np.array(pool[0][0].key_data[:, 1:])).all()


@pytest.mark.native
def test_raw_writes_donate_when_they_can_and_count_when_they_copy():
    pages = mx.zeros((4, HEADS, PAGE, DIM))
    other = mx.zeros((4, HEADS, PAGE, DIM))
    mx.eval(pages, other)
    copies = _ext.buffer_copies()
    k = tokens(1)
    pages, other = fast.write_pages(k, k, pages, other, [0])
    mx.eval(pages, other)
    mx.synchronize()
    assert _ext.buffer_copies() == copies
    held = pages
    pages, other = fast.write_pages(tokens(2), tokens(2), pages, other, [0])
    mx.eval(pages, other)
    assert _ext.buffer_copies() == copies + 1
    assert mx.all(held[0, :, 0] == 1) and mx.all(pages[0, :, 0] == 2)


@pytest.mark.parametrize(
    "slots, message",
    [
        ([32], "slot_mapping must be less than num_pages"),
        ([-2], "slot_mapping must be a slot, or -1"),
        ([3, 3], "slot_mapping must name each slot at most once"),
        ([0.5], "slot_mapping must hold integers"),
        ([[0]], "slot_mapping must have shape"),
    ],
)
def test_a_bad_slot_mapping_changes_nothing(slots, message):
    pool = make_pool()
    state = list(chain(*pool.state))
    with pytest.raises(ValueError, match=message):
        pool.write(0, tokens(1, 1), tokens(1, 1), slots)
    assert all(a is b for a, b in zip(state, chain(*pool.state), strict=True))


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([(0, 8)], "pairs must hold page ids"),
        ([(-1, 2)], "pairs must hold page ids"),
        ([(0, 2), (1, 2)], "pairs must name each target once"),
        ([(0, 1), (1, 2)], "pairs must not use a page as source and as target"),
    ],
)
def test_a_bad_copy_changes_nothing(pairs, message):
    pool = make_pool()
    state = list(chain(*pool.state))
    with pytest.raises(ValueError, match=message):
        pool.copy(pairs)
    assert all(a is b for a, b in zip(state, chain(*pool.state), strict=True))


@pytest.mark.parametrize(
    "size", ["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"]
)
def test_a_size_of_zero_is_refused(size):
    sizes = dict(num_layers=1, num_pages=2, page_size=4, num_kv_heads=1, head_dim=8)
    with pytest.raises(
        ValueError, match=rf"\[PagePool\] {size} must be a whole number of at least 1; got 0"
    ):
        PagePool(**(sizes | {size: 0}))
