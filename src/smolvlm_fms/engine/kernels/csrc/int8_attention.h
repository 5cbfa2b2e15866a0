// Attention of an 8-bit tower, in integers but for the softmax.
//
// Queries and keys are rounded to 8 bits with a scale a token, after the keys' mean over all tokens is taken away: that
// moves all scores of a row by the same amount, which a softmax does not see, and leaves finer steps. (So does
// SageAttention, arXiv 2410.02367.) Weights become 0 ... 255 of the largest in their row and block of keys, values
// to 8 bits with a scale a channel and block, after their mean is taken away. The weights' sum is that before rounding:
// many small weights that become zero then pull towards the values' mean, not towards zero.
#pragma once
#include "vision_attention.h"

#ifdef SVK_INT8_ATTENTION
namespace SVK_ISA {

constexpr long KEY_BLOCK = 256;  // keys whose scores are in the first-level cache together

// One head's keys and values. Positions go in panels of 64 as in svk.h, but four channels of a key to a word (q + 128),
// and four positions of a value, in the order of `quad_slot`.
struct QuantizedHead {
  u32 *keys, *values;
  float *key_scale, *value_scale, *value_mean;  // [tokens], [blocks][d16], [d16]
  const u16** rows;                             // the keys that the mask leaves, where they lie
  long d, count;

  long d16() const { return padded_d(d); }
  long quads() const { return ceil_div(d, 4); }
  u32* key_panel(long t) const { return keys + t / PANEL * PANEL * quads(); }
  u32* value_panel(long t) const { return values + t / PANEL * (PANEL / 4) * d16(); }

