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

// The softmax of a few rows whose scores are known: they become weights 2^((score - largest) * scale2) in bf16, zero
// for keys that a row does not see. In which order a row's weights are summed depends on what that row sees alone.
struct Softmax {
  const AttentionScratch& s;
  int rows = 0;
  float scale2 = 0.0f;
  long visible[TILE_ROWS];     // keys that each row sees
  long whole = 0, padded = 0;  // keys in blocks of 64: those that all rows see, and all there are
  float shift[TILE_ROWS];
  alignas(64) float sums[TILE_ROWS][2][16];

  explicit Softmax(const AttentionScratch& scratch) : s(scratch) {}

  // In: each row's largest score. Out: that times `scale` and log2 e.
  void start(int count, long keys, const long* seen, float scale, float* largest) {
    rows = count, scale2 = scale * LOG2_E, whole = padded = round_up(keys, PANEL);
    for (int m = 0; m < rows; m++) {
      visible[m] = lmax(0, seen[m]), whole = lmin(whole, visible[m] / PANEL * PANEL);
      shift[m] = visible[m] ? -largest[m] * scale2 : 0.0f;  // -inf - -inf would be NaN
      largest[m] = visible[m] ? largest[m] * scale2 : -1e30f;
      store(sums[m][0], zero()), store(sums[m][1], zero());
    }
  }

  vf weight(int m, long t) const {
    return exp2_of_weight(fmadd(load(s.scores + m * s.stride + t), splat(scale2), splat(shift[m])));
  }

  // Keys t ... t + 15, which row m sees.
  void weigh_visible(int m, long t) {
    const vf a = weight(m, t);
    float* sum = sums[m][t / 16 % 2];
    store(sum, add(load(sum), a));
    store_bf16(s.weights + m * s.stride + t, a);
  }

  // Keys [begin, end), multiples of 64, of all rows: the same sums.
  void weigh(long begin, long end) {
    for (int m = 0; m < rows; m++) {
      u16* to = s.weights + m * s.stride;
      vf sum[2] = {load(sums[m][0]), load(sums[m][1])};
      const long seen = lmax(begin, lmin(visible[m], end) / 32 * 32);
      for (long t = begin; t < seen; t += 32) {
        const vf a = weight(m, t), b = weight(m, t + 16);
        sum[0] = add(sum[0], a), sum[1] = add(sum[1], b);
        store_bf16_two(to + t, a, b);
      }
      for (long t = seen; t < end; t += 16) {
        const vf a = keep_first(weight(m, t), visible[m] - t, zero());
        sum[0] = add(sum[0], a);
        store_bf16(to + t, a);
      }
      store(sums[m][0], sum[0]), store(sums[m][1], sum[1]);
    }
  }

  float sum(int m) const { return sum_lanes(add(load(sums[m][0]), load(sums[m][1]))); }
};

// Products of M rows with a block of 64 keys and, between them, the weights of the rows before for keys t ... t + 63,
// which those all see: all of a softmax but its multiplications is done by other units of the core than products are.
template <int M, int N>
SVK_INLINE void tile_beside(const u16* a, long a_stride, const u32* b, long pairs, vf (&c)[M][N], Softmax& before,
                            long t) {
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) c[m][n] = zero();
  const int pieces = 4 * before.rows;
  int piece = 0;
  long k = 0;
  for (; piece < pieces && k < pairs; piece++, k++) {
    before.weigh_visible(piece / 4, t + piece % 4 * 16);
    step_bf16<M, N>(a, a_stride, b, PANEL, k, c);
  }
  for (; k < pairs; k++) step_bf16<M, N>(a, a_stride, b, PANEL, k, c);
  for (; piece < pieces; piece++) before.weigh_visible(piece / 4, t + piece % 4 * 16);
}

// Scores of M rows with the block of keys t ... t + 63, to rows at `to`, and the largest of each lane so far. Row m
// sees keys before visible[m], all rows see the first `left` of the block; what a row does not see becomes -infinity.
template <int M, bool BESIDE>
SVK_INLINE void score_block(const Head& h, long t, long left, const long* visible, float* to, long stride,
                            float (*top)[16], Softmax* before) {
  const u32* keys = h.keys + t * (h.d / 2);
  for_columns(4, [=](auto n_const, int at) {
    constexpr int N = decltype(n_const)::value;
    vf c[M][N];
    if constexpr (BESIDE) tile_beside<M, N>(h.q, h.q_stride, keys, h.d / 2, c, *before, t);
    else tile_bf16<M, N>(h.q, h.q_stride, keys + at * 16, PANEL, h.d / 2, c);
    if (left < (at + N) * 16) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
          c[m][n] = keep_first(c[m][n], visible[m] - t - (at + n) * 16, splat(-__builtin_inff()));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vf most = load(top[m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        store(to + m * stride + (at + n) * 16, c[m][n]);
        most = vmax(most, c[m][n]);
      }
      store(top[m], most);
    }
  });
}

