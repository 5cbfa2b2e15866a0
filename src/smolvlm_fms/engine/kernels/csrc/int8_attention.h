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

constexpr long KEY_BLOCK = 512;  // keys whose scores are in the first-level cache together

// One head's keys and values. Positions go in panels of 64 as in svk.h, but four channels of a key to a word (q + 128),
// and four positions of a value.
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

SVK_INLINE void mean_of_rows(const u16* const* rows, long count, long offset, long d, float* mean) {
  memset((void*)mean, 0, (size_t)padded_d(d) * 4);
  for (long t = 0; t < count; t++) {
    expect_read(rows[lmin(t + 48, count - 1)] + offset, 2 * d);
    for (long c = 0; c < d; c += 16) store(mean + c, add(load(mean + c), load_bf16_n(rows[t] + offset + c, d - c)));
  }
  for (long c = 0; c < d; c += 16) store(mean + c, mul(load(mean + c), splat(1.0f / (float)lmax(1, count))));
}

static void quantize_keys(const QuantizedHead& h) {
  alignas(64) float mean[256];
  alignas(64) int8_t q[256];
  int32_t sum;
  mean_of_rows(h.rows, h.count, 0, h.d, mean);
  for (long t = 0; t < h.count; t++) {
    const u16* key = h.rows[t];
    auto centred = [&](long c) { return sub(load_bf16_n(key + c, h.d - c), load(mean + c)); };
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
    vf top = splat(1e-30f);
    for (long t = begin; t < end; t++) top = max_size(top, vabs(value(t)));
    store(scale + c, mul(top, splat(1.0f / 127.0f)));
    const vf inverse = div(splat(127.0f), top);
    for (long t = begin; t < round_up(end, PANEL); t += 4) {
      vi word = zero_i();
      auto add_byte = [&](vi shifted, long i) { word = t + i < end ? or_i(word, shifted) : word; };
      auto byte = [&](long i) { return and_i(to_int(mul(value(lmin(t + i, end - 1)), inverse)), splat_i(0xff)); };
      add_byte(byte(0), 0), add_byte(shift_left<8>(byte(1)), 1);
      add_byte(shift_left<16>(byte(2)), 2), add_byte(shift_left<24>(byte(3)), 3);
      store_i(h.value_panel(t) + t % PANEL / 4 * h.d16() + c, word);
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
struct Int8Tile {
  alignas(64) int8_t q[TILE_ROWS][256];
  alignas(64) float scores[TILE_ROWS][KEY_BLOCK];  // without the row's factor
  alignas(64) uint8_t weights[TILE_ROWS][KEY_BLOCK];
  alignas(64) float sums[TILE_ROWS][256];          // of weights times values
  alignas(64) float weight_sums[TILE_ROWS][16];    // of the block at hand, before they are rounded
  // A lane a row: the block's weights are 2^(factor * score + shift); the largest exponent and the sum of the weights
  // so far, those of the block at hand; and what its and all earlier weights are multiplied by to be on a common scale.
  alignas(64) float factor[16], largest[16], total[16], block_largest[16], block_total[16], keep[16], join[16];
  float shift[TILE_ROWS];
  int32_t start[TILE_ROWS];  // -128 times the sum of a row's q, for the keys' + 128
  int rows;
  long begin, end;  // the block at hand
  u16* out;

  template <int M> void start_rows(const u16* first, long stride, long d, float scale, u16* to) {
    store(factor, zero()), store(total, zero()), store(block_total, zero());
    store(largest, splat(-1e30f)), store(block_largest, splat(-1e30f));
    for (int m = 0; m < M; m++) {
      const u16* row = first + m * stride;
      int32_t sum;
      quantize_row8([&](long c) { return load_bf16_n(row + c, d - c); }, d, q[m], factor + m, &sum);
      factor[m] *= scale * LOG2_E, start[m] = -128 * sum;
    }
    rows = M, out = to;
  }

  // The block's scores are known; weights are to be 255 * 2^(factor * score - largest).
  void start_block(long first, long last, const float* top) {
    constexpr float log2_255 = 7.99435344f;
    begin = first, end = last;
    for (int m = 0; m < rows; m++) {
      block_largest[m] = top[m] * factor[m], shift[m] = log2_255 - block_largest[m];
      store(weight_sums[m], zero());
    }
  }

  long whole() const { return (end - begin) / PANEL * PANEL; }

  // Key t of the block and the 15 after it, of which `seen` exist. 2^x to 1.7e-3 will do: rounding the largest weight
  // to eight bits leaves 2e-3.
  void weigh(int m, long t, long seen) {
    const vf x = fmadd(load(scores[m] + t), splat(factor[m]), splat(shift[m])), f = fraction(x);
    const vf power = fmadd(fmadd(splat(0.33718945f), f, splat(0.65763628f)), f, splat(1.0017247f));
    vf p = times_exp2_floor(power, x);
    if (seen < 16) p = keep_first(p, seen, zero());
    store(weight_sums[m], add(load(weight_sums[m]), p));
    store_unsigned_bytes(weights[m] + t, to_int(p));
  }

  void weigh_rest(long t) {
    for (int m = 0; m < rows; m++)
      for (long i = t; i < round_up(end - begin, PANEL); i += 16) weigh(m, i, end - begin - i);
  }

  // The common scale of the weights so far and of the block: that of the larger of their largest.
  void join_block() {
    for (int m = 0; m < rows; m++) block_total[m] = sum_lanes(load(weight_sums[m]));
    const vf before = load(largest), block = load(block_largest), now = vmax(before, block);
    const vf kept = exp2_of(sub(before, now)), joined = exp2_of(sub(block, now));
    store(largest, now), store(keep, kept), store(join, joined);
    store(total, fmadd(load(total), kept, mul(load(block_total), joined)));
  }
};

// Products of M rows with 64 keys, and beside them the weights of `before` for 64 keys of its block, as tile_beside.
template <int M>
SVK_INLINE void int8_tile_beside(const int8_t* a, const u32* b, long quads, vi (&c)[M][4], Int8Tile& before, long t) {
  const int pieces = 4 * before.rows;
  int piece = 0;
  long k = 0;
  auto weigh = [&] { before.weigh(piece / 4, t + piece % 4 * 16, 16), piece++; };
  for (; piece + 3 <= pieces && k + 2 <= quads; k += 2) {
    weigh();
    step_int8<M, 4>(a, 256, b, k, c);
    weigh(), weigh();
    step_int8<M, 4>(a, 256, b, k + 1, c);
  }
  for (; k < quads; k++) step_int8<M, 4>(a, 256, b, k, c);
  while (piece < pieces) weigh();
}

template <int M> SVK_INLINE void int8_values(const QuantizedHead& h, Int8Tile& r) {
  const long d16 = h.d16();
  const float* scale = h.value_scale + r.begin / KEY_BLOCK * d16;
  for (long column = 0; column < d16; column += 64) {
    for_columns((int)lmin(4, (d16 - column) / 16), [&](auto n_const, int at) {
      constexpr int N = decltype(n_const)::value;
      vi c[M][N];
      tile_weights<M, N>(r.weights[0], KEY_BLOCK, h.value_panel(r.begin) + column + at * 16, d16,
                         round_up(r.end - r.begin, PANEL) / 4, c);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const long i = column + (at + n) * 16;
        const vf scales = load(scale + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const vf part = mul(to_float(c[m][n]), mul(scales, splat(r.join[m])));
          store(r.sums[m] + i, r.begin ? fmadd(load(r.sums[m] + i), splat(r.keep[m]), part) : part);
        }
      }
    });
  }
}

// Tiles of query rows one after another, each a block of keys at a time: a block's softmax is computed beside the next
// block's scores, be it of the same tile or of the next.
struct Int8Attention {
  const QuantizedHead& h;
  float scale;
  long out_stride;
  Int8Tile tiles[2];
  Int8Tile* before = nullptr;  // its scores are known

  Int8Attention(const QuantizedHead& head, float factor, long stride) : h(head), scale(factor), out_stride(stride) {}

  template <int M> void tile(const u16* queries, long stride, u16* out) {
    if (!h.count) {
      for (int m = 0; m < M; m++) memset((void*)(out + m * out_stride), 0, (size_t)h.d * 2);
      return;
    }
    Int8Tile& r = tiles[before == tiles];
    r.start_rows<M>(queries, stride, h.d, scale, out);
    for (long begin = 0; begin < h.count; begin += KEY_BLOCK) {
      const long end = lmin(begin + KEY_BLOCK, h.count);
      float top[TILE_ROWS];
      scores<M>(r, begin, end, top);
      settle();
      r.start_block(begin, end, top);
      before = &r;
    }
  }

  void finish() {
    if (before) before->weigh_rest(0);
    settle();
  }

 private:
  template <int M> void scores(Int8Tile& r, long begin, long end, float* largest) {
    alignas(64) float top[M][16];
    for (int m = 0; m < M; m++) store(top[m], splat(-1e30f));
    const long beside = before ? before->whole() : 0;
    for (long t = begin; t < end; t += PANEL) {
      vi c[M][4];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) c[m][n] = splat_i(r.start[m]);
      if (t - begin < beside) int8_tile_beside<M>(r.q[0], h.key_panel(t), h.quads(), c, *before, t - begin);
      else tile_int8<M, 4>(r.q[0], 256, h.key_panel(t), h.quads(), c);
      const bool whole = end - t >= PANEL;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        vf most = load(top[m]);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const vf x = mul(to_float(c[m][n]), load(h.key_scale + t + n * 16));
          store(r.scores[m] + t - begin + n * 16, x);
          most = vmax(most, whole ? x : keep_first(x, end - t - n * 16, splat(-1e30f)));
        }
        store(top[m], most);
      }
    }
    if (before) before->weigh_rest(lmin(beside, round_up(end - begin, PANEL)));
    for (int m = 0; m < M; m++) largest[m] = max_lanes(load(top[m]));
  }

  // The weights of `before` are known: adds their values, and writes the rows when that was their last block.
  void settle() {
    if (!before) return;
    Int8Tile& r = *before;
    before = nullptr;
    r.join_block();
    with_rows<TILE_ROWS>(r.rows, [&](auto m_const) { int8_values<decltype(m_const)::value>(h, r); });
    if (r.end < h.count) return;
    for (int m = 0; m < r.rows; m++) {
      const vf inverse = splat(1.0f / r.total[m]);
      for (long c = 0; c < h.d; c += 16) {
        const vf x = fmadd(load(r.sums[m] + c), inverse, load(h.value_mean + c));
        store_bf16_n(r.out + m * out_stride + c, x, h.d - c);
      }
    }
  }
};

// As vision_rows, on the quantised head.
SVK_INLINE void int8_vision_rows(const svk_vision_attention_args& a, long b, long head, Range rows,
                                 const QuantizedHead& h, long out_row) {
  const long row = 3 * a.heads * a.d;
  Int8Attention attention(h, a.scale, out_row);
  for (long t = rows.begin; t < rows.end; t += TILE_ROWS) {
    const u16* queries = a.qkv + (b * a.tokens + t) * row + head * a.d;
    u16* out = a.out + (b * a.tokens + t) * out_row + head * a.d;
    expect_tile(queries, row, out, out_row, t, rows.end, a.d);
    with_rows<TILE_ROWS>((int)lmin(TILE_ROWS, rows.end - t), [&](auto m_const) {
      attention.tile<decltype(m_const)::value>(queries, row, out);
    });
  }
  attention.finish();
}

}  // namespace SVK_ISA
#endif
