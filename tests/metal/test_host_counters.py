"""Traffic counters of the Metal host, on kernels whose traffic is counted by hand."""

import metal_host
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"
BIG = np.zeros(32 * 1024, np.float32)


def copy_kernel(body, in_type="float", out_type="float", prelude=""):
    return f"""{PRELUDE}{prelude}
    kernel void k(device const {in_type}* in [[buffer(0)]], device {out_type}* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {{
      {body}
    }}"""


def test_a_vector_copy_counts_its_bytes_instructions_and_segments():
    source = copy_kernel("out[i] = in[i];", "float4", "float4")
    result = metal_host.run(source, [BIG, BIG], grid=8192, group=256)
    loads = result.buffers[0]
    assert (loads.load_bytes, loads.load_ops, loads.simdgroup_loads) == (131072, 8192, 256)
    assert (loads.load_segments_32, loads.load_segments_128, loads.unique_load_bytes) == (
        4096,
        1024,
        131072,
    )
    stores = result.buffers[1]
    assert (stores.store_bytes, stores.simdgroup_stores, stores.unique_store_bytes) == (
        131072,
        256,
        131072,
    )
    assert loads.reread == 1 and loads.load_coalescing == 1


def test_a_strided_load_touches_a_segment_a_lane():
    result = metal_host.run(
        copy_kernel("out[i] = in[i * 32];"), [BIG, BIG[:1024]], grid=1024, group=256
    )
    loads = result.buffers[0]
    assert (loads.simdgroup_loads, loads.load_segments_32, loads.load_bytes) == (32, 1024, 4096)
    assert loads.load_coalescing == 1 / 8


def test_adjacent_scalar_loads_merge_into_one():
    source = copy_kernel(
        "float s = 0; for (int j = 0; j < 4; j++) s += in[i * 4 + j]; out[i] = s;", "half"
    )
    result = metal_host.run(source, [BIG.astype(np.float16), BIG[:1024]], grid=1024, group=256)
    loads = result.buffers[0]
    assert (loads.simdgroup_loads, loads.merged_loads, loads.merged_load_segments_32) == (
        128,
        32,
        256,
    )


def test_loads_merge_whichever_way_they_are_written():
    source = copy_kernel(
        "float s = 0; for (int j = 3; j >= 0; j--) s = s * 2 + in[i * 4 + j]; out[i] = s;", "half"
    )
    result = metal_host.run(source, [BIG.astype(np.float16), BIG[:1024]], grid=1024, group=256)
    loads = result.buffers[0]
    assert (loads.simdgroup_loads, loads.merged_loads, loads.merged_load_segments_32) == (
        128,
        32,
        256,
    )


def test_a_row_that_every_simdgroup_loads_is_reread_once_each():
    source = copy_kernel("out[i] = in[i % 32];")
    result = metal_host.run(source, [BIG[:32], BIG[:256]], grid=256, group=128)
    loads = result.buffers[0]
    assert loads.reread == 8
    assert loads.threadgroup_segments_32 == 2 * 4  # each of 2 threadgroups sees the 4 segments once


def test_no_size_of_access_goes_uncounted():
    source = copy_kernel("out[i] = in[i];", "T", "T", prelude="struct T { float v[6]; };")
    result = metal_host.run(source, [np.zeros(192, np.float32), np.ones(192, np.float32)], grid=32)
    assert result.buffers[0].load_bytes == 768 and result.buffers[1].store_bytes == 768


def test_lanes_out_of_step_still_form_instructions():
    source = copy_kernel(
        "\n#pragma clang loop unroll(disable)\nfor (uint j = 0; j <= i; j++) out[32 * j + i] = in[j];"
    )
    result = metal_host.run(source, [BIG[:32], BIG[:1024]], grid=32)
    loads = result.buffers[0]
    assert loads.load_ops == 32 * 33 // 2
    assert loads.simdgroup_loads == 32 and loads.load_segments_32 == 32


def test_uniform_arguments_are_registers_and_cost_nothing():
    source = f"""{PRELUDE}
    kernel void k(constant float& scale [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {{ out[i] = scale; }}"""
    result = metal_host.run(source, [np.float32(2.5), BIG[:32]], grid=32)
    assert result.buffers[0].load_bytes == 0 and (result.outputs[1] == 2.5).all()


def test_barriers_and_collectives_are_counted_by_kind():
    source = f"""{PRELUDE}
    kernel void k(device float* out [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {{
      threadgroup float t[64];
      t[i] = simd_sum(float(i));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_barrier(mem_flags::mem_none);
      out[i] = simd_shuffle_xor(t[63 - i], 1);
    }}"""
    counters = metal_host.run(source, [BIG[:64]], groups=3, group=64, check=False).counters
    assert (counters.threadgroups, counters.simdgroups, counters.threads) == (3, 6, 192)
    assert (counters.threadgroup_barriers, counters.simdgroup_barriers) == (3, 6)
    assert (counters.reduces, counters.shuffles) == (6, 6)
    assert counters.threadgroup_memory_bytes == 256
    assert counters.threadgroup_store_bytes == counters.threadgroup_load_bytes == 768


def test_traffic_is_attributed_to_source_lines():
    source = copy_kernel("float a = in[i];\nfloat b = in[2 * i];\nout[i] = a + b;")
    lines = metal_host.run(source, [BIG[:64], BIG[:32]], grid=32).lines
    first = source.splitlines().index("      float a = in[i];") + 1
    assert {(line.where, line.is_store, line.bytes) for line in lines} == {
        (f"kernel.metal:{first}", False, 128),
        (f"kernel.metal:{first + 1}", False, 128),
        (f"kernel.metal:{first + 2}", True, 128),
    }


def test_a_function_of_the_library_is_charged_to_the_line_that_calls_it():
    source = f"""{PRELUDE}
    kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {{
      simdgroup_float8x8 m;
      simdgroup_load(m, in, 8);
      simdgroup_store(m, out, 8);
    }}"""
    lines = metal_host.run(source, [BIG[:64], BIG[:64]], grid=32).lines
    assert {line.where for line in lines} == {"kernel.metal:6", "kernel.metal:7"}


def test_counting_can_be_switched_off_and_the_numbers_stay():
    source = copy_kernel("out[i] = in[i] + 1;")
    values = np.arange(64, dtype=np.float32)
    result = metal_host.run(source, [values, np.zeros(64, np.float32)], grid=64, instrument=False)
    assert (result.outputs[1] == values + 1).all()
    assert not result.buffers[0].used
