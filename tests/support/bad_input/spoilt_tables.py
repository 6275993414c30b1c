"""What can be wrong with tables, lengths and query bounds. Each function spoils one thing."""

from __future__ import annotations

import numpy as np

from .malformed import OUT_OF_POOL, PAGE_SIZE, spoils


def live_entry(a: dict, rng) -> tuple[int, int]:
    """A table entry that the call must read: the last of its sequence, window or not."""
    s = int(rng.integers(len(a["context_lens"])))
    if "page_starts" in a:
        return s, int(
            np.flatnonzero(a["page_starts"][s] + a["page_lens"][s] >= a["context_lens"][s])[0]
        )
    return s, (int(a["context_lens"][s]) - 1) // PAGE_SIZE


@spoils("block_tables")
def page_outside_the_pool(a, rng):
    a["block_tables"][live_entry(a, rng)] = rng.choice(OUT_OF_POOL)


@spoils("q")
@spoils("page_size")
def page_missing(a, rng):
    a["block_tables"][live_entry(a, rng)] = -1


@spoils("block_tables")
def huge_page_id(a, rng):
    tables = a["block_tables"].astype(np.int64)
    tables[live_entry(a, rng)] = rng.choice([2**31, 2**40, -(2**33)])
    a["block_tables"] = tables


@spoils("block_tables")
def tables_of_one_dimension(a, rng):
    a["block_tables"] = a["block_tables"].ravel()


@spoils("block_tables")
def tables_of_floats(a, rng):
    a["block_tables"] = a["block_tables"].astype(np.float32)


@spoils("block_tables")
def tables_with_too_few_columns(a, rng):
    a["block_tables"] = a["block_tables"][:, : int(rng.integers(0, 2))]


@spoils("block_tables")
def tables_with_a_row_too_many(a, rng):
    a["block_tables"] = np.vstack([a["block_tables"]] * int(rng.integers(2, 4)))


@spoils("block_tables")
def lengths_of_two_dimensions(a, rng):
    a["context_lens"] = a["context_lens"][:, None]


@spoils("block_tables")
def lengths_of_floats(a, rng):
    a["context_lens"] = a["context_lens"] + 0.5


@spoils("block_tables")
def negative_length(a, rng):
    a["context_lens"][rng.integers(3)] = rng.choice([-1, -7, -(2**31)])


@spoils("block_tables")
def length_beyond_the_pages(a, rng):
    a["context_lens"][rng.integers(3)] = rng.choice([13, 100, 2**31 - 1])


@spoils("block_tables")
def a_length_too_few(a, rng):
    a["context_lens"] = a["context_lens"][:-1]


@spoils("cu_seqlens_q")
def query_longer_than_its_context(a, rng):
    a["context_lens"][0] = rng.integers(1, 5)


@spoils("cu_seqlens_q")
def query_bounds_that_do_not_start_at_0(a, rng):
    a["cu_seqlens_q"][0] = rng.choice([-1, 1, 5, -(2**31)])


@spoils("cu_seqlens_q")
def query_bounds_that_decrease(a, rng):
    a["cu_seqlens_q"][1] = rng.choice([7, 8, 9, 2**31 - 1])


@spoils("cu_seqlens_q", "q")
def query_bounds_of_another_total(a, rng):
    a["cu_seqlens_q"][3] += rng.choice([-1, 1, 1000])


@spoils("cu_seqlens_q")
def query_bounds_of_another_batch(a, rng):
    bounds = a["cu_seqlens_q"]
    a["cu_seqlens_q"] = bounds[:-1] if rng.random() < 0.5 else np.append(bounds, bounds[-1])


@spoils("cu_seqlens_q")
def query_bounds_of_two_dimensions(a, rng):
    a["cu_seqlens_q"] = a["cu_seqlens_q"][None]


@spoils("page_starts")
def page_starts_alone(a, rng):
    del a["page_lens"]


@spoils("page_starts")
def page_lens_alone(a, rng):
    del a["page_starts"]


@spoils("page_starts")
def page_len_beyond_the_page(a, rng):
    a["page_lens"][1, rng.integers(3)] = rng.choice([PAGE_SIZE + 1, 100, 2**31 - 1])


@spoils("page_starts")
def negative_page_len(a, rng):
    a["page_lens"][1, rng.integers(3)] = rng.choice([-1, -(2**31)])


@spoils("page_starts")
def page_starts_with_a_gap(a, rng):
    a["page_starts"][1, 2] += rng.choice([-1, 1, 50])


@spoils("page_starts")
def page_starts_of_another_shape(a, rng):
    name = rng.choice(["page_starts", "page_lens"])
    a[name] = a[name][:, :-1]


@spoils("page_starts", "cu_seqlens_q")
def table_begins_after_the_first_key(a, rng):
    a["page_starts"][0] += 4
    a["context_lens"][0] = 11


@spoils("q")
@spoils("page_size")
def empty_batch(a, rng):
    for name in {"block_tables", "context_lens", "page_starts", "page_lens", "q"} & set(a):
        a[name] = a[name][:0]
    if "cu_seqlens_q" in a:
        a["cu_seqlens_q"] = a["cu_seqlens_q"][:1]
    a.pop("mask", None)


@spoils("q")
@spoils("page_size")
def window_of_nothing(a, rng):
    a["sliding_window"] = int(rng.choice([0, -1, -(2**31)]))


@spoils("page_size")
def page_size_of_nothing(a, rng):
    a["page_size"] = int(rng.choice([0, -1]))


@spoils("page_size")
def head_counts_of_nothing(a, rng):
    a[str(rng.choice(["num_q_heads", "num_kv_heads"]))] = int(rng.choice([0, -1]))


@spoils("page_size")
def head_counts_that_do_not_divide(a, rng):
    a["num_q_heads"] = int(rng.choice([1, 3, 5]))


@spoils("page_size")
def partition_of_nothing(a, rng):
    a["fixed_partition"] = int(rng.choice([0, -1]))
