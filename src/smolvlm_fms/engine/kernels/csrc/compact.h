// Linears on compact bf16 weights: a decode step moves a quarter less memory, and its answers are those of the plain
// panel to the bit.
#pragma once
#include "compact_format.h"
#include "tile.h"

namespace SVK_ISA {

// A panel of compact weights. `listed` are the words outside the codes, in order.
struct CompactPanel {
  const char* rows;
  const svk_listed_word *listed, *end;
  int base;

  static CompactPanel of(const svk_weights& w, long p) {
    const long panels = ceil_div(w.n, PANEL);
    const int32_t *bases = (const int32_t*)w.scales, *first = bases + panels;
    const svk_listed_word* words = (const svk_listed_word*)(first + panels + 1);
    return {(const char*)w.packed + p * (w.k / 2) * SVK_COMPACT_ROW, words + first[p], words + first[p + 1], bases[p]};
  }
};

#ifdef SVK_COMPACT_VECTORS
SVK_INLINE void unpack_row(const char* row, const CompactTable& table, u32* words) {
  PairCols cols[4];
  load_compact<0, 4>(row, table, cols);
  for (int n = 0; n < 4; n++) store_i(words + n * 16, cols[n]);
}

// c[m][n] += rows [begin, end) of the panel's columns FIRST + n times row m of `a`, unpacked on the way to the products:
// the same ones in the same order as tile_bf16's. `listed` goes on to the words of the rows behind. AHEAD rows on, the
// panel is fetched into the second-level cache.
template <int M, int FIRST, int COUNT, int AHEAD>
SVK_INLINE const svk_listed_word* compact_tile(const CompactPanel& panel, const CompactTable& table, long begin,
                                               long end, const svk_listed_word* listed, const u16* a, long a_stride,
                                               vf (&c)[M][COUNT]) {
  auto multiply = [&](long k, const PairCols(&cols)[COUNT]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      PairRow row = splat_pair(((const u32_of_row*)(a + m * a_stride))[k]);
#pragma GCC unroll 8
      for (int n = 0; n < COUNT; n++) c[m][n] = dot_pairs(c[m][n], cols[n], row);
    }
  };
  PairCols cols[COUNT];
  for (long k = begin;; k++) {
    const long next = listed < panel.end ? listed->word / PANEL : end;
    for (const long stop = lmin(next, end); k < stop; k++) {
      const char* at = panel.rows + k * SVK_COMPACT_ROW;
      for (int i = 0; AHEAD && i < SVK_COMPACT_ROW; i += 64) prefetch_far(at + AHEAD * SVK_COMPACT_ROW + i);
      load_compact<FIRST, COUNT>(at, table, cols);
      multiply(k, cols);
    }
    if (k == end) return listed;
    alignas(64) u32 words[PANEL];
    unpack_row(panel.rows + k * SVK_COMPACT_ROW, table, words);
    for (; listed < panel.end && listed->word / PANEL == k; listed++) words[listed->word % PANEL] = listed->value;
    for (int n = 0; n < COUNT; n++) cols[n] = load_pairs(words + (FIRST + n) * 16);
    multiply(k, cols);
  }
}

template <int M, int FIRST, int COUNT>
static void compact_columns(const CompactPanel& panel, long pairs, const u16* a, long a_stride, float* sums) {
  vf c[M][COUNT];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < COUNT; n++) c[m][n] = zero();
  compact_tile<M, FIRST, COUNT, 0>(panel, compact_table(panel.base), 0, pairs, panel.listed, a, a_stride, c);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < COUNT; n++) store(sums + m * PANEL + (FIRST + n) * 16, c[m][n]);
}

// Rows of one pass over a panel, which unpacks it: six keep four columns in registers, eight two.
constexpr int COMPACT_ROWS = 8;

// A whole panel for rows that leave registers for half of its columns: a piece of it for one half, then for the other,
// while it is in the first-level cache. (All of it for one half reads two lines of three, which memory is slow at.)
template <int M>
static void compact_halves(const CompactPanel& panel, long pairs, const u16* a, long a_stride, float* sums) {
  constexpr int PIECE = 32;
  const CompactTable table = compact_table(panel.base);
  memset(sums, 0, M * PANEL * sizeof *sums);
  const svk_listed_word* listed = panel.listed;
  for (long k = 0; k < pairs; k += PIECE) {
    const svk_listed_word* behind = listed;
    auto half = [&](auto first) {
      constexpr int FIRST = decltype(first)::value;
      vf c[M][2];
      for (int m = 0; m < M; m++)
        for (int n = 0; n < 2; n++) c[m][n] = load(sums + m * PANEL + (FIRST + n) * 16);
      const long end = lmin(k + PIECE, pairs);
      behind = compact_tile<M, FIRST, 2, FIRST ? 0 : PIECE>(panel, table, k, end, listed, a, a_stride, c);
      for (int m = 0; m < M; m++)
        for (int n = 0; n < 2; n++) store(sums + m * PANEL + (FIRST + n) * 16, c[m][n]);
    };
    half(Const<0>()), half(Const<2>());
    listed = behind;
  }
}

