// Rotation, the KV cache, and attention of consecutive rows of one sequence to their past: svk_causal_attention.
#pragma once
#include "attention.h"
#include "team.h"

namespace SVK_ISA {

// Rotates one head's d values by the angles of `position` (Su et al., arXiv 2104.09864), in fp32, to bf16.
SVK_INLINE void rotate(const svk_rope& rope, const float* x, long d, long position, u16* out) {
  const long half = d / 2;
  const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
  float turned[256];
  if (rope.interleaved) {
    for (long i = 0; i < half; i++) {
      turned[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
      turned[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
    }
  } else {
    for (long i = 0; i < half; i++) {
      turned[i] = x[i] * cos[i] - x[i + half] * sin[i];
      turned[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
  }
  for (long i = 0; i < d; i += 16) store_bf16_n(out + i, load_n(turned + i, d - i), d - i);
}

SVK_INLINE void rotate_bf16(const svk_rope& rope, const u16* x, long d, long position, u16* out) {
  float wide[256];
  for (long i = 0; i < d; i += 16) store_n(wide + i, load_bf16_n(x + i, d - i), d - i);
  rotate(rope, wide, d, position, out);
}

// Where one sequence keeps the keys and values of one layer and head.
struct Store {
  u32 *keys, *values;
};

SVK_INLINE Store store_of(const svk_cache& c, long layer, long head, long start, long d) {
  return {c.keys + layer * c.key_layer + head * c.key_head + start * (d / 2),
          c.values + layer * c.value_layer + head * c.value_head + start / 2 * padded_d(d)};
}


// Stores keys and values of this thread's rows. Runs end at even positions, because two share a word.
static void store_rows(const svk_cache& cache, const svk_rope& rope, const svk_causal_attention_args& a, int thread,
                       int threads) {
  const long row = (a.heads + 2 * a.kv_heads) * a.d, first_pair = a.position / 2;
  Range pairs = share(ceil_div(a.position + a.rows, 2) - first_pair, thread, threads);
  const long begin = lmax(a.position, 2 * (first_pair + pairs.begin));
  const long end = lmin(a.position + a.rows, 2 * (first_pair + pairs.end));
  for (long t = begin; t < end; t++)
    for (long h = 0; h < a.kv_heads; h++) {
      Store s = store_of(cache, a.layer, h, a.start, a.d);
      const u16* key = a.qkv + (t - a.position) * row + (a.heads + h) * a.d;
      u16 turned[256];
      rotate_bf16(rope, key, a.d, t, turned);
      pack_key(turned, a.d, s.keys, t);
      pack_value(key + a.kv_heads * a.d, a.d, s.values, t);
    }
}

// Rows [first, first + count) of query head h.
SVK_INLINE void attend_tile(const svk_cache& cache, const svk_rope& rope, const svk_causal_attention_args& a, long h,
                            long first, int count, Attention& attention) {
  const long row = (a.heads + 2 * a.kv_heads) * a.d;
  Store s = store_of(cache, a.layer, h / (a.heads / a.kv_heads), a.start, a.d);
  u16 queries[TILE_ROWS * 256];
  long visible[TILE_ROWS];
  for (int m = 0; m < count; m++) {
    visible[m] = a.position + first + m + 1;
    rotate_bf16(rope, a.qkv + (first + m) * row + h * a.d, a.d, visible[m] - 1, queries + m * 256);
  }
  Head head = {queries, 256, s.keys, s.values, a.d, a.scale};
  u16* out = a.out + first * a.out_stride + h * a.d;
  attention.tile(head, count, visible[count - 1], visible, out, a.out_stride);
}

// All rows and heads, a tile at a time from a common counter; the longest first, so that threads end together.
static void attend_rows(const svk_cache& cache, const svk_rope& rope, const svk_causal_attention_args& a, long* counter,
                        const AttentionScratch& scratch) {
  const long tiles = ceil_div(a.rows, TILE_ROWS);
  Attention attention(scratch);
  for (long i; (i = next_item(counter)) < tiles * a.heads;) {
    const long h = i % a.heads, first = (tiles - 1 - i / a.heads) * TILE_ROWS;
    attend_tile(cache, rope, a, h, first, (int)lmin(TILE_ROWS, a.rows - first), attention);
  }
  attention.finish();
}

static int causal_attention(const svk_cache& cache, const svk_rope& rope, const svk_causal_attention_args& a) {
  const int threads = threads_or_default(a.threads);
  auto carve = [&](Carver& from) { return AttentionScratch::carve(from, a.position + a.rows); };
  Carver measure{nullptr};
  carve(measure);
  Scratch scratch(threads * measure.used);
  if (!scratch.base) return SVK_NO_MEMORY;
  long counter = 0;
#pragma omp parallel num_threads(threads)
  {
    store_rows(cache, rope, a, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    Carver mine{scratch.base + omp_get_thread_num() * measure.used};
    attend_rows(cache, rope, a, &counter, carve(mine));
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
