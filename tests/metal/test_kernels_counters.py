"""What the Metal kernels read, counted: the claims that no clock is needed for.

The peers' figures are those of their own kernel texts on the same instrument and problem.
"""

import metal_host
import pytest
from metal_kernels import attend
from metal_kernels.attention import K_PAGES, V_PAGES
from paged_mlx.reference.case import Case

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

GQA_FACTORS = (1, 4, 7, 8, 16)
PAGE_SIZES = (8, 16, 32, 128)
HEAD_DIMS = (64, 80, 128, 256)


def decode(gqa_factor, page_size, head_dim, window) -> Case:
    return Case(
        dtype="float16",
        num_q_heads=2 * gqa_factor,
        num_kv_heads=2,
        head_dim=head_dim,
        page_size=page_size,
        sequences=((1, 1), (1, 300), (1, 77)),
        sliding_window=70 if window else None,
    )


def demand_one_read(case: Case, **options):
    """Each K and V byte that a row may see is loaded exactly once per KV head, and no other."""
    problem = case.build()
    attended = attend(problem, **options)
    assert attended.errors == []
    assert problem.judge(attended.out, attended.lse)
    for index, dim in ((K_PAGES, case.head_dim), (V_PAGES, case.value_dim)):
        least = attended.plan.keys_least * case.num_kv_heads * dim * problem.q.itemsize
        assert attended.read(index) == least
    for result in attended.attention:
        assert result.counters.threadgroup_memory_bytes <= 32768
        assert result.counters.partial_collectives == 0
    return attended


# Each gqa_factor, page size and head dim with and without a window; the rest of the product
# is in the long test.
@pytest.mark.parametrize(
    "gqa_factor, page_size, head_dim, window",
    [
        (1, 16, 64, False),
        (1, 32, 128, True),
        (4, 8, 64, True),
        (4, 16, 128, False),
        (7, 128, 80, False),
        (7, 16, 128, True),
        (8, 32, 256, False),
        (8, 8, 80, True),
        (16, 128, 256, True),
        (16, 16, 128, False),
    ],
)
def test_decode_reads_each_key_and_value_once_per_kv_head(gqa_factor, page_size, head_dim, window):
    demand_one_read(decode(gqa_factor, page_size, head_dim, window))


@pytest.mark.long
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("gqa_factor", GQA_FACTORS)
def test_decode_reads_once_at_every_geometry(gqa_factor, page_size, head_dim, window):
    demand_one_read(decode(gqa_factor, page_size, head_dim, window))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gqa_factor", [1, 8])
def test_decode_reads_once_in_other_dtypes(dtype, gqa_factor):
    demand_one_read(decode(gqa_factor, 16, 64, True).replace(dtype=dtype))


@pytest.mark.parametrize("query_len", [4, 16])
def test_verify_of_up_to_sixteen_rows_reads_once(query_len):
    case = Case(dtype="float16", head_dim=128, num_q_heads=1, sequences=((query_len, 200),))
    demand_one_read(case)


def test_partitions_read_nothing_twice():
    attended = demand_one_read(decode(4, 16, 128, False), fixed_partition=64)
    assert attended.plan.num_partials > 0


def test_window_leaves_pages_outside_it_alone():
    attended = demand_one_read(decode(4, 16, 128, True))
    assert attended.plan.keys_read == 1 + 70 + 70


def test_short_context_takes_one_dispatch():
    assert len(attend(decode(4, 16, 64, True).build()).launches) == 1


# K and V bytes over the least, simdgroup-wide loads of K and V in all (after merging each lane's
# adjacent loads), then of a simdgroup: barriers of its own and collectives. Barriers of a
# threadgroup are not compared: our simdgroups share each key, so that their state fits the
# registers, and wait for each other twice a step, see below.
PEERS = {
    "MLX sdpa_vector, dense": (4.0, 128 * 32 * 64, 0, 38),
    "MLX sdpa_vector_2pass, dense": (4.0, 2048 * 4 * 35, 0, 16),
    "tiny-llm": (4.0, 128 * 32 * 64, 0, 38),
    "vllm-metal": (4.0, 128 * 8 * 640, 16, 48),
    "vllm-metal, split": (4.0, 256 * 8 * 320, 8, 24),
    "mistral.rs": (4.0, 128 * 8 * 192, 0, 33),
    "mistral.rs, split": (4.0, 256 * 8 * 100, 0, 29),
    "HF paged-attention": (4.0, 128 * 8 * 192, 0, 33),
}


