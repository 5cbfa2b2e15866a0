// The names of simd_avx512.h on AArch64 with FEAT_BF16 and FEAT_I8MM: a vector of sixteen lanes is four registers.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define SVK_INLINE static inline __attribute__((always_inline))
// One instruction on each of the four registers.
#define SVK_FOUR(f, x) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define SVK_FOUR_OF_TWO(f, x, y) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}

namespace SVK_ISA {

struct vf { float32x4_t a, b, c, d; };
struct vi { int32x4_t a, b, c, d; };
struct PairCols { bfloat16x8_t a, b, c, d; };
using PairRow = bfloat16x4_t;  // in the first two places, from where products take it for all columns
struct QuadCols { uint8x16_t a, b, c, d; };
using QuadRow = int8x8_t;

constexpr int TILE_ROWS = 6;  // 6 x 1 accumulators of four registers + 4 for the columns + 1 for the row: 29 of 32
constexpr int TILE_VECS = 1;

SVK_INLINE vf splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
SVK_INLINE vf zero() { return splat(0.0f); }
SVK_INLINE vf load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
SVK_INLINE void store(float* p, vf x) {
  vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
}
SVK_INLINE vf load_n(const float* p, long n) {
  if (n >= 16) return load(p);
  float full[16] = {0};
  memcpy(full, p, (n < 0 ? 0 : n) * sizeof(float));
  return load(full);
}
SVK_INLINE void store_n(float* p, vf x, long n) {
  if (n >= 16) return store(p, x);
  float full[16];
  store(full, x);
  memcpy(p, full, (n < 0 ? 0 : n) * sizeof(float));
}
// x86's maximum and minimum, the second operand where one is NaN: NEON's own would answer NaN whichever it is.
SVK_INLINE float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
SVK_INLINE float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
SVK_INLINE vf add(vf x, vf y) { return SVK_FOUR_OF_TWO(vaddq_f32, x, y); }
SVK_INLINE vf sub(vf x, vf y) { return SVK_FOUR_OF_TWO(vsubq_f32, x, y); }
SVK_INLINE vf mul(vf x, vf y) { return SVK_FOUR_OF_TWO(vmulq_f32, x, y); }
SVK_INLINE vf div(vf x, vf y) { return SVK_FOUR_OF_TWO(vdivq_f32, x, y); }
SVK_INLINE vf fmadd(vf x, vf y, vf z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
SVK_INLINE vf vmax(vf x, vf y) { return SVK_FOUR_OF_TWO(larger, x, y); }
SVK_INLINE vf vmin(vf x, vf y) { return SVK_FOUR_OF_TWO(smaller, x, y); }
SVK_INLINE vf vabs(vf x) { return SVK_FOUR(vabsq_f32, x); }
// The larger of two sizes (no signs); a NaN is the largest, where vmax forgets it.
SVK_INLINE vf max_size(vf x, vf y) { return SVK_FOUR_OF_TWO(vmaxq_f32, x, y); }
SVK_INLINE float max_size_of_lanes(vf x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d)));
}
SVK_INLINE float sum_lanes(vf x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
SVK_INLINE float max_lanes(vf x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }
SVK_INLINE vf keep_first(vf x, long n, vf other) {
  const int32x4_t lane = {0, 1, 2, 3}, left = vsubq_s32(vdupq_n_s32((int)(n > 16 ? 16 : n)), lane);  // kept: above zero
  return {vbslq_f32(vcgtq_s32(left, vdupq_n_s32(0)), x.a, other.a),
          vbslq_f32(vcgtq_s32(left, vdupq_n_s32(4)), x.b, other.b),
          vbslq_f32(vcgtq_s32(left, vdupq_n_s32(8)), x.c, other.c),
          vbslq_f32(vcgtq_s32(left, vdupq_n_s32(12)), x.d, other.d)};
}

SVK_INLINE vi splat_i(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
SVK_INLINE vi zero_i() { return splat_i(0); }
SVK_INLINE vi load_i(const void* p) {
  const int32_t* lanes = (const int32_t*)p;
  return {vld1q_s32(lanes), vld1q_s32(lanes + 4), vld1q_s32(lanes + 8), vld1q_s32(lanes + 12)};
}
SVK_INLINE void store_i(void* p, vi x) {
  int32_t* lanes = (int32_t*)p;
  vst1q_s32(lanes, x.a), vst1q_s32(lanes + 4, x.b), vst1q_s32(lanes + 8, x.c), vst1q_s32(lanes + 12, x.d);
}
SVK_INLINE vi add_i(vi x, vi y) { return SVK_FOUR_OF_TWO(vaddq_s32, x, y); }
SVK_INLINE vi sub_i(vi x, vi y) { return SVK_FOUR_OF_TWO(vsubq_s32, x, y); }
SVK_INLINE vi and_i(vi x, vi y) { return SVK_FOUR_OF_TWO(vandq_s32, x, y); }
template <int N> SVK_INLINE int32x4_t shift_right_logical(int32x4_t x) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), N));
}
template <int N> SVK_INLINE vi shift_left(vi x) {
  return {vshlq_n_s32(x.a, N), vshlq_n_s32(x.b, N), vshlq_n_s32(x.c, N), vshlq_n_s32(x.d, N)};
}
template <int N> SVK_INLINE vi shift_right(vi x) { return SVK_FOUR(shift_right_logical<N>, x); }
template <int N> SVK_INLINE vi shift_right_signed(vi x) {
  return {vshrq_n_s32(x.a, N), vshrq_n_s32(x.b, N), vshrq_n_s32(x.c, N), vshrq_n_s32(x.d, N)};
}
SVK_INLINE int32_t sum_lanes_i(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
SVK_INLINE vf to_float(vi x) { return SVK_FOUR(vcvtq_f32_s32, x); }
// NaN becomes zero and not the smallest int32; whoever rounds activations spoils their scale then (rows.h).
SVK_INLINE vi to_int(vf x) { return SVK_FOUR(vcvtnq_s32_f32, x); }
SVK_INLINE void store_low_bytes(int8_t* p, vi x) {
  const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(x.a), vreinterpretq_s16_s32(x.b));
  const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(x.c), vreinterpretq_s16_s32(x.d));
  vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
}

