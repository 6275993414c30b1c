"""Programs, variants and launches of the Metal host."""

import ctypes
import os
import shutil
import threading
from pathlib import Path

import metal_host
import numpy as np
import pytest
from metal_host import HostMemory, MetalHostError, Program
from metal_host.compiler import prune
from metal_host.variant import load_address

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"
SCALE = f"""{PRELUDE}
constant float factor [[function_constant(3)]];
constant bool has_bias [[function_constant(4)]];
template <typename T>
[[kernel]] void scale(device const T* in [[buffer(0)]], device T* out [[buffer(1)]],
                      device const T* bias [[buffer(2), function_constant(has_bias)]],
                      uint i [[thread_position_in_grid]]) {{
  out[i] = in[i] * T(factor);
  if (has_bias) out[i] += bias[i];
}}
template [[host_name("scale_float")]] [[kernel]] void scale<float>(device const float*, device float*,
                                                                   device const float*, uint);
template [[host_name("scale_half")]] [[kernel]] decltype(scale<half>) scale<half>;
kernel void defined(device int* out [[buffer(0)]]) {{
  out[0] = is_function_constant_defined(factor);
  out[1] = is_function_constant_defined(has_bias);
}}
"""
X = np.arange(32, dtype=np.float32)
ADD_ONE = f"{PRELUDE}kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ a[i] += 1; }}"


@pytest.fixture(scope="module")
def scale():
    return Program(SCALE)


def test_kernels_are_listed_by_host_name(scale):
    assert scale.kernels == ["defined", "scale", "scale_float", "scale_half"]


@pytest.mark.parametrize("kernel, dtype", [("scale_float", np.float32), ("scale_half", np.float16)])
def test_a_kernel_is_found_by_host_name(scale, kernel, dtype):
    values = X.astype(dtype)
    out = scale.run(
        kernel, [values, np.zeros_like(values)], groups=1, constants={3: 2.0, 4: False}
    ).outputs[1]
    assert (out == 2 * values).all()


def test_a_kernel_is_found_by_template_id(scale):
    values = X.astype(np.int32)
    out = scale.run(
        "scale<int>", [values, np.zeros_like(values)], groups=1, constants={3: 3.0, 4: False}
    ).outputs[1]
    assert (out == 3 * values).all()


def test_threadgroup_arrays_may_have_the_size_and_type_of_a_template():
    source = f"""{PRELUDE}
    template <typename T, int N> kernel void reverse(device T* out [[buffer(0)]],
                                                     uint i [[thread_index_in_threadgroup]]) {{
      threadgroup T row[N], other[2][N];
      threadgroup metal::vec<T, 2> pair;
      row[i] = i;
      other[1][i] = 2 * row[i];
      if (i == 0) pair = 1;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[i] = other[1][N - 1 - i] + pair.y;
    }}"""
    result = Program(source).run("reverse<half, 32>", [np.zeros(32, np.float16)], groups=1)
    assert (result.outputs[0] == 63 - 2 * X).all()
    assert result.counters.threadgroup_memory_bytes == 64 + 128 + 4


def test_function_constants_switch_code_and_arguments(scale):
    buffers = [X, np.zeros_like(X), np.ones_like(X)]
    out = scale.run("scale_float", buffers, groups=1, constants={3: 2.0, 4: True}).outputs[1]
    assert (out == 2 * X + 1).all()
    with pytest.raises(ValueError, match=r"must bind 2 \(bias\)"):
        scale.run("scale_float", buffers[:2], groups=1, constants={3: 2.0, 4: True})


def test_a_buffer_may_depend_on_a_constant_derived_from_others():
    source = SCALE.replace(
        "template <typename T>",
        "constant bool wants_bias = has_bias && factor > 0;\ntemplate <typename T>",
    )
    source = source.replace("function_constant(has_bias)]],", "function_constant(wants_bias)]],")
    out = (
        Program(source)
        .run("scale_float", [X, X], groups=1, constants={3: 2.0, 4: False})
        .outputs[1]
    )
    assert (out == 2 * X).all()


def test_a_function_constant_without_a_value_is_an_error_where_it_is_used(scale):
    with pytest.raises(
        MetalHostError, match=r"value for 3 \(factor\), which kernel scale_float uses"
    ):
        scale.run("scale_float", [X, X], groups=1, constants={4: False})
    out = scale.run(
        "defined", [np.zeros(2, np.int32)], groups=1, group=1, constants={4: False}
    ).outputs[0]
    assert out.tolist() == [0, 1]


