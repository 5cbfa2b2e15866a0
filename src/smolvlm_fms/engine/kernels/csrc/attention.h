// Softmax attention of a few query rows over packed keys and values; vision, prefill and decode are built on it.
#pragma once
#include "tile.h"

namespace SVK_ISA {

// Sizes of the packed keys and values of one head (svk.h has the layout), in 32-bit words.
SVK_INLINE long padded_d(long d) { return round_up(d, 16); }
SVK_INLINE long key_words(long tokens, long d) { return round_up(tokens, PANEL) * (d / 2); }
SVK_INLINE long value_words(long tokens, long d) { return round_up(tokens, PANEL) / 2 * padded_d(d); }

// Position t of the packed keys := the d values at `key`.
SVK_INLINE void pack_key(const u16* key, long d, u32* keys, long t) {
  u32* to = keys + t / PANEL * PANEL * (d / 2) + t % PANEL;
  const u32_of_row* pairs = (const u32_of_row*)key;
  for (long i = 0; i < d / 2; i++) to[i * PANEL] = pairs[i];
}

// Position t of the packed values := the d values at `value`. An even position clears its odd neighbour, which is not
// written yet: a weight of zero would still turn a NaN left there into NaN.
SVK_INLINE void pack_value(const u16* value, long d, u32* values, long t) {
  u32* to = values + t / 2 * padded_d(d);
  if (t % 2 == 0)
    for (long i = 0; i < d; i++) to[i] = value[i];
  else
    for (long i = 0; i < d; i++) to[i] = (to[i] & 0xffff) | (u32)value[i] << 16;
}

// Memory for the scores and weights of TILE_ROWS rows over `tokens` keys.
struct AttentionScratch {
  float* scores;  // [TILE_ROWS][stride]
  u16* weights;   // [TILE_ROWS][stride], bf16
  long stride;
  static AttentionScratch carve(Carver& from, long tokens) {
    long stride = round_up(tokens, PANEL);
    float* scores = from.take<float>(TILE_ROWS * stride);
    return {scores, from.take<u16>(TILE_ROWS * stride), stride};
  }
};

// One head's queries and packed keys and values.
struct Head {
  const u16* q;  // row m at q + m * q_stride
  long q_stride;
  const u32 *keys, *values;
  long d;
  float scale;
};

// Scores of M rows with keys [begin, end), begin a multiple of 64; row m sees keys before visible[m]. The rest, up to
// the next multiple of 64, becomes -infinity. Returns each row's largest score.
template <int M>
SVK_INLINE void score_rows(const Head& h, long begin, long end, const long* visible, const AttentionScratch& s,
                           float* largest) {
  long all_visible = visible[0];
  for (int m = 1; m < M; m++) all_visible = lmin(all_visible, visible[m]);
  vf top[M];
  for (int m = 0; m < M; m++) top[m] = splat(-__builtin_inff());
  for (long t = begin; t < end; t += PANEL) {
    const u32* keys = h.keys + t * (h.d / 2);
    for_columns(4, [&](auto n_const, int at) {
      constexpr int N = decltype(n_const)::value;
      vf c[M][N];
      tile_bf16<M, N>(h.q, h.q_stride, keys + at * 16, PANEL, h.d / 2, c);
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
          long key = t + (at + n) * 16;
          if (key + 16 > all_visible) c[m][n] = keep_first(c[m][n], visible[m] - key, splat(-__builtin_inff()));
          store(s.scores + m * s.stride + key - begin, c[m][n]);
          top[m] = vmax(top[m], c[m][n]);
        }
    });
  }
  for (int m = 0; m < M; m++) largest[m] = max_lanes(top[m]);
}

// weights = 2^(scores * scale2 - largest * scale2) in bf16, zero for keys that the row does not see. Returns their sum.
SVK_INLINE float softmax_row(const float* scores, u16* weights, long count, long visible, float largest, float scale2) {
  vf scale = splat(scale2), shift = splat(-largest * scale2), sum0 = zero(), sum1 = zero();
  long whole = lmax(0, lmin(visible, count)) / 32 * 32;
  for (long t = 0; t < whole; t += 32) {
    vf a = exp2_of_weight(fmadd(load(scores + t), scale, shift));
    vf b = exp2_of_weight(fmadd(load(scores + t + 16), scale, shift));
    sum0 = add(sum0, a), sum1 = add(sum1, b);
    store_bf16_two(weights + t, a, b);
  }
  for (long t = whole; t < count; t += 16) {
    vf a = keep_first(exp2_of_weight(fmadd(load(scores + t), scale, shift)), visible - t, zero());
    sum0 = add(sum0, a);
    store_bf16(weights + t, a);
  }
  return sum_lanes(add(sum0, sum1));
}

// M query rows over keys [begin, end): out[m] = sum of weights * values (not yet divided), with each row's largest
// score (times scale and log2 e) and its sum of weights, so that parts over different keys can be joined.
template <int M>
static void attend(const Head& h, long begin, long end, const long* visible, const AttentionScratch& s, float* out,
                   long out_stride, float* largest, float* sum) {
  const float scale2 = h.scale * LOG2_E;
  const long padded = round_up(end - begin, PANEL), pairs = ceil_div(end - begin, 2);
  score_rows<M>(h, begin, end, visible, s, largest);
  for (int m = 0; m < M; m++) {
    u16* weights = s.weights + m * s.stride;
    const bool none = visible[m] <= begin;  // -inf - -inf would be NaN
    const long seen = none ? 0 : visible[m] - begin;
    sum[m] = softmax_row(s.scores + m * s.stride, weights, padded, seen, none ? 0.0f : largest[m], scale2);
    largest[m] = none ? -1e30f : largest[m] * scale2;
  }
  const long d16 = padded_d(h.d);
  const u32* values = h.values + begin / 2 * d16;
  for (long column = 0; column < d16; column += 64) {
    for_columns((int)lmin(4, (d16 - column) / 16), [&](auto n_const, int at) {
      constexpr int N = decltype(n_const)::value;
      vf c[M][N];
      tile_bf16<M, N>(s.weights, s.stride, values + column + at * 16, d16, pairs, c);
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out + m * out_stride + column + (at + n) * 16, c[m][n]);
    });
  }
}

// `rows` query rows (at most TILE_ROWS), normalised, to bf16 rows at out + m * out_stride.
SVK_INLINE void attend_to_bf16(const Head& h, int rows, long end, const long* visible, const AttentionScratch& s,
                               u16* out, long out_stride) {
  alignas(64) float sums[TILE_ROWS * 256];
  float largest[TILE_ROWS], total[TILE_ROWS];
  with_rows<TILE_ROWS>(rows, [&](auto m_const) {
    attend<decltype(m_const)::value>(h, 0, end, visible, s, sums, 256, largest, total);
  });
  for (int m = 0; m < rows; m++) {
    vf inverse = splat(total[m] > 0 ? 1.0f / total[m] : total[m]);  // no key: zeros; NaN stays
    for (long i = 0; i < h.d; i += 16)
      store_bf16_n(out + m * out_stride + i, mul(load(sums + m * 256 + i), inverse), h.d - i);
  }
}

}  // namespace SVK_ISA
