// The names of simd_avx512.h on AVX2 + FMA: a vector of sixteen lanes is two registers.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define SVK_INLINE static inline __attribute__((always_inline))

namespace SVK_ISA {

struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
struct PairCols { vf even, odd; };            // bf16 pairs widened once, used for every row of the tile
struct PairRow { __m256 even, odd; };
struct QuadCols { vi even, odd; };            // 16-bit lanes: bytes 0, 2 and bytes 1, 3 of each quad
struct QuadRow { __m256i even, odd; };

constexpr int TILE_ROWS = 4;  // 4 x 1 accumulators of two registers + 4 for the columns + 2 for the row: 14 of 16
constexpr int TILE_VECS = 1;

SVK_INLINE vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SVK_INLINE vf splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SVK_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SVK_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
SVK_INLINE vf load_n(const float* p, long n) {
  float full[16] = {0};
  memcpy(full, p, (n > 16 ? 16 : n < 0 ? 0 : n) * sizeof(float));
  return load(full);
}
SVK_INLINE void store_n(float* p, vf x, long n) {
  float full[16];
  store(full, x);
  memcpy(p, full, (n > 16 ? 16 : n < 0 ? 0 : n) * sizeof(float));
}
SVK_INLINE vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
SVK_INLINE vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
SVK_INLINE vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
SVK_INLINE vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
SVK_INLINE vf fmadd(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
SVK_INLINE vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SVK_INLINE vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
SVK_INLINE vf vabs(vf x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
// The larger of two sizes (no signs), by their bits: a NaN is the largest, where vmax forgets it.
SVK_INLINE __m256 max_size(__m256 x, __m256 y) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
SVK_INLINE vf max_size(vf x, vf y) { return {max_size(x.a, y.a), max_size(x.b, y.b)}; }
SVK_INLINE float max_size_of_lanes(vf x) {
  __m256i s = _mm256_castps_si256(max_size(x.a, x.b));
  __m128i h = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1))));
}
SVK_INLINE float sum_lanes(vf x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
SVK_INLINE float max_lanes(vf x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
SVK_INLINE vf keep_first(vf x, long n, vf other) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32((int)(n > 16 ? 16 : n));
  __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lane));
  __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8))));
  return {_mm256_blendv_ps(other.a, x.a, low), _mm256_blendv_ps(other.b, x.b, high)};
}

