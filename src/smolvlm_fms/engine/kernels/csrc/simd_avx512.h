// Sixteen-lane vectors on AVX-512 (F, BW, VL, DQ, BF16, VNNI). The other simd_*.h files offer the same names, so that
// every kernel is written once and compiled once for each instruction set.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define SVK_INLINE static inline __attribute__((always_inline))

namespace SVK_ISA {

using vf = __m512;        // 16 fp32
using vi = __m512i;       // 16 int32
using PairCols = __m512i;  // 16 columns x 2 consecutive k, bf16
using PairRow = __m512i;   // one row's 2 consecutive k, bf16, in every lane
using QuadCols = __m512i;  // 16 columns x 4 consecutive k, unsigned 8-bit
using QuadRow = __m512i;   // one row's 4 consecutive k, signed 8-bit, in every lane

constexpr int TILE_ROWS = 6;  // 6 x 4 accumulators + 4 columns + 1 row: 29 of 32 registers
constexpr int TILE_VECS = 4;
#define SVK_WIDE_TILES  // a tile is as wide as a panel: see linear.h

SVK_INLINE __mmask16 first_lanes(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// AddressSanitizer does not see masked loads and stores, so its builds touch both ends of what they cover.
SVK_INLINE void touch(const void* p, long bytes) {
#ifdef __SANITIZE_ADDRESS__
  if (bytes > 0) (void)*(volatile const char*)p, (void)((volatile const char*)p)[bytes - 1];
#else
  (void)p, (void)bytes;
#endif
}

SVK_INLINE vf zero() { return _mm512_setzero_ps(); }
SVK_INLINE vf splat(float x) { return _mm512_set1_ps(x); }
SVK_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
SVK_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
SVK_INLINE vf load_n(const float* p, long n) {
  if (n >= 16) return load(p);
  touch(p, 4 * (n < 16 ? n : 16));
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
SVK_INLINE void store_n(float* p, vf x, long n) {
  touch(p, 4 * (n < 16 ? n : 16));
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
SVK_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
SVK_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
SVK_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
SVK_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
SVK_INLINE vf fmadd(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
SVK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
SVK_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
SVK_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
// The larger of two sizes (no signs), by their bits: a NaN is the largest, where vmax forgets it.
SVK_INLINE vf max_size(vf a, vf b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
SVK_INLINE float max_size_of_lanes(vf a) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a)))));
}
SVK_INLINE float sum_lanes(vf a) { return _mm512_reduce_add_ps(a); }
SVK_INLINE float max_lanes(vf a) { return _mm512_reduce_max_ps(a); }
SVK_INLINE vf keep_first(vf a, long n, vf other) { return _mm512_mask_mov_ps(other, first_lanes(n), a); }

