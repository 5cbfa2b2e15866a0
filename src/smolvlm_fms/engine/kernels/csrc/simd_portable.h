// The names of simd_avx512.h in plain C++: loops over sixteen lanes, which the compiler may vectorise as it can.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SVK_INLINE static inline __attribute__((always_inline))

namespace SVK_ISA {

struct vf { float v[16]; };
struct vi { int32_t v[16]; };
struct PairCols { vf even, odd; };
struct PairRow { float even, odd; };
struct QuadCols { vi byte[4]; };
struct QuadRow { int32_t byte[4]; };

constexpr int TILE_ROWS = 2;
constexpr int TILE_VECS = 1;

#define SVK_LANES for (int i = 0; i < 16; i++)

SVK_INLINE vf splat(float x) { vf r; SVK_LANES r.v[i] = x; return r; }
SVK_INLINE vf zero() { return splat(0.0f); }
SVK_INLINE vf load(const float* p) { vf r; memcpy(r.v, p, sizeof r.v); return r; }
SVK_INLINE void store(float* p, vf x) { memcpy(p, x.v, sizeof x.v); }
SVK_INLINE vf load_n(const float* p, long n) { vf r; SVK_LANES r.v[i] = i < n ? p[i] : 0.0f; return r; }
SVK_INLINE void store_n(float* p, vf x, long n) { SVK_LANES if (i < n) p[i] = x.v[i]; }
SVK_INLINE vf add(vf a, vf b) { SVK_LANES a.v[i] += b.v[i]; return a; }
SVK_INLINE vf sub(vf a, vf b) { SVK_LANES a.v[i] -= b.v[i]; return a; }
SVK_INLINE vf mul(vf a, vf b) { SVK_LANES a.v[i] *= b.v[i]; return a; }
SVK_INLINE vf div(vf a, vf b) { SVK_LANES a.v[i] /= b.v[i]; return a; }
SVK_INLINE vf fmadd(vf a, vf b, vf c) { SVK_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
SVK_INLINE vf vmax(vf a, vf b) { SVK_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
SVK_INLINE vf vmin(vf a, vf b) { SVK_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
SVK_INLINE vf vabs(vf a) { SVK_LANES a.v[i] = fabsf(a.v[i]); return a; }
SVK_INLINE vf quotient(vf a, vf d) { return div(a, d); }
// The larger of two sizes (no signs); a NaN is the largest, where vmax forgets it.
SVK_INLINE float max_size(float a, float b) { return a > b || a != a ? a : b; }
SVK_INLINE vf max_size(vf a, vf b) { SVK_LANES a.v[i] = max_size(a.v[i], b.v[i]); return a; }
SVK_INLINE float max_size_of_lanes(vf a) { float m = a.v[0]; SVK_LANES m = max_size(m, a.v[i]); return m; }
SVK_INLINE float sum_lanes(vf a) { float s = 0; SVK_LANES s += a.v[i]; return s; }
SVK_INLINE float max_lanes(vf a) { float m = a.v[0]; SVK_LANES m = a.v[i] > m ? a.v[i] : m; return m; }
SVK_INLINE vf keep_first(vf a, long n, vf other) { SVK_LANES a.v[i] = i < n ? a.v[i] : other.v[i]; return a; }

SVK_INLINE vi splat_i(int32_t x) { vi r; SVK_LANES r.v[i] = x; return r; }
SVK_INLINE vi zero_i() { return splat_i(0); }
SVK_INLINE vi load_i(const void* p) { vi r; memcpy(r.v, p, sizeof r.v); return r; }
SVK_INLINE void store_i(void* p, vi x) { memcpy(p, x.v, sizeof x.v); }
SVK_INLINE vi add_i(vi a, vi b) { SVK_LANES a.v[i] += b.v[i]; return a; }
SVK_INLINE vi sub_i(vi a, vi b) { SVK_LANES a.v[i] -= b.v[i]; return a; }
SVK_INLINE vi and_i(vi a, vi b) { SVK_LANES a.v[i] &= b.v[i]; return a; }
template <int N> SVK_INLINE vi shift_left(vi a) { SVK_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] << N); return a; }
template <int N> SVK_INLINE vi shift_right(vi a) { SVK_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] >> N); return a; }
template <int N> SVK_INLINE vi shift_right_signed(vi a) { SVK_LANES a.v[i] >>= N; return a; }
SVK_INLINE int32_t sum_lanes_i(vi a) { int32_t s = 0; SVK_LANES s += a.v[i]; return s; }
SVK_INLINE vf to_float(vi a) { vf r; SVK_LANES r.v[i] = (float)a.v[i]; return r; }
// Ties to even, for |a| < 2^22 (all that the kernels ask for): adding 1.5 * 2^23 leaves no bits below one.
SVK_INLINE vf nearest(vf a) { SVK_LANES a.v[i] = (a.v[i] + 12582912.0f) - 12582912.0f; return a; }
// NaN and what does not fit: the smallest int32, as on x86.
SVK_INLINE vi to_int(vf a) {
  vi r;
  vf whole = nearest(a);
  SVK_LANES r.v[i] = fabsf(whole.v[i]) < 4194304.0f ? (int32_t)whole.v[i] : INT32_MIN;
  return r;
}
SVK_INLINE void store_low_bytes(int8_t* p, vi a) { SVK_LANES p[i] = (int8_t)a.v[i]; }
SVK_INLINE float bits_to_float(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
SVK_INLINE uint32_t float_to_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
// From -126 to 128; NaN stays NaN because the second operand is what vmin and vmax answer then.
SVK_INLINE vf as_exponent(vf x) { return vmin(splat(128.0f), vmax(splat(-126.0f), x)); }
// x - floor(x), x cut to [-126, 128].
SVK_INLINE vf fraction(vf x) {
  x = as_exponent(x);
  SVK_LANES x.v[i] -= floorf(x.v[i]);
  return x;
}
// a * 2^floor(x) for a in [1, 2), x cut to [-126, 128]; the exponent is added to.
SVK_INLINE vf times_exp2_floor(vf a, vf x) {
  x = as_exponent(x);
  SVK_LANES x.v[i] = floorf(x.v[i]);
  vi e = to_int(x);
  SVK_LANES a.v[i] = bits_to_float(float_to_bits(a.v[i]) + ((uint32_t)e.v[i] << 23));
  return a;
}

// Round to nearest even; a NaN stays one.
SVK_INLINE uint16_t round_bf16(float x) {
  uint32_t b = float_to_bits(x);
  return (uint16_t)(x != x ? (b >> 16) | 0x40 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
SVK_INLINE float widen_bf16(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
SVK_INLINE vf load_bf16(const uint16_t* p) { vf r; SVK_LANES r.v[i] = widen_bf16(p[i]); return r; }
SVK_INLINE vf load_bf16_n(const uint16_t* p, long n) {
  vf r;
  SVK_LANES r.v[i] = i < n ? widen_bf16(p[i]) : 0.0f;
  return r;
}
SVK_INLINE void store_bf16(uint16_t* p, vf x) { SVK_LANES p[i] = round_bf16(x.v[i]); }
SVK_INLINE void store_bf16_two(uint16_t* p, vf first, vf second) { store_bf16(p, first), store_bf16(p + 16, second); }
SVK_INLINE void store_bf16_n(uint16_t* p, vf x, long n) { SVK_LANES if (i < n) p[i] = round_bf16(x.v[i]); }
SVK_INLINE vi pack_pairs(vf even, vf odd) {
  vi r;
  SVK_LANES r.v[i] = (int32_t)(round_bf16(even.v[i]) | (uint32_t)round_bf16(odd.v[i]) << 16);
  return r;
}

SVK_INLINE PairCols load_pairs(const uint32_t* p) {
  PairCols r;
  SVK_LANES r.even.v[i] = bits_to_float(p[i] << 16), r.odd.v[i] = bits_to_float(p[i] & 0xffff0000u);
  return r;
}
SVK_INLINE PairRow splat_pair(uint32_t x) { return {bits_to_float(x << 16), bits_to_float(x & 0xffff0000u)}; }
SVK_INLINE vf dot_pairs(vf acc, PairCols b, PairRow a) {
  SVK_LANES acc.v[i] += b.even.v[i] * a.even + b.odd.v[i] * a.odd;
  return acc;
}

SVK_INLINE QuadCols as_quads(vi x) {
  QuadCols r;
  for (int j = 0; j < 4; j++) SVK_LANES r.byte[j].v[i] = (int32_t)(((uint32_t)x.v[i] >> (8 * j)) & 0xff);
  return r;
}
SVK_INLINE QuadRow splat_quad(uint32_t x) {
  return {{(int8_t)x, (int8_t)(x >> 8), (int8_t)(x >> 16), (int8_t)(x >> 24)}};
}
SVK_INLINE vi dot_quads(vi acc, QuadCols b, QuadRow a) {
  for (int j = 0; j < 4; j++) SVK_LANES acc.v[i] += b.byte[j].v[i] * a.byte[j];
  return acc;
}

SVK_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
SVK_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p); }
SVK_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }
#if defined(__x86_64__)
SVK_INLINE void pause_core() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
SVK_INLINE void pause_core() { asm volatile("yield"); }
#else
SVK_INLINE void pause_core() {}
#endif

#undef SVK_LANES

}  // namespace SVK_ISA
