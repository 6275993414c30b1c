"""The code that launches the Metal kernels: variants, bodies, grids and scratch memory."""

import re

import metal_host
import numpy as np
import pytest
from metal_host import address_spaces
from metal_kernels import attend, write_pages
from metal_kernels.launcher import KERNELS, ROOT, choose_body, variants_are_told_apart
from paged_mlx.reference.case import Case

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)


@pytest.mark.parametrize("path", sorted(KERNELS.iterdir()), ids=lambda path: path.name)
def test_kernel_text_is_ascii(path):
    assert path.read_text().isascii()


def test_variants_that_differ_in_one_thing_are_two():
    assert variants_are_told_apart()


@pytest.mark.parametrize(
    "rows, head_dim, dtype, body",
    [
        (1, 128, "float16", ("attend_vector", 1, 4)),
        (2, 256, "float16", ("attend_vector", 2, 4)),
        (2, 512, "float16", ("attend_tile", 8, 8)),
        (1, 136, "float16", ("attend_tile", 8, 4)),
        (3, 128, "float16", ("attend_tile", 8, 4)),
        (16, 128, "bfloat16", ("attend_tile", 16, 4)),
        (16, 128, "float32", ("attend_tile", 16, 8)),
        (8, 256, "float16", ("attend_tile", 8, 4)),
        (16, 256, "float16", ("attend_tile", 16, 8)),
        (17, 64, "float16", ("attend_tile", 32, 4)),
        (400, 128, "float16", ("attend_tile", 16, 4)),
        (400, 512, "float32", ("attend_tile", 8, 8)),
    ],
)
def test_body_follows_rows_and_registers(rows, head_dim, dtype, body):
    chosen = choose_body(rows, head_dim, head_dim, dtype)
    assert (chosen.kernel, chosen.rows, chosen.simdgroups) == body


def test_up_to_sixteen_rows_never_take_two_tiles():
    for dim in (*range(8, 257, 8),):
        for rows in range(1, 17):
            for dtype in ("float16", "float32"):
                assert choose_body(rows, dim, dim, dtype).rows >= rows, (rows, dim, dtype)


def test_every_function_constant_is_in_the_name_of_a_variant():
    case = Case(num_q_heads=4, sequences=((1, 40),), dtype="float16")
    changes = [
        {},
        {"sliding_window": 30},
        {"softcap": 3.0},
        {"alibi": 1.0},
        {"sinks": 1.0},
        {"mask": "boolean"},
        {"mask": "additive"},
        {"ragged": True},
        {"page_size": 8},
    ]
    launched = [attend(case.replace(**change).build()).launches[0] for change in changes]
    assert len({x.name for x in launched}) == len(changes)
    assert len({x.library for x in launched}) == 1
    assert {len(x.constants) for x in launched} == {8}
    assert all(re.fullmatch("[A-Za-z0-9_]+", x.name) for x in launched)


@pytest.mark.parametrize("max_threads", [32, 64])
@pytest.mark.parametrize("query_len", [1, 2, 20])
def test_pipelines_that_take_few_threads_get_few(max_threads, query_len):
    case = Case(num_q_heads=2, sequences=((query_len, 90),), dtype="float16")
    problem = case.build()
    attended = attend(problem, max_threads=max_threads, fixed_partition=32)
    assert attended.errors == []
    assert all(launched.group[0] <= max_threads for launched in attended.launches)
    assert problem.judge(attended.out, attended.lse)


def test_a_mixed_batch_takes_one_dispatch_per_kind():
    case = Case(num_q_heads=1, sequences=((1, 40), (5, 60), (40, 90)), dtype="float16")
    problem = case.build()
    attended = attend(problem)
    assert len(attended.kernels) == 3 and attended.errors == []
    assert problem.judge(attended.out, attended.lse)


def test_long_work_is_cut_into_nodes_that_attend_each_item_once():
    case = Case(num_q_heads=4, sequences=((1, 200), (40, 90), (1, 40), (30, 60)), dtype="float16")
    problem = case.build()
    whole, cut = attend(problem), attend(problem, node_work=1)
    assert len(whole.launches) == 2 and len(cut.launches) == 4
    assert cut.errors == []
    np.testing.assert_array_equal(whole.out, cut.out)


@pytest.mark.parametrize("dim, unit", [(64, "uint4"), (12, "uint2"), (6, "uint"), (5, "ushort")])
def test_rows_move_by_the_widest_unit_that_divides_them(dim, unit):
    pages, k = np.zeros((3, 2, 4, dim), np.uint16), np.zeros((1, 2, dim), np.uint16)
    (launched,) = write_pages(k, k.copy(), pages, pages.copy(), np.zeros(1, np.int32))
    assert launched.library == f"paged_mlx_write_pages_UNIT_{unit}"


VARIANTS = {
    "attend_vector": dict(T="bfloat", D=72, DV=128, ROWS=2, SIMDGROUPS=4),
    "attend_vector, q8": dict(T="half", D=96, DV=128, ROWS=1, SIMDGROUPS=4, K_FORMAT=1, V_FORMAT=2),
    "attend_tile": dict(T="half", D=128, DV=80, ROWS=16, SIMDGROUPS=4),
    "attend_tile, q8": dict(T="half", D=128, DV=96, ROWS=8, SIMDGROUPS=4, K_FORMAT=1, V_FORMAT=1),
    "attend_tile, q4": dict(T="bfloat", D=72, DV=64, ROWS=8, SIMDGROUPS=4, K_FORMAT=3, V_FORMAT=2),
    "merge": dict(T="half", DV=64, SIMDGROUPS=8),
    "merge, q4": dict(T="half", DV=256, SIMDGROUPS=8, ROTATED=1),
    "quantise_pages": dict(T="half", D=96, DV=256, K_FORMAT=1, V_FORMAT=2, ROTATES=1, FROM_PAGES=0),
    "seal_keys": dict(T="bfloat", D=72),
    "dequantise_pages": dict(T="float", D=72, DV=128, K_FORMAT=3, V_FORMAT=2, ROTATES=1),
    "merge_states": dict(T="bfloat"),
    "write_pages": dict(UNIT="uint4"),
    "copy_pages": dict(UNIT="uint2"),
    "gather_pages": dict(UNIT="ushort"),
    "copy_buffer": dict(UNIT="uchar"),
}


def test_every_kernel_has_a_variant_here():
    assert {path.stem for path in KERNELS.glob("*.metal")} == {
        name.split(",")[0] for name in VARIANTS
    }


@pytest.mark.skipif(
    address_spaces.find_checker() is None, reason="needs a clang with C++ for OpenCL: clang-19"
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_address_spaces_are_right(variant):
    kernel = variant.split(",")[0]
    macros = "".join(f"#define PAGED_MLX_{k} {v}\n" for k, v in VARIANTS[variant].items())
    text = macros + (KERNELS / f"{kernel}.metal").read_text()
    everything = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 16, 7: 1}
    assert address_spaces.check(text, [KERNELS], kernels=[kernel], constants=everything) == []


def test_launch_code_knows_neither_mlx_nor_metal():
    for name in ("launch.h", "encoder.h", "variant.h", "bodies.cpp", "launch_attention.cpp"):
        text = (ROOT / "csrc/metal" / name).read_text()
        assert "mlx/" not in text and "Metal.hpp" not in text