def test_an_unknown_kernel_is_a_value_error(scale):
    with pytest.raises(ValueError, match="kernel must be one of defined, scale"):
        scale.run("scald", [X], groups=1)


def test_an_unbound_buffer_is_a_value_error():
    source = ADD_ONE.replace("a [[buffer(0)]]", "a [[buffer(0)]], device float* b [[buffer(1)]]")
    with pytest.raises(ValueError, match=r"must bind 1 \(b\)"):
        metal_host.run(source, [X], groups=1)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"grid": 32, "groups": 1},
        {"groups": 1, "group": 1025},
        {"groups": (1, 0)},
        {"groups": 1, "threadgroup_memory": 20},
        {"groups": 1, "threadgroup_memory": 9 * [16]},
    ],
)
def test_a_launch_without_a_sound_size_is_a_value_error(sizes):
    with pytest.raises(ValueError, match=r"\[run\]"):
        metal_host.run(ADD_ONE, [X], **sizes)


def test_a_kernel_limits_its_threads():
    source = ADD_ONE.replace(
        "kernel void", "[[kernel, max_total_threads_per_threadgroup(64)]] void"
    )
    assert (
        metal_host.run(source, [np.zeros(64, np.float32)], groups=1, group=64).outputs[0] == 1
    ).all()
    with pytest.raises(ValueError, match="1 to 64 threads"):
        metal_host.run(source, [X], groups=1, group=65)


def test_a_buffer_index_beyond_metals_limit_is_a_value_error():
    with pytest.raises(ValueError, match=r"indices must be in \[0, 31\)"):
        metal_host.run(ADD_ONE, {0: X, 31: X}, groups=1)


def test_text_that_is_not_ascii_is_refused_with_its_line():
    with pytest.raises(ValueError, match="must be ASCII.*line 1"):
        Program("// caf\u00e9\n" + ADD_ONE)


def test_a_source_that_does_not_compile_shows_the_compilers_message():
    with pytest.raises(MetalHostError, match=r"kernel\.metal:3:\d+: error"):
        metal_host.run(ADD_ONE.replace("a[i] += 1", "a[i] += b"), [X], groups=1)


def test_includes_are_found_and_findings_name_their_file(tmp_path):
    (tmp_path / "body.h").write_text(
        "inline void body(device float* a, uint i) {\n  a[i + 32] = 1;\n}\n"
    )
    kernel = tmp_path / "with_include.metal"
    kernel.write_text(
        ADD_ONE.replace("kernel", '\n#include "body.h"\nkernel').replace("a[i] += 1", "body(a, i)")
    )
    result = Program(kernel, [tmp_path]).run("k", [X], groups=1, check=False)
    assert result.errors[0].where == "body.h:2"


def test_macros_can_be_given_with_the_source():
    program = Program(ADD_ONE.replace("+= 1", "+= STEP"), defines={"STEP": 3})
    assert (program.run("k", [X], groups=1).outputs[0] == X + 3).all()


def test_inputs_are_left_alone_and_outputs_are_copies():
    values = X.copy()
    result = metal_host.run(ADD_ONE, [values], groups=1)
    assert (values == X).all() and (result.outputs[0] == X + 1).all()


@pytest.mark.parametrize("instrument", [True, False])
def test_host_memory_is_updated_in_place(instrument):
    values = X.copy()
    memory = HostMemory(values.ctypes.data, values.nbytes)
    result = Program(ADD_ONE).run("k", {0: memory}, groups=1, instrument=instrument)
    assert (values == X + 1).all() and result.outputs == {}


@pytest.mark.parametrize("instrument", [True, False])
def test_overlapping_host_memory_is_one_memory_in_the_kernel(instrument):
    source = f"""{PRELUDE}
    kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {{
      out[0] = 7;
      out[1] = ((volatile device const float*)in)[2];
    }}"""
    values = X.copy()
    whole = HostMemory(values.ctypes.data, values.nbytes)
    tail = HostMemory(values.ctypes.data + 8, values.nbytes - 8)
    Program(source).run("k", [whole, tail], groups=1, group=1, instrument=instrument)
    assert values[:4].tolist() == [0, 1, 7, 7]


