"""Every defect that the Metal host must report, planted in a small kernel."""

import metal_host
import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"
X = np.arange(64, dtype=np.float32)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FIRST_LINE = 6  # of `body` in findings(body)


def launch(body, group=64, **options):
    """Run `body` for 64 threads, with in, out, i and threadgroup float t[64]."""
    source = f"""{PRELUDE}
    kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_index_in_threadgroup]]) {{ threadgroup float t[64];
{body}
    }}"""
    return metal_host.run(
        source, [X, np.zeros(64, np.float32)], groups=1, group=group, check=False, **options
    )


def kinds(result):
    return {error.kind for error in result.errors}


def test_a_correct_exchange_has_no_findings():
    result = launch(f"t[i] = in[i]; {BARRIER} out[i] = t[63 - i];")
    assert result.errors == [] and result.completed
    assert (result.outputs[1] == 63 - X).all()


@pytest.mark.parametrize("order", ["forward", "reverse", 3])
def test_a_missing_barrier_is_found_in_every_order(order):
    result = launch("t[i] = in[i]; out[i] = t[63 - i];", order=order)
    assert kinds(result) & {"threadgroup data race", "read of uninitialised threadgroup memory"}
    assert result.fatal


def test_a_write_after_a_read_needs_a_barrier():
    result = launch(f"t[i] = 0; {BARRIER} float v = t[63 - i]; t[i] = v + in[i]; out[i] = v;")
    assert "threadgroup data race" in kinds(result)


def test_a_reader_is_remembered_when_others_read_after_it():
    body = f"""t[i] = 0; {BARRIER} out[i] = t[0];
    if (i == 33) t[0] = 1;"""
    assert "threadgroup data race" in kinds(launch(body))
    assert "threadgroup data race" in kinds(launch(body, order="reverse"))


def test_a_barrier_without_threadgroup_memory_orders_nothing():
    result = launch("t[i] = in[i]; threadgroup_barrier(mem_flags::mem_none); out[i] = t[63 - i];")
    assert "threadgroup data race" in kinds(result)


def test_an_exchange_inside_a_simdgroup_needs_a_simdgroup_barrier():
    result = launch("t[i] = in[i]; out[i] = t[i ^ 1];")
    assert kinds(result) & {"race inside a simdgroup", "read of uninitialised threadgroup memory"}
    result = launch(
        "t[i] = in[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = t[i ^ 1];"
    )
    assert result.errors == []


def test_a_simdgroup_barrier_does_not_order_other_simdgroups():
    result = launch(
        "t[i] = in[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = t[63 - i];"
    )
    assert kinds(result) & {"threadgroup data race", "read of uninitialised threadgroup memory"}


def test_reading_threadgroup_memory_that_nobody_wrote_is_found():
    result = launch(f"if (i < 32) {{ t[i] = in[i]; }} {BARRIER} out[i] = t[i];")
    assert kinds(result) == {"read of uninitialised threadgroup memory"}
    assert np.isnan(result.outputs[1][32:]).all()


def test_contents_of_threadgroup_memory_do_not_outlive_their_threadgroup():
    source = f"""{PRELUDE}
    kernel void k(device float* out [[buffer(0)]], uint g [[threadgroup_position_in_grid]],
                  uint i [[thread_index_in_threadgroup]]) {{
      threadgroup float t[32];
      if (g == 0) t[i] = 1;
      {BARRIER}
      out[32 * g + i] = t[i];
    }}"""
    result = metal_host.run(source, [np.zeros(64, np.float32)], groups=2, check=False)
    assert kinds(result) == {"read of uninitialised threadgroup memory"}


def test_a_barrier_reached_at_two_places_diverges():
    result = launch(f"if (i < 40) {BARRIER} else {{ t[i] = 1; {BARRIER} }} out[i] = 1;")
    assert "divergent threadgroup_barrier" in kinds(result)


def test_a_barrier_after_some_threads_returned_is_reported():
    result = launch(f"if (i > 40) return; {BARRIER} out[i] = 1;")
    assert kinds(result) == {"threadgroup_barrier after threads returned"}


def test_a_collective_in_a_branch_runs_over_its_lanes_and_is_reported():
    result = launch("float s = -1; if (i % 2) s = simd_sum(in[i]); out[i] = s;", group=32)
    assert kinds(result) == {"simdgroup function not reached by every lane"}
    out = result.outputs[1][:32]
    assert (out[1::2] == X[1:32:2].sum()).all() and (out[::2] == -1).all()


def test_a_load_past_the_end_names_the_byte_the_buffer_and_the_line():
    (error,) = launch("out[i] =\nin[i + 1];").errors
    assert error.kind == "out-of-range load" and error.fatal
    assert (error.buffer, error.offset, error.where) == (0, 256, f"kernel.metal:{FIRST_LINE + 1}")
    assert "4 B at byte 256 of buffer 0 in (256 B)" in error.text and "thread 63" in error.text