// Scores of M rows with keys [begin, end), begin a multiple of 64, and each row's largest. They go where those of
// `before` are, whose weights are computed on the way: its rows have the same scratch.
template <int M>
SVK_INLINE void score_rows(const Head& h, long begin, long end, const long* visible, const AttentionScratch& s,
                           float* largest, Softmax* before = nullptr) {
  long all_visible = visible[0];
  for (int m = 1; m < M; m++) all_visible = lmin(all_visible, visible[m]);
  alignas(64) float top[M][16];
  for (int m = 0; m < M; m++) store(top[m], splat(-__builtin_inff()));
  long t = begin;
  if (before) {
    if constexpr (TILE_VECS == 4)
      for (; t < end && t + PANEL <= before->whole; t += PANEL)
        score_block<M, true>(h, t, all_visible - t, visible, s.scores + t, s.stride, top, before);
    before->weigh(t, before->padded);
  }
  for (; t < end; t += PANEL)
    score_block<M, false>(h, t, all_visible - t, visible, s.scores + t - begin, s.stride, top, nullptr);
  for (int m = 0; m < M; m++) largest[m] = max_lanes(load(top[m]));
}

// out[m] = sum of weights * values, not yet divided.
template <int M>
SVK_INLINE void sum_values(const u32* values, long d, long keys, const AttentionScratch& s, float* out,
                           long out_stride) {
  const long d16 = padded_d(d);
  for (long column = 0; column < d16; column += 64) {
    for_columns((int)lmin(4, (d16 - column) / 16), [&](auto n_const, int at) {
      constexpr int N = decltype(n_const)::value;
      vf c[M][N];
      tile_bf16<M, N>(s.weights, s.stride, values + column + at * 16, d16, ceil_div(keys, 2), c);
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out + m * out_stride + column + (at + n) * 16, c[m][n]);
    });
  }
}

// M query rows over keys [begin, end): out[m] = sum of weights * values (not yet divided), with each row's largest
// score (times scale and log2 e) and its sum of weights, so that parts over different keys can be joined.
template <int M>
static void attend(const Head& h, long begin, long end, const long* visible, const AttentionScratch& s, float* out,
                   long out_stride, float* largest, float* sum) {
  Softmax softmax(s);
  long seen[TILE_ROWS];
  for (int m = 0; m < M; m++) seen[m] = visible[m] - begin;
  score_rows<M>(h, begin, end, visible, s, largest);
  softmax.start(M, end - begin, seen, h.scale, largest);
  softmax.weigh(0, softmax.padded);
  for (int m = 0; m < M; m++) sum[m] = softmax.sum(m);
  sum_values<M>(h.values + begin / 2 * padded_d(h.d), h.d, end - begin, s, out, out_stride);
}

// Tiles of query rows one after another, to bf16: the softmax of each is computed beside the scores of the next, so a
// tile's values must stay where they are until then.
struct Attention {
  Softmax softmax;  // of the last tile
  const u32* values = nullptr;
  long d = 0, keys = 0, out_stride = 0;
  u16* out = nullptr;

  explicit Attention(const AttentionScratch& scratch) : softmax(scratch) {}

  // `rows` query rows (at most TILE_ROWS) over keys [0, end), to rows at to + m * to_stride.
  void tile(const Head& h, int rows, long end, const long* visible, u16* to, long to_stride) {
    float largest[TILE_ROWS];
    with_rows<TILE_ROWS>(rows, [&](auto m_const) {
      score_rows<decltype(m_const)::value>(h, 0, end, visible, softmax.s, largest, &softmax);
    });
    put();
    softmax.start(rows, end, visible, h.scale, largest);
    values = h.values, d = h.d, keys = end, out = to, out_stride = to_stride;
  }

  // Once, after the last tile.
  void finish() {
    softmax.weigh(0, softmax.padded);
    put();
  }

 private:
  void put() {
    if (!softmax.rows) return;
    alignas(64) float sums[TILE_ROWS * 256];
    with_rows<TILE_ROWS>(softmax.rows, [&](auto m_const) {
      sum_values<decltype(m_const)::value>(values, d, keys, softmax.s, sums, 256);
    });
    for (int m = 0; m < softmax.rows; m++) {
      const float total = softmax.sum(m);
      vf inverse = splat(total > 0 ? 1.0f / total : total);  // no key: zeros; NaN stays
      for (long i = 0; i < d; i += 16)
        store_bf16_n(out + m * out_stride + i, mul(load(sums + m * 256 + i), inverse), d - i);
    }
  }
};

}  // namespace SVK_ISA
