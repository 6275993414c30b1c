"""Metal's built-in functions and types, as the host runs them."""

import metal_host
import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"
LANES = np.arange(32)
X = np.random.default_rng(0).standard_normal(32).astype(np.float32)
N = np.random.default_rng(1).integers(-50, 50, 32).astype(np.int32)


def per_lane(*expressions, dtype=np.float32, values=X):
    """What 32 lanes make of each expression in v, a lane's value, and l, its index."""
    scalar = {np.float32: "float", np.int32: "int", np.uint32: "uint"}
    lines = "".join(f"out[{32 * i} + l] = {e};\n" for i, e in enumerate(expressions))
    source = f"""{PRELUDE}
    kernel void k(device const {scalar[values.dtype.type]}* in [[buffer(0)]], device {scalar[dtype]}* out [[buffer(1)]],
                  ushort l [[thread_index_in_simdgroup]]) {{
      auto v = in[l];
      {lines}
    }}"""
    out = np.zeros(32 * len(expressions), dtype)
    return metal_host.run(source, [values, out], groups=1).outputs[1].reshape(-1, 32)


def one_thread(body, *buffers, parameters="", prelude="", **launch):
    """What one thread leaves in the 16 floats of `out`."""
    source = f"{PRELUDE}{prelude}\nkernel void k(device float* out [[buffer(0)]]{parameters}) {{ {body} }}"
    return metal_host.run(
        source, [np.zeros(16, np.float32), *buffers], groups=1, group=1, **launch
    ).outputs[0]


def test_reductions_reach_every_lane():
    total, largest, smallest, quads = per_lane(
        "simd_sum(v)", "simd_max(v)", "simd_min(v)", "quad_sum(v)"
    )
    np.testing.assert_allclose(total, X.sum(), atol=1e-5)
    assert (largest == X.max()).all() and (smallest == X.min()).all()
    np.testing.assert_allclose(quads, X.reshape(8, 4).sum(1).repeat(4), atol=1e-6)


def test_shuffles_take_the_value_of_the_named_lane():
    by_xor, reversed_, broadcast, in_quad = per_lane(
        "simd_shuffle_xor(v, 5)",
        "simd_shuffle(v, 31 - l)",
        "simd_broadcast(v, 7)",
        "quad_broadcast(v, 2)",
    )
    assert (by_xor == X[LANES ^ 5]).all()
    assert (reversed_ == X[31 - LANES]).all()
    assert (broadcast == X[7]).all()
    assert (in_quad == X[(LANES & ~3) + 2]).all()


def test_shifts_keep_their_own_value_or_fill_at_the_edge():
    down, up, rotated, filled_down, filled_up = per_lane(
        "simd_shuffle_down(v, 3)",
        "simd_shuffle_up(v, 2)",
        "simd_shuffle_rotate_down(v, 4)",
        "simd_shuffle_and_fill_down(v, -2.0f, 3)",
        "simd_shuffle_and_fill_up(v, -1.0f, 3)",
    )
    assert (down[:29] == X[3:]).all() and (up[2:] == X[:30]).all()
    assert (rotated == X[(LANES + 4) % 32]).all()
    assert (filled_down[:29] == X[3:]).all() and (filled_down[29:] == -2).all()
    assert (filled_up[3:] == X[:29]).all() and (filled_up[:3] == -1).all()


def test_prefix_sums_run_in_lane_order():
    inclusive, exclusive = per_lane("simd_prefix_inclusive_sum(v)", "simd_prefix_exclusive_sum(v)")
    np.testing.assert_allclose(inclusive, np.cumsum(X), atol=1e-5)
    np.testing.assert_allclose(exclusive, np.cumsum(X) - X, atol=1e-5)


def test_votes_and_bitwise_reductions_see_all_lanes():
    ballot, some, every, first, either = per_lane(
        "uint((simd_vote::vote_t)simd_ballot(v > 0))",
        "simd_any(v > 40)",
        "simd_all(v > -60)",
        "simd_is_first()",
        "simd_or(uint(v))",
        dtype=np.uint32,
        values=N,
    )
    assert (ballot == sum(1 << i for i in range(32) if N[i] > 0)).all()
    assert (some == (N > 40).any()).all() and (every == 1).all()
    assert first.tolist() == [1] + 31 * [0]
    assert (either == np.bitwise_or.reduce(N.view(np.uint32))).all()