SVK_INLINE vi zero_i() { return _mm512_setzero_si512(); }
SVK_INLINE vi splat_i(int32_t x) { return _mm512_set1_epi32(x); }
SVK_INLINE vi load_i(const void* p) { return _mm512_loadu_si512(p); }
SVK_INLINE void store_i(void* p, vi x) { _mm512_storeu_si512(p, x); }
SVK_INLINE vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
SVK_INLINE vi sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }
SVK_INLINE vi or_i(vi a, vi b) { return _mm512_or_si512(a, b); }
SVK_INLINE vi and_i(vi a, vi b) { return _mm512_and_si512(a, b); }
template <int N> SVK_INLINE vi shift_left(vi a) { return _mm512_slli_epi32(a, N); }
template <int N> SVK_INLINE vi shift_right(vi a) { return _mm512_srli_epi32(a, N); }
template <int N> SVK_INLINE vi shift_right_signed(vi a) { return _mm512_srai_epi32(a, N); }
SVK_INLINE int32_t sum_lanes_i(vi a) { return _mm512_reduce_add_epi32(a); }
SVK_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
SVK_INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }  // nearest, ties to even
SVK_INLINE void store_low_bytes(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

// x - floor(x); of infinity: 0.
SVK_INLINE vf fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// a * 2^floor(x), from zero to infinity.
SVK_INLINE vf times_exp2_floor(vf a, vf x) { return _mm512_scalef_ps(a, x); }
// a / d for d in [1, 2^126], to 2^-22: a division holds the multipliers up for ten times as long.
SVK_INLINE vf quotient(vf a, vf d) {
  vf r = _mm512_rcp14_ps(d);
  return mul(a, fmadd(r, _mm512_fnmadd_ps(d, r, splat(1.0f)), r));
}

SVK_INLINE vf widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
SVK_INLINE vf load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
SVK_INLINE vf load_bf16_n(const uint16_t* p, long n) {
  if (n >= 16) return load_bf16(p);
  touch(p, 2 * (n < 16 ? n : 16));
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
SVK_INLINE void store_bf16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
SVK_INLINE void store_bf16_two(uint16_t* p, vf first, vf second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
SVK_INLINE void store_bf16_n(uint16_t* p, vf x, long n) {
  if (n >= 16) return store_bf16(p, x);
  touch(p, 2 * (n < 16 ? n : 16));
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)_mm512_cvtneps_pbh(x));
}
// Lane i becomes bf16(even[i]) | bf16(odd[i]) << 16.
SVK_INLINE vi pack_pairs(vf even, vf odd) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

SVK_INLINE PairCols load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
SVK_INLINE PairRow splat_pair(uint32_t x) { return _mm512_set1_epi32((int)x); }
SVK_INLINE vf dot_pairs(vf acc, PairCols b, PairRow a) { return _mm512_dpbf16_ps(acc, (__m512bh)b, (__m512bh)a); }

#define SVK_COMPACT_VECTORS  // see compact.h
struct CompactTable { __m512i exponents; };  // of each code, in its place, twice: five bits of a lane choose
SVK_INLINE CompactTable compact_table(int base) {
  alignas(64) uint16_t t[32];
  for (int i = 0; i < 32; i++) t[i] = (uint16_t)(i & 15 ? (base + (i & 15)) << 7 : 0);
  return {_mm512_load_si512(t)};
}
SVK_INLINE __m512i swapped_bytes(__m512i x) {
  return _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)));
}
// Vectors [FIRST, FIRST + COUNT) of a compact row; both even.
template <int FIRST, int COUNT>
SVK_INLINE void load_compact(const char* row, const CompactTable& table, PairCols (&cols)[COUNT]) {
  const __m512i kept = _mm512_set1_epi16((short)0x807f), codes = _mm512_loadu_si512(row + 128);
  auto joined = [&](__m512i lanes, __m512i code) {  // bits of `kept` from the lanes, the others from the table
    return _mm512_ternarylogic_epi32(kept, lanes, _mm512_permutexvar_epi16(code, table.exponents), 0xca);
  };
#pragma GCC unroll 2
  for (int n = 0; n < COUNT; n += 2) {
    const __m512i lanes = _mm512_loadu_si512(row + (FIRST + n) / 2 * 64);
    cols[n] = joined(lanes, FIRST + n ? _mm512_srli_epi16(codes, 4 * (FIRST + n)) : codes);
    cols[n + 1] = joined(swapped_bytes(lanes), _mm512_srli_epi16(codes, 4 * (FIRST + n + 1)));
  }
}
// 64 words into a compact row. Words with an exponent outside the codes become zeros: their bits are set in the answer.
SVK_INLINE uint64_t store_compact(const uint32_t* words, int base, void* row) {
  const __m512i kept = _mm512_set1_epi16((short)0x807f), exponent_bits = _mm512_set1_epi16(0xff);
  __m512i codes = _mm512_setzero_si512(), pair = codes;
  uint64_t outside = 0;
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512i x = _mm512_loadu_si512(words + v * 16);
    const __m512i exponent = _mm512_and_si512(_mm512_srli_epi16(x, 7), exponent_bits);
    const __mmask32 any = _mm512_test_epi16_mask(exponent, exponent);
    const __m512i code = _mm512_maskz_sub_epi16(any, exponent, _mm512_set1_epi16((short)base));
    const __mmask32 within = ~any | (_mm512_cmpgt_epi16_mask(code, _mm512_setzero_si512()) &
                                     _mm512_cmplt_epi16_mask(code, _mm512_set1_epi16(16)));
    // A word is two lanes: it is outside as a whole.
    const __mmask16 out_words = _mm512_cmpneq_epi32_mask(_mm512_movm_epi16(within), _mm512_set1_epi32(-1));
    const __m512i good = _mm512_movm_epi32((__mmask16)~out_words);
    const __m512i bits = _mm512_and_si512(_mm512_and_si512(x, kept), good);
    outside |= (uint64_t)out_words << (16 * v);
    codes = _mm512_or_si512(codes, _mm512_sll_epi16(_mm512_and_si512(code, good), _mm_cvtsi32_si128(4 * v)));
    pair = v & 1 ? _mm512_or_si512(pair, swapped_bytes(bits)) : bits;
    if (v & 1) _mm512_storeu_si512((char*)row + v / 2 * 64, pair);
  }
  _mm512_storeu_si512((char*)row + 128, codes);
  return outside;
}

SVK_INLINE QuadCols as_quads(vi x) { return x; }
SVK_INLINE QuadRow splat_quad(uint32_t x) { return _mm512_set1_epi32((int)x); }
// Inline assembly: GCC 12 copies the accumulator around the intrinsic, which halves the speed.
SVK_INLINE vi dot_quads(vi acc, QuadCols b, QuadRow a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
  return acc;
}

#define SVK_INT8_ATTENTION  // the columns of dot_quads may be rows
SVK_INLINE void store_unsigned_bytes(uint8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(a)); }

SVK_INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
SVK_INLINE void prefetch_near(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
SVK_INLINE void prefetch_to_write(const void* p) { asm volatile("prefetchw %0" ::"m"(*(const char*)p)); }
SVK_INLINE void pause_core() { _mm_pause(); }

}  // namespace SVK_ISA