// From -126 to 128; NaN stays NaN.
SVK_INLINE float32x4_t as_exponent(float32x4_t x) {
  return vminq_f32(vmaxq_f32(x, vdupq_n_f32(-126.0f)), vdupq_n_f32(128.0f));
}
SVK_INLINE float32x4_t fraction_of(float32x4_t x) {
  x = as_exponent(x);
  return vsubq_f32(x, vrndmq_f32(x));
}
SVK_INLINE float32x4_t add_to_exponent(float32x4_t a, float32x4_t x) {
  const int32x4_t e = vshlq_n_s32(vcvtmq_s32_f32(as_exponent(x)), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), e));
}
// x - floor(x), x cut to [-126, 128].
SVK_INLINE vf fraction(vf x) { return SVK_FOUR(fraction_of, x); }
// a * 2^floor(x) for a in [1, 2), x cut to [-126, 128].
SVK_INLINE vf times_exp2_floor(vf a, vf x) { return SVK_FOUR_OF_TWO(add_to_exponent, a, x); }
SVK_INLINE vf quotient(vf a, vf d) { return div(a, d); }

SVK_INLINE float32x4_t widen_low(uint16x8_t h) { return vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), h)); }
SVK_INLINE float32x4_t widen_high(uint16x8_t h) { return vreinterpretq_f32_u16(vzip2q_u16(vdupq_n_u16(0), h)); }
SVK_INLINE vf load_bf16(const uint16_t* p) {
  const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
  return {widen_low(low), widen_high(low), widen_low(high), widen_high(high)};
}
SVK_INLINE vf load_bf16_n(const uint16_t* p, long n) {
  if (n >= 16) return load_bf16(p);
  uint16_t full[16] = {0};
  memcpy(full, p, (n < 0 ? 0 : n) * 2);
  return load_bf16(full);
}
SVK_INLINE uint16x8_t round_bf16(float32x4_t low, float32x4_t high) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
SVK_INLINE void store_bf16(uint16_t* p, vf x) {
  vst1q_u16(p, round_bf16(x.a, x.b)), vst1q_u16(p + 8, round_bf16(x.c, x.d));
}
SVK_INLINE void store_bf16_two(uint16_t* p, vf first, vf second) { store_bf16(p, first), store_bf16(p + 16, second); }
SVK_INLINE void store_bf16_n(uint16_t* p, vf x, long n) {
  if (n >= 16) return store_bf16(p, x);
  uint16_t full[16];
  store_bf16(full, x);
  memcpy(p, full, (n < 0 ? 0 : n) * 2);
}
SVK_INLINE vi pack_pairs(vf even, vf odd) {
  const uint16x8_t low[] = {round_bf16(even.a, even.b), round_bf16(odd.a, odd.b)};
  const uint16x8_t high[] = {round_bf16(even.c, even.d), round_bf16(odd.c, odd.d)};
  return {vreinterpretq_s32_u16(vzip1q_u16(low[0], low[1])), vreinterpretq_s32_u16(vzip2q_u16(low[0], low[1])),
          vreinterpretq_s32_u16(vzip1q_u16(high[0], high[1])), vreinterpretq_s32_u16(vzip2q_u16(high[0], high[1]))};
}

SVK_INLINE bfloat16x8_t load_four_pairs(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
SVK_INLINE PairCols load_pairs(const uint32_t* p) {
  return {load_four_pairs(p), load_four_pairs(p + 4), load_four_pairs(p + 8), load_four_pairs(p + 12)};
}
SVK_INLINE PairRow splat_pair(uint32_t x) { return vcreate_bf16(x); }
// Sums are rounded to odd, and denormals are zeros.
SVK_INLINE vf dot_pairs(vf acc, PairCols b, PairRow a) {
  return {vbfdotq_lane_f32(acc.a, b.a, a, 0), vbfdotq_lane_f32(acc.b, b.b, a, 0),
          vbfdotq_lane_f32(acc.c, b.c, a, 0), vbfdotq_lane_f32(acc.d, b.d, a, 0)};
}

SVK_INLINE QuadCols as_quads(vi x) { return SVK_FOUR(vreinterpretq_u8_s32, x); }
SVK_INLINE QuadRow splat_quad(uint32_t x) { return vcreate_s8(x); }
SVK_INLINE vi dot_quads(vi acc, QuadCols b, QuadRow a) {
  return {vusdotq_lane_s32(acc.a, b.a, a, 0), vusdotq_lane_s32(acc.b, b.b, a, 0),
          vusdotq_lane_s32(acc.c, b.c, a, 0), vusdotq_lane_s32(acc.d, b.d, a, 0)};
}

SVK_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
SVK_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p); }
SVK_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }
SVK_INLINE void pause_core() { asm volatile("yield"); }

#undef SVK_FOUR
#undef SVK_FOUR_OF_TWO

}  // namespace SVK_ISA