// Columns [first, first + count) * 16, or a few more of the panel's own.
template <int M>
static void panel_compact(const CompactPanel& panel, long k, const u16* a, long a_stride, int first, int count,
                          float* sums) {
  const bool left = first < 2, right = first + count > 2;
  if (left && right) {
    if constexpr (M <= TILE_ROWS) return compact_columns<M, 0, 4>(panel, k / 2, a, a_stride, sums);
    return compact_halves<M>(panel, k / 2, a, a_stride, sums);
  }
  return left ? compact_columns<M, 0, 2>(panel, k / 2, a, a_stride, sums)
              : compact_columns<M, 2, 2>(panel, k / 2, a, a_stride, sums);
}
#endif

// The whole panel as plain bf16, [k/2][64].
static void unpack_panel(const CompactPanel& panel, long pairs, u32* out) {
#ifdef SVK_COMPACT_VECTORS
  const CompactTable table = compact_table(panel.base);
  for (long k = 0; k < pairs; k++) unpack_row(panel.rows + k * SVK_COMPACT_ROW, table, out + k * PANEL);
#else
  for (long i = 0; i < pairs * PANEL; i++)
    out[i] = svk_compact_word(panel.rows + i / PANEL * SVK_COMPACT_ROW, i % PANEL, panel.base);
#endif
  for (const svk_listed_word* one = panel.listed; one < panel.end; one++) out[one->word] = one->value;
}

// The exponent below the fifteen neighbours that most of some rows' weights have.
static int common_base(const u32* panel, long pairs) {
  int count[256] = {};
  const long step = pairs < 64 ? 1 : pairs / 32;
  for (long k = 0; k < pairs; k += step)
    for (long i = 0; i < 2 * PANEL; i++) count[((const svk_lane*)(panel + k * PANEL))[i] >> 7 & 255]++;
  int base = 0, inside = 0, most = 0;
  for (int i = 1; i < SVK_CODES; i++) inside += count[i];
  most = inside;
  for (int low = 1; low + SVK_CODES <= 256; low++) {  // ties: the larger exponents, of which a sample may miss some
    inside += count[low + SVK_CODES - 1] - count[low];
    if (inside >= most && inside) most = inside, base = low;
  }
  return base;
}

// Packs a plain panel; -1 where more than `room` words are outside the codes, else their number.
static long pack_compact_panel(const u32* panel, long pairs, char* out, int32_t* base, svk_listed_word* listed,
                               long room) {
  *base = common_base(panel, pairs);
  long count = 0;
  for (long k = 0; k < pairs; k++) {
    svk_lane* lanes = (svk_lane*)(out + k * SVK_COMPACT_ROW);
    const u32* words = panel + k * PANEL;
#ifdef SVK_COMPACT_VECTORS
    uint64_t outside = store_compact(words, *base, lanes);
#else
    uint64_t outside = 0;
    const svk_lane* given = (const svk_lane*)words;
    memset(lanes, 0, SVK_COMPACT_ROW);
    auto code_of = [&](u16 x) { return x >> 7 & 255 ? (x >> 7 & 255) - *base : 0; };
    auto has_code = [&](u16 x) { return !(x >> 7 & 255) || (code_of(x) > 0 && code_of(x) < SVK_CODES); };
    for (int word = 0; word < PANEL; word++) {
      if (!has_code(given[2 * word]) || !has_code(given[2 * word + 1])) {
        outside |= (uint64_t)1 << word;
        continue;
      }
      for (int i = 2 * word; i < 2 * word + 2; i++) {
        const u16 kept = given[i] & 0x807f;
        lanes[i / 64 * 32 + i % 32] |= (u16)(i / 32 % 2 ? svk_swap_bytes(kept) : kept);
        lanes[64 + i % 32] |= (u16)(code_of(given[i]) << (i / 32 * 4));
      }
    }
#endif
    for (; outside; outside &= outside - 1) {
      if (count == room) return -1;
      const int column = __builtin_ctzll(outside);
      listed[count++] = {(u32)(k * PANEL + column), words[column]};
    }
  }
  return count;
}

}  // namespace SVK_ISA
