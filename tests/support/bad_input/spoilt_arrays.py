"""What can be wrong with arrays, options, slots and pairs. Each function spoils one thing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .malformed import (
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_PAGES,
    NUM_Q_HEADS,
    PAGE_SIZE,
    V_HEAD_DIM,
    array,
    spoils,
)


@spoils("q")
def heads_that_do_not_divide(a, rng):
    a["q"] = array(len(a["q"]), int(rng.choice([1, 3, 5])), HEAD_DIM)


@spoils("q")
def q_of_two_dimensions(a, rng):
    a["q"] = a["q"][:, 0]


@spoils("q")
def q_of_another_head_dim(a, rng):
    a["q"] = array(len(a["q"]), NUM_Q_HEADS, int(rng.choice([8, 24, 0])))


@spoils("q")
def q_of_another_dtype(a, rng):
    a["q"] = a["q"].astype([mx.float16, mx.bfloat16, mx.int32][rng.integers(3)])


@spoils("q")
def a_query_token_too_many(a, rng):
    a["q"] = array(len(a["q"]) + int(rng.choice([-1, 1, 9])), NUM_Q_HEADS, HEAD_DIM)


@spoils("q")
@spoils("slot_mapping")
def k_pages_of_another_shape(a, rng):
    shape = [NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM]
    shape[rng.integers(3)] += int(rng.choice([-1, 1]))
    a["k_pages"] = array(*shape)


@spoils("k_pages")
def pages_of_no_slots(a, rng):
    a["k_pages"] = array(NUM_PAGES, NUM_KV_HEADS, 0, HEAD_DIM)
    a["v_pages"] = array(NUM_PAGES, NUM_KV_HEADS, 0, V_HEAD_DIM)


@spoils("k_pages")
def pages_of_three_dimensions(a, rng):
    name = rng.choice(["k_pages", "v_pages"])
    a[name] = a[name][0]


@spoils("k_pages")
def pages_of_another_dtype(a, rng):
    name = rng.choice(["k_pages", "v_pages"])
    a[name] = a[name].astype([mx.float16, mx.bfloat16, mx.int32][rng.integers(3)])


@spoils("q")
def head_dim_that_is_not_offered(a, rng):
    dim = int(rng.choice([1, 12, 264, 511]))
    a["q"] = array(len(a["q"]), NUM_Q_HEADS, dim)
    a["k_pages"] = array(NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, dim)


@spoils("q")
def scale_that_is_no_number(a, rng):
    a["scale"] = float(rng.choice([np.nan, np.inf]))


@spoils("q")
def softcap_that_caps_nothing(a, rng):
    a["softcap"] = float(rng.choice([0.0, -30.0, np.nan]))


@spoils("q")
def options_of_two_dimensions(a, rng):
    a[str(rng.choice(["alibi_slopes", "sinks"]))] = array(NUM_Q_HEADS, 1)


@spoils("q")
def options_of_integers(a, rng):
    a[str(rng.choice(["alibi_slopes", "sinks", "mask"]))] = array(NUM_Q_HEADS, dtype=mx.int32)


@spoils("mask")
def mask_of_too_few_keys(a, rng):
    a["mask"] = array(8, int(rng.integers(0, 11)))


@spoils("mask")
def mask_of_other_tokens(a, rng):
    a["mask"] = array(int(rng.choice([1, 7, 9])), 11)


@spoils("mask")
def mask_of_other_heads(a, rng):
    a["mask"] = array(int(rng.choice([0, 2, 3, 5])), 8, 11)


@spoils("mask")
def mask_of_one_dimension(a, rng):
    a["mask"] = array(11)


@spoils("slot_mapping")
def slot_past_the_end(a, rng):
    end = NUM_PAGES * PAGE_SIZE
    a["slot_mapping"][rng.integers(5)] = rng.choice([end, end + 1, 2**31 - 1])


@spoils("slot_mapping")
def slot_below_minus_1(a, rng):
    a["slot_mapping"][rng.integers(5)] = rng.choice([-2, -(2**31)])


@spoils("slot_mapping")
def huge_slot(a, rng):
    slots = a["slot_mapping"].astype(np.int64)
    slots[rng.integers(5)] = rng.choice([2**31, 2**32 + 1, -(2**32) - 1])
    a["slot_mapping"] = slots


@spoils("slot_mapping")
def slot_named_twice(a, rng):
    a["slot_mapping"][3] = rng.choice(a["slot_mapping"][:3])


@spoils("slot_mapping")
def slots_of_another_shape(a, rng):
    slots = a["slot_mapping"]
    a["slot_mapping"] = [slots[:-1], slots[None], np.append(slots, 9)][rng.integers(3)]


@spoils("slot_mapping")
def slots_of_floats(a, rng):
    a["slot_mapping"] = a["slot_mapping"] + 0.5


@spoils("slot_mapping")
def new_tokens_of_another_shape(a, rng):
    shape = [5, NUM_KV_HEADS, HEAD_DIM]
    shape[rng.integers(3)] += int(rng.choice([-1, 1]))
    a["k"] = array(*shape)


@spoils("slot_mapping")
def new_tokens_of_another_dtype(a, rng):
    name = rng.choice(["k", "v"])
    a[name] = a[name].astype([mx.float16, mx.bfloat16, mx.int32][rng.integers(3)])


@spoils("pairs")
def copy_of_a_page_outside_the_pool(a, rng):
    a["pairs"][rng.integers(2), rng.integers(2)] = rng.choice([NUM_PAGES, 2**31 - 1, -1, -2])


@spoils("pairs")
def copy_to_one_page_twice(a, rng):
    a["pairs"][1] = [rng.integers(3), a["pairs"][0, 1]]


@spoils("pairs")
def copy_that_chains(a, rng):
    a["pairs"][1] = [a["pairs"][0, 1], 5]


@spoils("pairs")
def pairs_of_three(a, rng):
    a["pairs"] = np.hstack([a["pairs"], a["pairs"][:, :1]])


@spoils("pairs")
def pairs_of_one_dimension(a, rng):
    a["pairs"] = a["pairs"].ravel()


@spoils("pairs")
def pairs_of_floats(a, rng):
    a["pairs"] = a["pairs"] + 0.5


@spoils("pairs")
def pools_of_different_lengths(a, rng):
    a["pools"] = [a["pools"][0], a["pools"][1][: int(rng.integers(1, NUM_PAGES))]]


@spoils("pairs")
def no_pools(a, rng):
    a["pools"] = []


@spoils("outs")
def states_of_different_numbers(a, rng):
    a["lses"] = a["lses"][: int(rng.integers(0, 3))]


@spoils("outs")
def no_states(a, rng):
    a["outs"], a["lses"] = [], []


@spoils("outs")
def state_of_another_shape(a, rng):
    shape = [3, NUM_Q_HEADS, V_HEAD_DIM]
    shape[rng.integers(3)] += 1
    a["outs"] = [*a["outs"][:2], array(*shape)]


@spoils("outs")
def lse_of_another_shape(a, rng):
    a["lses"] = [array(3, NUM_Q_HEADS + 1), *a["lses"][1:]]


@spoils("outs")
def lse_of_half_precision(a, rng):
    a["lses"] = [a["lses"][0].astype(mx.float16), *a["lses"][1:]]


@spoils("outs")
def states_of_different_dtypes(a, rng):
    a["outs"] = [a["outs"][0].astype(mx.bfloat16), *a["outs"][1:]]


@spoils("q")
def options_of_other_head_counts(a, rng):
    a[str(rng.choice(["alibi_slopes", "sinks"]))] = array(int(rng.choice([0, 1, 3, 5])))