def test_vectors_of_four_are_exchanged_whole():
    source = f"""{PRELUDE}
    kernel void k(device const float4* in [[buffer(0)]], device float4* out [[buffer(1)]],
                  ushort l [[thread_index_in_simdgroup]]) {{
      out[l] = simd_shuffle_xor(in[l], 1);
    }}"""
    values = np.arange(128, dtype=np.float32).reshape(32, 4)
    out = metal_host.run(source, [values, np.zeros_like(values)], groups=1).outputs[1]
    assert (out == values[LANES ^ 1]).all()


MATRIX = """
kernel void k(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]], device float* out [[buffer(2)]],
              uint l [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 A, B, D;
  simdgroup_load(A, a, 8);
  simdgroup_load(B, b, 8);
  %s
  simdgroup_store(D, out, 8);
}"""


def matrix(body, dtype=np.float32):
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((2, 8, 8)).astype(np.float32)
    result = metal_host.run(PRELUDE + MATRIX % body, [a, b, np.zeros((8, 8), np.float32)], groups=1)
    return a, b, result


def test_matrix_multiply_accumulate_is_a_product_plus_c():
    a, b, result = matrix("simdgroup_multiply_accumulate(D, A, B, A);")
    np.testing.assert_allclose(result.outputs[2], a @ b + a, atol=1e-5)
    assert result.counters.matrix_multiplies == 1


def test_matrix_load_and_store_can_transpose():
    a, b, result = matrix(
        "simdgroup_load(B, b, 8, ulong2(0, 0), true); simdgroup_multiply(D, A, B);"
    )
    np.testing.assert_allclose(result.outputs[2], a @ b.T, atol=1e-5)
    a, b, result = matrix(
        "D = A; simdgroup_store(D, out, 8, ulong2(0, 0), true); simdgroup_load(D, out, 8);"
    )
    np.testing.assert_array_equal(result.outputs[2], a.T)


def test_matrix_constructor_fills_the_diagonal():
    _, _, result = matrix("D = simdgroup_float8x8(3.0f);")
    np.testing.assert_array_equal(result.outputs[2], 3 * np.eye(8))


def test_matrix_lanes_hold_the_elements_that_apple_gives_them():
    _, _, result = matrix("thread auto& e = D.thread_elements(); e[0] = l; e[1] = l + 100;")
    assert result.outputs[2][0].tolist() == [0, 100, 1, 101, 8, 108, 9, 109]
    assert result.outputs[2][4][0] == 16


def test_half_and_bfloat_matrices_multiply_into_float():
    source = f"""{PRELUDE}
    kernel void k(device const half* a [[buffer(0)]], device const bfloat* b [[buffer(1)]],
                  device float* out [[buffer(2)]]) {{
      simdgroup_half8x8 A; simdgroup_bfloat8x8 B; simdgroup_float8x8 C = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      simdgroup_load(A, a, 8); simdgroup_load(B, b, 8);
      simdgroup_multiply_accumulate(C, A, B, C);
      simdgroup_store(C, out, 8);
    }}"""
    a = X.repeat(2).reshape(8, 8).astype(np.float16)
    b = X[::-1].repeat(2).reshape(8, 8).astype(ml_dtypes.bfloat16)
    out = metal_host.run(source, [a, b, np.zeros((8, 8), np.float32)], groups=1).outputs[2]
    np.testing.assert_allclose(out, a.astype(np.float32) @ b.astype(np.float32), atol=1e-4)


def test_swizzles_read_and_write_components():
    out = one_thread(
        "float4 f(1, 2, 3, 4); float4 g = f.wzyx; g.xy += f.zw; out[0] = g.x; out[1] = g.y; out[2] = g.z;"
    )
    assert out[:3].tolist() == [7, 7, 2]


def test_vector_operators_work_by_component():
    body = """float4 f(1, 2, 3, 4); out[0] = dot(f, float4(1, 2, 3, 4)); out[1] = all(f == f); out[2] = any(f > 3.5f);
    uint2 q = uint2(3, 4) << 1; out[3] = q.y; out[4] = (2.0f * f - 1.0f).z; out[5] = max(f, float4(2.5f)).x;"""
    assert one_thread(body)[:6].tolist() == [30, 1, 1, 8, 5, 2.5]


def test_structs_keep_the_layout_of_metal():
    arguments = np.concatenate(
        [
            np.array([1, 2, 3, 4], np.float16).view(np.uint8),
            np.array([1.5], ml_dtypes.bfloat16).view(np.uint8),
            np.zeros(6, np.uint8),
            np.array([7, 8], np.float32).view(np.uint8),
        ]
    )
    out = one_thread(
        "out[0] = float(s.a.w); out[1] = float(s.b); out[2] = s.c.y; out[3] = sizeof(float3) + sizeof(packed_float3);",
        arguments,
        parameters=", constant S& s [[buffer(1)]]",
        prelude="struct S { half4 a; bfloat b; float2 c; };",
    )
    assert out[:4].tolist() == [4, 1.5, 8, 28]