  static QuantizedHead carve(Carver& from, long tokens, long d) {
    const long padded = round_up(tokens, PANEL), wide = padded_d(d);
    QuantizedHead h;
    h.keys = from.take<u32>(padded * ceil_div(d, 4));
    h.values = from.take<u32>(padded / 4 * wide);
    h.key_scale = from.take<float>(padded);
    h.value_scale = from.take<float>(ceil_div(tokens, KEY_BLOCK) * wide);
    h.value_mean = from.take<float>(wide);
    h.rows = from.take<const u16*>(tokens);
    h.d = d, h.count = 0;
    return h;
  }
};

// Where the four keys 4 q ... 4 q + 3 of a panel are in a row of weights: as pack_bytes leaves them.
SVK_INLINE long quad_slot(long q) { return 4 * (q % 4) + q / 4; }

SVK_INLINE void mean_of_rows(const u16* const* rows, long count, long offset, long d, float* mean) {
  memset((void*)mean, 0, (size_t)padded_d(d) * 4);
  for (long t = 0; t < count; t++) {
    expect_read(rows[lmin(t + 48, count - 1)] + offset, 2 * d);
    for (long c = 0; c < d; c += 16) store(mean + c, add(load(mean + c), load_bf16_n(rows[t] + offset + c, d - c)));
  }
  for (long c = 0; c < d; c += 16) store(mean + c, mul(load(mean + c), splat(1.0f / (float)lmax(1, count))));
}

static void quantize_keys(const QuantizedHead& h) {
  alignas(64) float mean[256], centred[256];
  alignas(64) int8_t q[256];
  int32_t sum;
  mean_of_rows(h.rows, h.count, 0, h.d, mean);
  for (long t = 0; t < h.count; t++) {
    for (long c = 0; c < h.d; c += 16) store(centred + c, sub(load_bf16_n(h.rows[t] + c, h.d - c), load(mean + c)));
    quantize_row8(centred, h.d, q, h.key_scale + t, &sum);
    u32* to = h.key_panel(t) + t % PANEL;
    for (long i = 0; i < h.quads(); i++) to[i * PANEL] = ((const u32_of_bytes*)q)[i] ^ 0x80808080u;
  }
  for (long t = h.count; t < round_up(h.count, PANEL); t++) {
    h.key_scale[t] = 0.0f;
    for (long i = 0; i < h.quads(); i++) (h.key_panel(t) + t % PANEL)[i * PANEL] = 0;
  }
}

// Values of positions [begin, end), one block; `offset` is the distance from a key to its value.
static void quantize_values(const QuantizedHead& h, long begin, long end, long offset) {
  float* scale = h.value_scale + begin / KEY_BLOCK * h.d16();
  for (long c = 0; c < h.d; c += 16) {
    const vf mean = load(h.value_mean + c);
    auto value = [&](long t) { return sub(load_bf16_n(h.rows[t] + offset + c, h.d - c), mean); };
    vf top = splat(1e-30f), poison = zero();
    for (long t = begin; t < end; t++) {
      const vf v = value(t);
      top = vmax(vabs(v), top), poison = fmadd(v, zero(), poison);
    }
    store(scale + c, add(mul(top, splat(1.0f / 127.0f)), poison));
    const vf inverse = div(splat(127.0f), top);
    for (long t = begin; t < round_up(end, PANEL); t += 4) {
      vi word = zero_i();
      auto add_byte = [&](vi shifted, long i) { word = t + i < end ? or_i(word, shifted) : word; };
      auto byte = [&](long i) { return and_i(to_int(mul(value(lmin(t + i, end - 1)), inverse)), splat_i(0xff)); };
      add_byte(byte(0), 0), add_byte(shift_left<8>(byte(1)), 1);
      add_byte(shift_left<16>(byte(2)), 2), add_byte(shift_left<24>(byte(3)), 3);
      store_i(h.value_panel(t) + quad_slot(t % PANEL / 4) * h.d16() + c, word);
    }
  }
}

SVK_INLINE void quantize_head(const svk_vision_attention_args& a, long b, long head, QuantizedHead& to) {
  const long row = 3 * a.heads * a.d, head_row = a.heads * a.d;
  to.count = 0;
  for (long t = 0; t < a.tokens; t++)
    if (!a.key_mask || a.key_mask[b * a.tokens + t])
      to.rows[to.count++] = a.qkv + (b * a.tokens + t) * row + head_row + head * a.d;
  quantize_keys(to);
  mean_of_rows(to.rows, to.count, head_row, a.d, to.value_mean);
  for (long t = 0; t < to.count; t += KEY_BLOCK)
    quantize_values(to, t, lmin(t + KEY_BLOCK, to.count), head_row);
}

// What a tile of query rows keeps while it passes over the keys.
struct Int8Rows {
  alignas(64) int8_t q[TILE_ROWS][256];
  alignas(64) float scores[TILE_ROWS][KEY_BLOCK];  // without the row's factor
  alignas(64) uint8_t weights[TILE_ROWS][KEY_BLOCK];
  alignas(64) float sums[TILE_ROWS][256];          // of weights times values
  // A lane a row: 2^(factor * score) is the weight; the largest exponent and the sum of the weights so far, those of the
  // block at hand; and what the block's and all earlier weights are multiplied by to be on a common scale.
  alignas(64) float factor[16], largest[16], total[16], block_largest[16], block_total[16], keep[16], join[16];
  int32_t start[TILE_ROWS];                        // -128 times the sum of a row's q, for the keys' + 128
};

template <int M> SVK_INLINE void quantize_queries(const u16* first, long stride, long d, float scale, Int8Rows& r) {
  alignas(64) float x[256];
  for (int m = 0; m < 16; m++) r.factor[m] = 0.0f, r.largest[m] = -1e30f, r.total[m] = 0.0f;
  memcpy(r.block_largest, r.largest, sizeof r.largest), memcpy(r.block_total, r.total, sizeof r.total);
  for (int m = 0; m < M; m++) {
    for (long c = 0; c < d; c += 16) store(x + c, load_bf16_n(first + m * stride + c, d - c));
    int32_t sum;
    quantize_row8(x, d, r.q[m], r.factor + m, &sum);
    r.factor[m] *= scale * LOG2_E, r.start[m] = -128 * sum;
  }
}

template <int M> SVK_INLINE void int8_scores(const QuantizedHead& h, long begin, long end, Int8Rows& r) {
  vf top[M];
  for (int m = 0; m < M; m++) top[m] = splat(-1e30f);
  for (long t = begin; t < end; t += PANEL) {
    vi c[M][4];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 4; n++) c[m][n] = splat_i(r.start[m]);
    tile_int8<M, 4>(r.q[0], 256, h.key_panel(t), h.quads(), c);
    for (int n = 0; n < 4; n++) {
      const long key = t + n * 16;
      const vf scale = load(h.key_scale + key);
      for (int m = 0; m < M; m++) {
        const vf x = mul(to_float(c[m][n]), scale);
        store(r.scores[m] + key - begin, x);
        top[m] = vmax(top[m], end - key < 16 ? keep_first(x, end - key, splat(-1e30f)) : x);
      }
    }
  }
  for (int m = 0; m < M; m++) r.block_largest[m] = max_lanes(top[m]) * r.factor[m];
}

