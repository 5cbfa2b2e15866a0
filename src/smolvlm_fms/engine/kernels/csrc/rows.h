// Activations as the integer linears want them, and the norms that come before.
#pragma once
#include "common.h"

namespace SVK_ISA {

// Rows of activations in the form one kind of weights multiplies; the members other kinds use stay null.
struct Rows {
  const u16* bf16 = nullptr;  // [rows][stride]
  int8_t* q = nullptr;        // [rows][stride]: 8-bit values, or the upper bytes of 16-bit ones
  int8_t* q_low = nullptr;    // [rows][stride]: the lower bytes of 16-bit values, signed
  float* scale = nullptr;     // [rows][scales]: one a row, or one for 32 inputs
  int32_t* sum = nullptr;     // [rows][scales]: sums of the quantised values, against the weights' + 128 or + 8
  long stride = 0, scales = 0;

  static Rows carve(Carver& from, int64_t kind, long rows, long k) {
    Rows r;
    r.stride = round_up(k, 64);
    if (kind == SVK_BF16) {
      r.bf16 = from.take<u16>(rows * r.stride);
      return r;
    }
    r.scales = kind == SVK_INT8_CHANNEL ? 1 : ceil_div(k, GROUP);
    r.q = from.take<int8_t>(rows * r.stride);
    if (kind != SVK_INT8_CHANNEL) r.q_low = from.take<int8_t>(rows * r.stride);
    r.scale = from.take<float>(rows * r.scales);
    r.sum = from.take<int32_t>(rows * r.scales);
    return r;
  }

  // Room for every kind that a text model uses, one at a time: bf16 or groups.
  static Rows carve_any(Carver& from, long rows, long k) {
    Rows r = carve(from, SVK_INT8_GROUPS, rows, k);
    r.bf16 = from.take<u16>(rows * r.stride);
    return r;
  }
};

// A NaN or an infinity becomes the scale, and with it spoils what the values are multiplied by.

// One row of k values to signed 8 bits with one scale. at(i) are sixteen of them, zeros beyond k.
template <class At> SVK_INLINE void quantize_row8(At&& at, long k, int8_t* q, float* scale, int32_t* sum) {
  vf top[4] = {zero(), zero(), zero(), zero()};
  in_turns(k, [&](int j, long i) { top[j] = max_size(top[j], vabs(at(i))); });
  const float largest = max_size_of_lanes(max_size(max_size(top[0], top[1]), max_size(top[2], top[3])));
  const vf inverse = splat(largest > 1e-30f ? 127.0f / largest : 0.0f);
  vi total = zero_i();
  for (long i = 0; i < k; i += 16) {
    vi v = to_int(mul(at(i), inverse));
    total = add_i(total, v);
    store_low_bytes(q + i, v);
  }
  *scale = largest / 127.0f, *sum = sum_lanes_i(total);
}

// One row to 16 bits with a scale for every 32 inputs, kept as two planes of bytes: v = 256 q + q_low. Twice the
// products of 8-bit activations, which a decode step hides behind its memory traffic, for an error (2^-16 of the
// group's largest) below that of bf16. x holds zeros up to a multiple of 32.
SVK_INLINE void quantize_row16(const float* x, long k, int8_t* q, int8_t* q_low, float* scale, int32_t* sum) {
  constexpr float top_value = 32512.0f;  // 127 * 256: the upper byte stays within its range after rounding
  for (long g = 0; g * GROUP < k; g++) {
    vf a = load(x + g * GROUP), b = load(x + g * GROUP + 16);
    float largest = max_size_of_lanes(max_size(vabs(a), vabs(b)));
    vf inverse = splat(largest > 1e-30f ? top_value / largest : 0.0f);
    vi ia = to_int(mul(a, inverse)), ib = to_int(mul(b, inverse));
    vi half = splat_i(128);
    vi high_a = shift_right_signed<8>(add_i(ia, half)), high_b = shift_right_signed<8>(add_i(ib, half));
    store_low_bytes(q + g * GROUP, high_a), store_low_bytes(q + g * GROUP + 16, high_b);
    store_low_bytes(q_low + g * GROUP, sub_i(ia, shift_left<8>(high_a)));
    store_low_bytes(q_low + g * GROUP + 16, sub_i(ib, shift_left<8>(high_b)));
    scale[g] = largest / top_value, sum[g] = sum_lanes_i(add_i(ia, ib));
  }
}

// One row of floats (zeros up to a multiple of 32) into row m of `rows`.
SVK_INLINE void prepare_row(const float* x, long k, int64_t kind, const Rows& rows, long m) {
  if (kind == SVK_BF16 || kind == SVK_BF16_COMPACT) {
    for (long i = 0; i < k; i += 16) store_bf16((u16*)rows.bf16 + m * rows.stride + i, load(x + i));
  } else if (kind == SVK_INT8_CHANNEL) {
    quantize_row8([=](long i) { return load(x + i); }, k, rows.q + m * rows.stride, rows.scale + m, rows.sum + m);
  } else {
    long at = m * rows.scales;
    quantize_row16(x, k, rows.q + m * rows.stride, rows.q_low + m * rows.stride, rows.scale + at, rows.sum + at);
  }
}

// k bf16 values to floats, zeros up to a multiple of 32.
SVK_INLINE void widen_row(const u16* x, long k, float* out) {
  for (long i = 0; i < round_up(k, 32); i += 16) store(out + i, load_bf16_n(x + i, k - i));
}

}  // namespace SVK_ISA
