// <metal_simdgroup_matrix>: an 8x8 matrix, two elements a lane, in the layout
// of Apple's GPUs.
#pragma once
#include "simdgroup.h"

namespace metal {

template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "a simdgroup_matrix is 8x8");
  vec<T, 2> elements;

  // Lane l holds (row, column) and (row, column + 1).
  static METAL_HOST_INLINE int row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  static METAL_HOST_INLINE int column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

  simdgroup_matrix() = default;
  // `value` on the diagonal.
  METAL_HOST_INLINE explicit simdgroup_matrix(T value) {
    int lane = metal_host::lane();
    elements.x = row(lane) == column(lane) ? value : (T)0;
    elements.y = row(lane) == column(lane) + 1 ? value : (T)0;
  }
  METAL_HOST_INLINE METAL_HOST_PRIVATE vec<T, 2>& thread_elements() METAL_HOST_PRIVATE {
    return elements;
  }
  METAL_HOST_INLINE METAL_HOST_PRIVATE const vec<T, 2>& thread_elements() const METAL_HOST_PRIVATE {
    return elements;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows = 8, int Columns = 8>
METAL_HOST_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> out;
  out.elements = vec<T, 2>(value);
  return out;
}

template <class T, class P>
METAL_HOST_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& out, const P* source, ulong elements_per_row = 8,
                                      ulong2 origin = ulong2(0, 0), bool transpose = false) {
  ulong row = out.row(metal_host::lane());
  ulong column = out.column(metal_host::lane());
  if (transpose) {
    const P* at = source + (origin.y + column) * elements_per_row + origin.x + row;
    out.elements.x = (T)at[0];
    out.elements.y = (T)at[elements_per_row];
  } else {
    const P* at = source + (origin.y + row) * elements_per_row + origin.x + column;
    out.elements.x = (T)at[0];
    out.elements.y = (T)at[1];
  }
}
template <class T, class P>
METAL_HOST_INLINE void simdgroup_store(const simdgroup_matrix<T, 8, 8>& in, P* target, ulong elements_per_row = 8,
                                       ulong2 origin = ulong2(0, 0), bool transpose = false) {
  ulong row = in.row(metal_host::lane());
  ulong column = in.column(metal_host::lane());
  if (transpose) {
    P* at = target + (origin.y + column) * elements_per_row + origin.x + row;
    at[0] = (P)in.elements.x;
    at[elements_per_row] = (P)in.elements.y;
  } else {
    P* at = target + (origin.y + row) * elements_per_row + origin.x + column;
    at[0] = (P)in.elements.x;
    at[1] = (P)in.elements.y;
  }
}

} // namespace metal

namespace metal_host {

template <class A, class B, class C> struct Product8x8In {
  A a[2];
  B b[2];
  C c[2];
};
template <class D> struct Product8x8Out {
  D d[2];
};

// d = a * b + c over the whole matrices, accumulated in float, k = 0 to 7.
template <class D, class A, class B, class C> struct Product8x8 {
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    typedef float Row __attribute__((ext_vector_type(8)));
    typedef metal::simdgroup_matrix<float, 8, 8> Layout;
    Row a[8] = {};
    Row b[8] = {};
    Row c[8] = {};
    for (int lane = 0; lane < 32; lane++) {
      if (!lanes.has(lane)) continue;
      auto mine = lanes.template get<Product8x8In<A, B, C>>(lane);
      for (int e = 0; e < 2; e++) {
        a[Layout::row(lane)][Layout::column(lane) + e] = (float)mine.a[e];
        b[Layout::row(lane)][Layout::column(lane) + e] = (float)mine.b[e];
        c[Layout::row(lane)][Layout::column(lane) + e] = (float)mine.c[e];
      }
    }
    for (int row = 0; row < 8; row++) {
      for (int k = 0; k < 8; k++) {
        Row scale = a[row][k];
        c[row] = __builtin_elementwise_fma(scale, b[k], c[row]);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      if (!lanes.has(lane)) continue;
      const int row = Layout::row(lane);
      const int column = Layout::column(lane);
      lanes.set(lane, Product8x8Out<D>{{(D)c[row][column], (D)c[row][column + 1]}});
    }
  }
};

#ifdef METAL_HOST_OPAQUE
template <class D, class A, class B, class C> struct Opaque<Product8x8<D, A, B, C>> {
  static METAL_HOST_INLINE Product8x8Out<D> run(Product8x8In<A, B, C> in) {
    asm("# multiply" : "+x"(in.c[0]), "+x"(in.c[1]) : "x"(in.a[0]), "x"(in.a[1]), "x"(in.b[0]), "x"(in.b[1]));
    return {{(D)in.c[0], (D)in.c[1]}};
  }
};
#endif

} // namespace metal_host

namespace metal {

template <class D, class A, class B, class C>
METAL_HOST_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                                     const simdgroup_matrix<B, 8, 8>& b,
                                                     const simdgroup_matrix<C, 8, 8>& c) {
  metal_host::Product8x8In<A, B, C> in = {{a.elements.x, a.elements.y},
                                          {b.elements.x, b.elements.y},
                                          {c.elements.x, c.elements.y}};
  auto out = metal_host::meet<metal_host::Product8x8Out<D>, metal_host::Product8x8<D, A, B, C>>(in, kMeetMultiply);
  d.elements.x = out.d[0];
  d.elements.y = out.d[1];
}
template <class D, class A, class B>
METAL_HOST_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float>(0.0f));
}
template <class T>
METAL_HOST_INLINE simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8>& a,
                                                      const simdgroup_matrix<T, 8, 8>& b) {
  simdgroup_matrix<T, 8, 8> out;
  simdgroup_multiply(out, a, b);
  return out;
}

} // namespace metal