def test_methods_may_be_overloaded_on_address_space():
    prelude = """struct Q { float v; Q(float x) thread : v(x) {} Q(float x) threadgroup : v(x) {}
      float get() const thread { return v; } float get() const device { return v; } };"""
    assert one_thread("Q q(2.5f); out[0] = q.get();", prelude=prelude)[0] == 2.5


def test_half_and_bfloat_round_after_every_operation():
    body = """half h = 1.0h; h += half(0.0004883); out[0] = float(h);
    bfloat b = bfloat(1.0f) + bfloat(0.00390625f); out[1] = float(b);"""
    assert one_thread(body)[:2].tolist() == [1, 1]


@pytest.mark.parametrize("name, dtype", [("half", np.float16), ("bfloat", ml_dtypes.bfloat16)])
def test_vectors_of_half_and_bfloat_round_like_scalars(name, dtype):
    source = f"""{PRELUDE}
    kernel void k(device const {name}4* in [[buffer(0)]], device {name}4* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {{ out[i] = in[i] * in[i] + in[i].wzyx; }}"""
    values = X.reshape(8, 4).astype(dtype)
    out = metal_host.run(source, [values, np.zeros_like(values)], grid=8).outputs[1]
    squares = (values.astype(np.float32) ** 2).astype(dtype)
    expected = (squares.astype(np.float32) + values[:, ::-1].astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


def test_bfloat_rounds_to_nearest_even():
    values = np.random.default_rng(3).standard_normal(16).astype(np.float32)
    out = one_thread(
        "for (int i = 0; i < 16; i++) out[i] = float(bfloat(in[i]));",
        values,
        parameters=", device const float* in [[buffer(1)]]",
    )
    np.testing.assert_array_equal(out, values.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_unsuffixed_literals_are_float():
    assert one_thread("out[0] = 0.1 + 0.2;")[0] == np.float32(0.1) + np.float32(0.2)


def test_scalar_functions_follow_the_specification():
    body = """out[0] = as_type<float>(0x40490fdbu); out[1] = select(1.0f, 2.0f, true); out[2] = clamp(5, 0, 3);
    out[3] = float(ushort(70000)); out[4] = popcount(255u); out[5] = clz(1u); out[6] = fma(2.0f, 3.0f, 1.0f);
    out[7] = max(NAN, 1.0f); out[8] = exp2(10.0f); out[9] = fast::exp(0.0f); out[10] = precise::rsqrt(4.0f);
    out[11] = isinf(INFINITY); out[12] = float(half(rsqrt(4.0h)));"""
    expected = [np.float32(np.pi), 2, 3, 4464, 8, 31, 7, 1, 1024, 1, 0.5, 1, 0.5]
    assert one_thread(body)[:13].tolist() == expected


def test_denormals_are_flushed_unless_kept():
    body = "out[0] = in[0] * 0.5f;"
    parameters = ", device const float* in [[buffer(1)]]"
    tiny = np.array([1.5e-38], np.float32)
    assert one_thread(body, tiny, parameters=parameters)[0] == 0
    assert one_thread(body, tiny, parameters=parameters, flush_denormals=False)[0] > 0


def test_ulp_moves_transcendental_results_by_that_much():
    exact = per_lane("exp(v)")[0]
    source = f"""{PRELUDE}
    kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  ushort l [[thread_index_in_simdgroup]]) {{ out[l] = exp(in[l]); }}"""
    moved = metal_host.run(source, [X, np.zeros_like(X)], groups=1, ulp=3).outputs[1]
    steps = np.abs(moved.view(np.int32) - exact.view(np.int32))
    assert 0 < steps.max() <= 3


def test_atomics_add_up_over_a_ragged_grid():
    source = f"""{PRELUDE}
    kernel void k(device atomic_uint* count [[buffer(0)]], device atomic<float>* sum [[buffer(1)]]) {{
      atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
      atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);
    }}"""
    result = metal_host.run(
        source, [np.zeros(1, np.uint32), np.zeros(1, np.float32)], grid=1000, group=64
    )
    assert result.outputs[0][0] == 1000 and result.outputs[1][0] == 500
    assert result.counters.threadgroups == 16 and result.counters.threads == 1000