def test_a_store_before_the_start_ends_the_launch():
    result = launch("out[int(i) - 1] = 1;")
    assert kinds(result) == {"out-of-range store"} and not result.completed
    assert result.errors[0].offset == -4


def test_a_wild_index_is_blamed_on_the_buffer_it_was_applied_to():
    result = launch("out[i] = in[i * 100000000u];")
    assert kinds(result) == {"out-of-range load"} and not result.completed
    assert result.errors[0].buffer == 0


def test_an_atomic_out_of_range_is_found_at_its_line():
    body = (
        "\natomic_fetch_add_explicit((device atomic_uint*)(out + i + 1), 1u, memory_order_relaxed);"
    )
    result = launch(body)
    assert kinds(result) == {"out-of-range store"}
    assert result.errors[0].where == f"kernel.metal:{FIRST_LINE + 1}"


def test_a_threadgroup_array_may_not_be_overrun():
    assert launch("t[i] = 1; out[i] = t[i + 1000];").fatal


def test_an_overrun_is_found_even_next_to_another_array():
    body = f"threadgroup float u[4]; if (i < 4) u[i] = 1; t[i] = 1; {BARRIER} out[i] = t[i + 1];"
    assert "threadgroup memory out of range" in kinds(launch(body))


def test_threadgroup_memory_set_by_the_launch_has_its_length():
    source = f"""{PRELUDE}
    kernel void k(threadgroup float* t [[threadgroup(0)]], device float* out [[buffer(0)]],
                  uint i [[thread_index_in_threadgroup]]) {{ t[i] = i; out[i] = t[i]; }}"""
    out = [np.zeros(32, np.float32)]
    assert metal_host.run(source, out, groups=1, threadgroup_memory=128).errors == []
    result = metal_host.run(source, out, groups=1, threadgroup_memory=112, check=False)
    assert kinds(result) == {"threadgroup memory out of range"}


def test_more_than_32_kib_of_threadgroup_memory_is_refused():
    result = launch("threadgroup float big[9000]; big[i] = 1; out[i] = big[i];")
    assert kinds(result) == {"threadgroup memory over 32 KiB"} and result.fatal


def test_a_wild_pointer_is_reported_and_the_process_survives():
    result = launch("device int* p = (device int*)16; out[i] = *p;")
    assert kinds(result) == {"wild access"} and not result.completed
    assert launch("out[i] = in[i];").errors == []


def test_an_uninitialised_register_becomes_nan():
    result = launch("float sum; if (in[0] > 1000) sum = 0; sum += in[i]; out[i] = sum;")
    assert np.isnan(result.outputs[1]).all()


def test_a_forbidden_load_is_found():
    result = launch("out[i] = in[i];", forbid=[(0, 128, 132)])
    assert kinds(result) == {"forbidden load"}
    assert result.errors[0].offset == 128 and result.errors[0].count == 1


def test_a_forbidden_store_is_found():
    assert launch("out[i] = in[i];", forbid=[(1, 8, 12, "load")]).errors == []
    result = launch("out[i] = in[i];", forbid=[(1, 8, 12, "store")])
    assert kinds(result) == {"forbidden store"}


def test_two_threadgroups_that_store_to_one_address_are_reported():
    source = f"""{PRELUDE}
    kernel void k(device float* out [[buffer(0)]], uint g [[threadgroup_position_in_grid]]) {{ out[0] = g; }}"""
    result = metal_host.run(source, [np.zeros(1, np.float32)], groups=2)
    assert kinds(result) == {"two threadgroups store to the same address"}


def test_a_uniform_argument_larger_than_its_buffer_is_found():
    source = f"""{PRELUDE}
    struct Arguments {{ float a[4]; }};
    kernel void k(constant Arguments& arguments [[buffer(0)]], device float* out [[buffer(1)]]) {{
      out[0] = arguments.a[0];
    }}"""
    result = metal_host.run(
        source, [np.zeros(3, np.float32), np.zeros(1, np.float32)], groups=1, group=1, check=False
    )
    assert kinds(result) == {"out-of-range load"}


def test_an_implicit_conversion_to_bfloat_is_warned_about():
    source = f"""{PRELUDE}
    kernel void k(device bfloat* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{
      float f = i;
      out[i] = f;
    }}"""
    result = metal_host.run(source, [np.zeros(32, ml_dtypes.bfloat16)], groups=1)
    assert len(result.compile_warnings) == 1 and "kernel.metal:6" in result.compile_warnings[0]


def test_a_stack_overflow_is_reported():
    body = "float big[100000]; for (int j = 0; j < 100000; j++) big[j] = in[j % 64]; out[i] = big[int(in[i]) * 7];"
    result = launch(body, group=1)
    assert kinds(result) == {"thread stack overflow"} and not result.completed


def test_check_raises_with_the_whole_report():
    source = f"""{PRELUDE}
    kernel void k(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ out[i + 1] = 1; }}"""
    with pytest.raises(metal_host.MetalHostError, match="out-of-range store of 4 B at byte 128"):
        metal_host.run(source, [np.zeros(32, np.float32)], groups=1)
