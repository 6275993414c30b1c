"""The address-space check: what a Mac's compiler would refuse, and what it would not."""

import metal_host
import pytest
from metal_host import address_spaces

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None or address_spaces.find_checker() is None,
    reason="the address-space check needs a clang with C++ for OpenCL: apt-get install clang-19",
)

SOURCE = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant float factor [[function_constant(0)]];
constant float bias = is_function_constant_defined(factor) ? factor : 1.0f;

struct Arguments {
  int length;
  float scale;
};

struct Total {
  float value;
  int2 parts;
  Total(float start) thread : value(start), parts{1, int(start)} {}
  float get() const thread { return value; }
  thread float& edit() { return value; }
  static constexpr int rows() { return 8; }
};

template <typename T>
inline float total(device const T* row, int length) {
  float sum = 0;
  for (int i = 0; i < length; i++) {
    sum += float(row[i]);
  }
  return sum;
}

inline void add(thread float& sum, threadgroup const float* shared, int i) {
  sum += shared[i];
}

template <typename T, int N>
[[kernel]] void reduce(device const T* in [[buffer(0)]],
                       device float* out [[buffer(1)]],
                       constant Arguments& arguments [[buffer(2)]],
                       device atomic_uint* count [[buffer(3)]],
                       uint g [[threadgroup_position_in_grid]],
                       uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[N];
  threadgroup float first;
  Total row = Total(total(in + g * arguments.length, arguments.length));
  shared[i] = simd_sum(row.get()) * bias;
  if (i == 0) first = shared[0];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  row.edit() = Total::rows();
  float sum = first;
  add(sum, shared, N - 1 - i);
  const int2 range = i < 4 ? int2(0, 4) : int2(4, N) - 1;
  simdgroup_matrix<float, 8, 8> m = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_load(m, shared, 8);
  thread auto& elements = m.thread_elements();
  float4 v = float4(elements[0], 1, 2, 3).wzyx;
  half4 h = half4(v) + half4(1.0h);
  out[g] = sum + range.x + exp2(v.x) + float(h.y) + float(bfloat(sum));
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
  device const uint4* wide = (device const uint4*)in;
  out[g] += float(wide[0].x) + as_type<float>(wide[0].y);
}

template [[host_name("reduce_half")]] [[kernel]] decltype(reduce<half, 64>) reduce<half, 64>;
"""


def errors_of(old="", new=""):
    assert old in SOURCE
    return address_spaces.check(
        SOURCE.replace(old, new, 1) if old else SOURCE, kernels=["reduce_half"]
    )


def line_of(text):
    return next(i for i, line in enumerate(SOURCE.splitlines(), 1) if text in line)


def test_sound_source_has_no_errors():
    assert errors_of() == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("thread float& sum", "float& sum"),
        ("threadgroup const float* shared", "const float* shared"),
        ("threadgroup const float* shared", "device const float* shared"),
        ("device const T* row", "threadgroup const T* row"),
        ("device const T* row", "constant T* row"),
        ("device const T* in", "constant T* in"),
        ("device float* out", "device const float* out"),
        ("(device const uint4*)in", "(const uint4*)in"),
        ("(device const uint4*)in", "(threadgroup const uint4*)in"),
        ("device const uint4* wide", "const uint4* wide"),
        ("threadgroup float shared[N];", "float shared[N];"),
        ("out[g] = sum", "arguments.length = 1; out[g] = sum"),
        ("  Total row =", "  threadgroup Total shared_row; shared_row.edit() = 1;\n  Total row ="),
        ("thread float& edit()", "device float& edit()"),
        ("bfloat(sum)", "bfloat(h.x) + (bfloat)h"),
    ],
)
def test_a_wrong_address_space_is_an_error(old, new):
    assert errors_of(old, new)


def test_an_error_names_the_line_of_the_kernel():
    errors = errors_of("thread float& sum", "float& sum")
    assert any(error.startswith(f"kernel.metal:{line_of('inline void add')}: ") for error in errors)
    errors = errors_of("device const T* in", "constant T* in")
    assert any(error.startswith(f"kernel.metal:{line_of('Total row')}: ") for error in errors)


def test_bodies_of_templates_are_checked_for_the_kernels_asked_for():
    broken = SOURCE.replace("add(sum, shared", "add(shared[0], shared")
    assert address_spaces.check(broken, kernels=["reduce_half"])
    assert address_spaces.check(broken.replace("template [[host", "// template [[host")) == []