// Weights 255 * 2^(factor * score - largest) of row m, and their sum before they are rounded.
SVK_INLINE void int8_softmax(long count, int m, Int8Rows& r) {
  constexpr float log2_255 = 7.99435344f;
  const vf factor = splat(r.factor[m]), shift = splat(log2_255 - r.block_largest[m]);
  vf sum[2] = {zero(), zero()};
  for (long t = 0; t < count; t += PANEL) {
    vf p[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) p[n] = exp2_of_weight(fmadd(load(r.scores[m] + t + n * 16), factor, shift));
    if (t + PANEL > count)
      for (int n = 0; n < 4; n++) p[n] = keep_first(p[n], count - t - n * 16, zero());
    sum[0] = add(sum[0], add(p[0], p[1])), sum[1] = add(sum[1], add(p[2], p[3]));
    store_i(r.weights[m] + t, pack_bytes(to_int(p[0]), to_int(p[1]), to_int(p[2]), to_int(p[3])));
  }
  r.block_total[m] = sum_lanes(add(sum[0], sum[1]));
}

// The common scale of the weights so far and of a new block: that of the larger of their largest.
SVK_INLINE void join_block(Int8Rows& r) {
  const vf before = load(r.largest), block = load(r.block_largest), now = vmax(before, block);
  const vf keep = exp2_of(sub(before, now)), join = exp2_of(sub(block, now));
  store(r.largest, now), store(r.keep, keep), store(r.join, join);
  store(r.total, fmadd(load(r.total), keep, mul(load(r.block_total), join)));
}

template <int M> SVK_INLINE void int8_values(const QuantizedHead& h, long begin, long end, Int8Rows& r) {
  const long d16 = h.d16();
  const float* scale = h.value_scale + begin / KEY_BLOCK * d16;
  for (long column = 0; column < d16; column += 64) {
    for_columns((int)lmin(4, (d16 - column) / 16), [&](auto n_const, int at) {
      constexpr int N = decltype(n_const)::value;
      vi c[M][N];
      tile_weights<M, N>(r.weights[0], KEY_BLOCK, h.value_panel(begin) + column + at * 16, d16,
                         round_up(end - begin, PANEL) / 4, c);
      for (int n = 0; n < N; n++) {
        const long i = column + (at + n) * 16;
        const vf scales = load(scale + i);
        for (int m = 0; m < M; m++) {
          const vf part = mul(to_float(c[m][n]), mul(scales, splat(r.join[m])));
          store(r.sums[m] + i, begin ? fmadd(load(r.sums[m] + i), splat(r.keep[m]), part) : part);
        }
      }
    });
  }
}

template <int M> static void int8_tile(const QuantizedHead& h, const u16* queries, long stride, float scale, u16* out,
                                       long out_stride) {
  Int8Rows r;
  quantize_queries<M>(queries, stride, h.d, scale, r);
  for (long begin = 0; begin < h.count; begin += KEY_BLOCK) {
    const long end = lmin(begin + KEY_BLOCK, h.count);
    int8_scores<M>(h, begin, end, r);
    for (int m = 0; m < M; m++) int8_softmax(end - begin, m, r);
    join_block(r);
    int8_values<M>(h, begin, end, r);
  }
  for (int m = 0; m < M; m++) {
    const vf inverse = splat(1.0f / r.total[m]);
    for (long c = 0; c < h.d; c += 16) {
      const vf x = h.count ? fmadd(load(r.sums[m] + c), inverse, load(h.value_mean + c)) : zero();
      store_bf16_n(out + m * out_stride + c, x, h.d - c);
    }
  }
}

// As vision_rows, on the quantised head.
SVK_INLINE void int8_vision_rows(const svk_vision_attention_args& a, long b, long head, Range rows,
                                 const QuantizedHead& h, long out_row) {
  const long row = 3 * a.heads * a.d;
  for (long t = rows.begin; t < rows.end; t += TILE_ROWS) {
    const u16* queries = a.qkv + (b * a.tokens + t) * row + head * a.d;
    u16* out = a.out + (b * a.tokens + t) * out_row + head * a.d;
    expect_tile(queries, row, out, out_row, t, rows.end, a.d);
    with_rows<TILE_ROWS>((int)lmin(TILE_ROWS, rows.end - t), [&](auto m_const) {
      int8_tile<decltype(m_const)::value>(h, queries, row, a.scale, out, out_row);
    });
  }
}

}  // namespace SVK_ISA
#endif