@pytest.fixture(scope="module")
def standard_decode():
    """Four sequences of 1,024 tokens, 32 query heads on 8 KV heads of 128, pages of 16.

    Partitions of 256 tokens give the 128 threadgroups that the peers launch.
    """
    case = Case(
        dtype="float16",
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        page_size=16,
        sequences=((1, 1024),) * 4,
    )
    (result,) = demand_one_read(case, fixed_partition=256).attention
    assert result.counters.threadgroups == 128
    return result


@pytest.mark.parametrize("peer", PEERS)
def test_standard_decode_beats_the_peer(peer, standard_decode):
    ratio, loads, simdgroup_barriers, collectives = PEERS[peer]
    counters = standard_decode.counters
    pages = [standard_decode.buffers[index] for index in (K_PAGES, V_PAGES)]
    least = 2 * 4 * 1024 * 8 * 128 * 2
    assert sum(p.load_bytes for p in pages) == least < ratio * least
    assert sum(p.merged_loads for p in pages) < loads
    assert counters.simdgroup_barriers <= simdgroup_barriers * counters.simdgroups
    ours = counters.reduces + counters.shuffles + counters.scans + counters.ballots
    assert ours < collectives * counters.simdgroups


def test_standard_decode_moves_16_bytes_a_lane_in_full_segments(standard_decode):
    for index in (K_PAGES, V_PAGES):
        pages = standard_decode.buffers[index]
        assert pages.load_coalescing == 1.0
        assert pages.load_bytes == 16 * pages.load_ops


def test_prefill_reads_each_key_once_per_tile_of_32_rows():
    case = Case(dtype="float16", num_q_heads=4, num_kv_heads=1, head_dim=64, sequences=((32, 256),))
    attended = attend(case.build(), workers=1)
    assert attended.kernels == ["attend_tile"] and attended.errors == []
    # 128 rows are four tiles of eight tokens; each reads up to its last token's position.
    keys = sum(256 - 32 + 8 * (tile + 1) for tile in range(4))
    for index in (K_PAGES, V_PAGES):
        assert attended.read(index) == keys * 64 * 2


@pytest.mark.parametrize("rows, step", [(8, 64), (16, 32), (32, 32)])
def test_tile_body_waits_once_for_q_and_twice_a_step(rows, step):
    case = Case(dtype="float16", num_q_heads=rows, head_dim=64, sequences=((1, 640),))
    (result,) = attend(case.build(), workers=1).attention
    assert result.counters.threadgroup_barriers == 1 + 2 * 640 // step


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("gqa_factor", [1, 2, 8])
def test_decode_leaves_threadgroup_memory_for_other_threadgroups(gqa_factor, head_dim):
    case = decode(gqa_factor, 16, head_dim, False)
    (result,) = attend(case.build(), host={"instrument": False}).attention
    assert result.counters.threadgroup_memory_bytes <= 8192


def test_merge_of_32k_tokens_costs_a_twentieth_of_the_attention():
    """In 41 parts, as for 80 cores and 8 KV heads: the longest chain of loads, and bytes in all."""
    case = Case(
        dtype="float16", num_q_heads=4, num_kv_heads=1, head_dim=128, sequences=((1, 32768),)
    )
    attend_part, merge = (x.result for x in attend(case.build(), fixed_partition=816).launches)
    assert merge.counters.simdgroups == 8 * 4
    longest = attend_part.counters.most_loads_in_a_simdgroup
    assert 20 * merge.counters.most_loads_in_a_simdgroup < longest
    attended, merged = (
        sum(b.load_bytes for b in result.buffers.values()) for result in (attend_part, merge)
    )
    assert 20 * merged < attended
