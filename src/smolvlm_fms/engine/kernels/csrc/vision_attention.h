// svk_vision_attention: every patch looks at every patch of its own picture.
#pragma once
#include "attention.h"

namespace SVK_ISA {

// The keys and values of one head, without those that the mask leaves out; returns how many were packed.
SVK_INLINE long pack_head(const svk_vision_attention_args& a, long b, long h, u32* keys, u32* values) {
  const long row = 3 * a.heads * a.d, head_row = a.heads * a.d;
  const u16* first = a.qkv + b * a.tokens * row + head_row + h * a.d;
  long packed = 0;
  for (long t = 0; t < a.tokens; t++) {
    if (a.key_mask && !a.key_mask[b * a.tokens + t]) continue;
    const u16* ahead = first + lmin(t + 48, a.tokens - 1) * row;
    expect_read(ahead, 2 * a.d), expect_read(ahead + head_row, 2 * a.d);
    pack_key(first + t * row, a.d, keys, packed);
    pack_value(first + t * row + head_row, a.d, values, packed);
    packed++;
  }
  return packed;
}

// Asks for what a tile of rows will write, and what the next one will read.
SVK_INLINE void expect_tile(const u16* queries, long row, const u16* out, long out_row, long t, long end, long d) {
  for (long m = 0; m < TILE_ROWS; m++) {
    if (t + m < end) expect_write(out + m * out_row, 2 * d);
    if (t + m + TILE_ROWS < end) expect_read(queries + (m + TILE_ROWS) * row, 2 * d);
  }
}

SVK_INLINE void vision_rows(const svk_vision_attention_args& a, long b, long h, Range rows, long keys_packed,
                            const u32* keys, const u32* values, const AttentionScratch& s, long out_row) {
  const long row = 3 * a.heads * a.d;
  long visible[TILE_ROWS];
  for (int m = 0; m < TILE_ROWS; m++) visible[m] = keys_packed;
  Attention attention(s);
  for (long t = rows.begin; t < rows.end; t += TILE_ROWS) {
    Head head = {a.qkv + (b * a.tokens + t) * row + h * a.d, row, keys, values, a.d, a.scale};
    u16* out = a.out + (b * a.tokens + t) * out_row + h * a.d;
    expect_tile(head.q, row, out, out_row, t, rows.end, a.d);
    attention.tile(head, (int)lmin(TILE_ROWS, rows.end - t), keys_packed, visible, out, out_row);
  }
  attention.finish();
}

static int vision_attention(const svk_vision_attention_args& a) {
  const int threads = threads_or_default(a.threads);
  const long heads = a.batch * a.heads;
  // With fewer heads than threads each head's queries are cut as well, and its keys are packed by each part.
  const long parts = heads >= threads ? 1 : ceil_div(2 * threads, heads);
  auto carve = [&](Carver& from, u32*& keys, u32*& values, AttentionScratch& s) {
    keys = from.take<u32>(key_words(a.tokens, a.d));
    values = from.take<u32>(value_words(a.tokens, a.d));
    s = AttentionScratch::carve(from, a.tokens);
    return from.used;
  };
  u32 *keys0, *values0;
  AttentionScratch s0;
  Carver measure{nullptr};
  const long each = carve(measure, keys0, values0, s0);
  Scratch scratch(each * threads);
  if (!scratch.base) return SVK_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    u32 *keys, *values;
    AttentionScratch s;
    Carver mine{scratch.base + omp_get_thread_num() * each};
    carve(mine, keys, values, s);
    memset((void*)keys, 0, (size_t)each);  // keys and values past the last one, and columns past d, are read
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < heads * parts; i++) {
      const long b = i / parts / a.heads, h = i / parts % a.heads;
      const long packed = pack_head(a, b, h, keys, values);
      Range tiles = share(ceil_div(a.tokens, TILE_ROWS), i % parts, parts);
      Range rows = {tiles.begin * TILE_ROWS, lmin(tiles.end * TILE_ROWS, a.tokens)};
      vision_rows(a, b, h, rows, packed, keys, values, s, a.heads * a.d);
    }
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