SVK_INLINE vi zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
SVK_INLINE vi splat_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
SVK_INLINE vi load_i(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SVK_INLINE void store_i(void* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
SVK_INLINE vi add_i(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
SVK_INLINE vi sub_i(vi x, vi y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
SVK_INLINE vi and_i(vi x, vi y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N> SVK_INLINE vi shift_left(vi x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> SVK_INLINE vi shift_right(vi x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> SVK_INLINE vi shift_right_signed(vi x) {
  return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
SVK_INLINE int32_t sum_lanes_i(vi x) {
  int32_t lanes[16], total = 0;
  store_i(lanes, x);
  for (int i = 0; i < 16; i++) total += lanes[i];
  return total;
}
SVK_INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SVK_INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
SVK_INLINE void store_low_bytes(int8_t* p, vi x) {
  int32_t lanes[16];
  store_i(lanes, x);
  for (int i = 0; i < 16; i++) p[i] = (int8_t)lanes[i];
}

SVK_INLINE vf whole_part(vf x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
// From -126 to 128; NaN stays NaN because the second operand is what vmin and vmax answer then.
SVK_INLINE vf as_exponent(vf x) { return vmin(splat(128.0f), vmax(splat(-126.0f), x)); }
// x - floor(x), x cut to [-126, 128].
SVK_INLINE vf fraction(vf x) {
  x = as_exponent(x);
  return sub(x, whole_part(x));
}
// a * 2^floor(x) for a in [1, 2), x cut to [-126, 128]; the exponent is added to.
SVK_INLINE vf times_exp2_floor(vf a, vf x) {
  vi e = shift_left<23>(to_int(whole_part(as_exponent(x))));
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.a), e.a)),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.b), e.b))};
}
SVK_INLINE vf quotient(vf a, vf d) { return div(a, d); }

SVK_INLINE __m256 widen_half(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
SVK_INLINE vf load_bf16(const uint16_t* p) {
  return {widen_half(_mm_loadu_si128((const __m128i*)p)), widen_half(_mm_loadu_si128((const __m128i*)p + 1))};
}
SVK_INLINE vf load_bf16_n(const uint16_t* p, long n) {
  uint16_t full[16] = {0};
  memcpy(full, p, (n > 16 ? 16 : n < 0 ? 0 : n) * 2);
  return load_bf16(full);
}
// Round to nearest even in the upper half of each lane; a NaN stays one.
SVK_INLINE __m256i round_upper_half(__m256 x) {
  __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
SVK_INLINE void store_bf16(uint16_t* p, vf x) {
  __m256i low = _mm256_srli_epi32(round_upper_half(x.a), 16), high = _mm256_srli_epi32(round_upper_half(x.b), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}
SVK_INLINE void store_bf16_two(uint16_t* p, vf first, vf second) { store_bf16(p, first), store_bf16(p + 16, second); }
SVK_INLINE void store_bf16_n(uint16_t* p, vf x, long n) {
  uint16_t full[16];
  store_bf16(full, x);
  memcpy(p, full, (n > 16 ? 16 : n < 0 ? 0 : n) * 2);
}
SVK_INLINE __m256i pack_pairs_half(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_upper_half(even), 16), round_upper_half(odd), 0xaa);
}
SVK_INLINE vi pack_pairs(vf even, vf odd) { return {pack_pairs_half(even.a, odd.a), pack_pairs_half(even.b, odd.b)}; }

SVK_INLINE vf upper_halves(vi x) {
  __m256i mask = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
}
SVK_INLINE PairCols load_pairs(const uint32_t* p) {
  vi raw = load_i(p), low = shift_left<16>(raw);
  return {{_mm256_castsi256_ps(low.a), _mm256_castsi256_ps(low.b)}, upper_halves(raw)};
}
SVK_INLINE PairRow splat_pair(uint32_t x) {
  __m256i raw = _mm256_set1_epi32((int)x);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32((int)0xffff0000)))};
}
SVK_INLINE vf dot_pairs(vf acc, PairCols b, PairRow a) {
  acc.a = _mm256_fmadd_ps(b.even.a, a.even, acc.a), acc.b = _mm256_fmadd_ps(b.even.b, a.even, acc.b);
  return {_mm256_fmadd_ps(b.odd.a, a.odd, acc.a), _mm256_fmadd_ps(b.odd.b, a.odd, acc.b)};
}

// vpmaddubsw would saturate at 255 * 127 * 2, so the bytes are widened to 16 bits and multiplied exactly.
SVK_INLINE QuadCols as_quads(vi x) {
  __m256i low = _mm256_set1_epi16(0xff);
  return {{_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)},
          {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)}};
}
SVK_INLINE QuadRow splat_quad(uint32_t x) {
  __m256i raw = _mm256_set1_epi32((int)x);
  return {_mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8), _mm256_srai_epi16(raw, 8)};
}
SVK_INLINE vi dot_quads(vi acc, QuadCols b, QuadRow a) {
  __m256i low = _mm256_add_epi32(_mm256_madd_epi16(b.even.a, a.even), _mm256_madd_epi16(b.odd.a, a.odd));
  __m256i high = _mm256_add_epi32(_mm256_madd_epi16(b.even.b, a.even), _mm256_madd_epi16(b.odd.b, a.odd));
  return {_mm256_add_epi32(acc.a, low), _mm256_add_epi32(acc.b, high)};
}

SVK_INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
SVK_INLINE void prefetch_near(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
SVK_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }
SVK_INLINE void pause_core() { _mm_pause(); }

}  // namespace SVK_ISA
