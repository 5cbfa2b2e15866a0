// Register tiles: the products of a few rows with the columns of one packed panel, summed in registers.
#pragma once
#include "common.h"

namespace SVK_ISA {

// c[m][n] = sum over pairs of row m of `a` with 16 columns of a bf16 panel. `b` is the panel at the first column.
template <int M, int N>
SVK_INLINE void step_bf16(const u16* a, long a_stride, const u32* b, long b_stride, long k, vf (&c)[M][N]) {
  PairCols cols[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) cols[n] = load_pairs(b + k * b_stride + n * 16);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    PairRow row = splat_pair(((const u32_of_row*)(a + m * a_stride))[k]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) c[m][n] = dot_pairs(c[m][n], cols[n], row);
  }
}

template <int M, int N>
SVK_INLINE void tile_bf16(const u16* a, long a_stride, const u32* b, long b_stride, long pairs, vf (&c)[M][N]) {
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) c[m][n] = zero();
  for (long k = 0; k < pairs; k++) step_bf16<M, N>(a, a_stride, b, b_stride, k, c);
}

// The same in integers, added to what is in c: signed 8-bit rows with a panel of unsigned 8-bit columns (q + 128: the
// caller starts with -128 times the sum of a row).
template <int M, int N>
SVK_INLINE void step_int8(const int8_t* a, long a_stride, const u32* b, long k, vi (&c)[M][N]) {
  QuadCols cols[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) cols[n] = as_quads(load_i(b + k * PANEL + n * 16));
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    QuadRow row = splat_quad(((const u32_of_bytes*)(a + m * a_stride))[k]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) c[m][n] = dot_quads(c[m][n], cols[n], row);
  }
}

template <int M, int N>
SVK_INLINE void tile_int8(const int8_t* a, long a_stride, const u32* b, long quads, vi (&c)[M][N]) {
  for (long k = 0; k < quads; k++) step_int8<M, N>(a, a_stride, b, k, c);
}

#ifdef SVK_INT8_ATTENTION
// Unsigned 8-bit rows with signed 8-bit columns.
template <int M, int N>
SVK_INLINE void tile_weights(const uint8_t* a, long a_stride, const u32* b, long b_stride, long quads, vi (&c)[M][N]) {
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) c[m][n] = zero_i();
  for (long k = 0; k < quads; k++) {
    QuadCols cols[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) cols[n] = as_quads(load_i(b + k * b_stride + n * 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      QuadRow row = splat_quad(((const u32_of_bytes*)(a + m * a_stride))[k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) c[m][n] = dot_quads(c[m][n], row, cols[n]);
    }
  }
}
#endif

// Calls f with a number as a compile-time constant.
template <int V> struct Const { static constexpr int value = V; };

template <int MAX, class F> SVK_INLINE void with_rows(int m, F&& f) {
  static_assert(MAX <= 8, "add a case");
  switch (m) {
    case 1: return f(Const<1>());
    case 2: if constexpr (MAX >= 2) return f(Const<2>()); break;
    case 3: if constexpr (MAX >= 3) return f(Const<3>()); break;
    case 4: if constexpr (MAX >= 4) return f(Const<4>()); break;
    case 5: if constexpr (MAX >= 5) return f(Const<5>()); break;
    case 6: if constexpr (MAX >= 6) return f(Const<6>()); break;
    case 7: if constexpr (MAX >= 7) return f(Const<7>()); break;
    case 8: if constexpr (MAX >= 8) return f(Const<8>()); break;
  }
}

// Columns first, first + 1, ... of `count` in steps of at most TILE_VECS, as constants: f(N, first).
template <class F> SVK_INLINE void for_columns(int count, F&& f) {
  int at = 0;
  if constexpr (TILE_VECS >= 4)
    for (; at + 4 <= count; at += 4) f(Const<4>(), at);
  if constexpr (TILE_VECS >= 2)
    for (; at + 2 <= count; at += 2) f(Const<2>(), at);
  for (; at < count; at++) f(Const<1>(), at);
}

}  // namespace SVK_ISA