def test_host_memory_outside_what_was_stored_is_not_written_back():
    values = X.copy()
    source = ADD_ONE.replace("a[i] += 1", "if (i == 4) a[i] += 1")
    Program(source).run("k", [HostMemory(values.ctypes.data, values.nbytes)], groups=1)
    assert (values == X + (np.arange(32) == 4)).all()


def test_a_buffer_that_shrinks_is_guarded_at_its_new_end():
    source = f"""{PRELUDE}
    kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {{ out[i] = in[i + 1]; }}"""
    program = Program(source)
    program.run("k", [np.zeros(64, np.float32), X], grid=32)
    result = program.run("k", [X, X], grid=32, check=False)
    assert result.errors[0].text.startswith("out-of-range load of 4 B at byte 128")
    assert np.isnan(result.outputs[1][31])


def test_nothing_is_remembered_from_one_launch_to_the_next():
    program = Program(ADD_ONE)
    assert program.run("k", [X], groups=1, forbid=[(0, 0, 128, "both")], check=False).errors
    first = program.run("k", [X], groups=1)
    second = program.run("k", [X], groups=1)
    assert first.errors == second.errors == []
    assert first.buffers[0] == second.buffers[0]
    assert first.buffers[0].unique_load_bytes == first.buffers[0].unique_store_bytes == 128


def test_launches_from_several_threads_do_not_mix():
    program = Program(ADD_ONE)
    outputs = [None] * 8

    def work(n):
        for _ in range(5):
            outputs[n] = program.run("k", [np.full(32, n, np.float32)], groups=1).outputs[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.tolist() for output in outputs] == [[n + 1] * 32 for n in range(8)]


def test_a_large_buffer_can_come_and_go():
    program = Program(ADD_ONE)
    large = np.zeros(20 << 20, np.float32)
    for values in (large, X, large):
        result = program.run("k", [values], grid=32)
        assert (result.outputs[0][:32] == values[:32] + 1).all() and result.errors == []
        assert result.buffers[0].unique_store_bytes == 128


def test_every_order_gives_the_same_result_for_a_kernel_without_races():
    source = f"""{PRELUDE}
    kernel void k(device float* out [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {{
      threadgroup float t[128];
      t[i] = simd_sum(float(i));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[i] = t[127 - i];
    }}"""
    program = Program(source)
    results = [
        program.run("k", [np.zeros(128, np.float32)], groups=1, group=128, order=order)
        for order in ("forward", "reverse", 1, 2, 3)
    ]
    assert all(result.errors == [] for result in results)
    assert len({result.outputs[0].tobytes() for result in results}) == 1


def test_a_result_prints_itself():
    text = str(metal_host.run(ADD_ONE, [X], groups=1))
    assert text.startswith("k: 1 threadgroups, 1 simdgroups, 32 threads")
    assert "buffer 0 a: loads 128 B" in text


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / f"{name}.log").touch()
        library = tmp_path / f"{name}.so"
        library.touch()
        os.utime(library, (1000 - age, 1000 - age))
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "new.log",
        "new.so",
        "old.log",
        "old.so",
    ]


def test_a_library_that_was_pruned_after_it_was_loaded_is_found_in_memory(tmp_path):
    with open("/proc/self/maps") as maps:
        known = next(line.split()[-1] for line in maps if "/libm.so" in line or "/libm-" in line)
    copy = Path(shutil.copy(known, tmp_path / "copy.so"))
    ctypes.CDLL(str(copy))
    address = load_address(copy)
    copy.unlink()
    assert load_address(copy) == address > 0


def test_two_processes_may_prune_a_cache_at_the_same_time(tmp_path):
    (tmp_path / "kept.so").touch()
    (tmp_path / "gone.so").symlink_to(tmp_path / "dropped by another")  # listed, and not there
    prune(tmp_path, keep=1)
    assert (tmp_path / "kept.so").exists()


@pytest.mark.parametrize("instrument", [True, False])
def test_memory_that_no_gpu_would_have_misaligned_is_read_and_written_in_place(instrument):
    values = np.arange(34, dtype=np.float32)
    begin = values.ctypes.data + (8 - values.ctypes.data) % 16  # MLX's CPU arrays begin like this
    source = PRELUDE + (
        "kernel void k(device float4* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] += x[i]; }"
    )
    Program(source).run("k", [HostMemory(begin, 128)], grid=8, group=8, instrument=instrument)
    first = (begin - values.ctypes.data) // 4
    expected = np.arange(34, dtype=np.float32)
    expected[first : first + 32] *= 2
    assert (values == expected).all()
