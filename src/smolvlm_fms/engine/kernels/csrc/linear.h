// Packed linears: out = residual + scale * activation(x W^T + bias), for weights of every kind.
#pragma once
#include "compact.h"
#include "rows.h"
#include "team.h"
#include "tile.h"

namespace SVK_ISA {

// Rows that one pass over a panel serves. The group kinds need registers for two planes of activations.
constexpr int GROUP_ROWS = TILE_VECS >= 4 ? 4 : 1;
SVK_INLINE bool grouped(int64_t kind) { return kind == SVK_INT8_GROUPS || kind == SVK_INT4_GROUPS; }
#ifdef SVK_COMPACT_VECTORS
constexpr int MOST_ROWS = COMPACT_ROWS;
#else
constexpr int MOST_ROWS = TILE_ROWS;
#endif
SVK_INLINE int rows_per_tile(int64_t kind) {
  return kind == SVK_BF16_COMPACT ? MOST_ROWS : grouped(kind) ? GROUP_ROWS : TILE_ROWS;
}

// The panel's columns [first, first + count) * 16 times rows m0 ... m0 + M - 1, into `sums` [TILE_ROWS][64].
template <int M>
static void panel_bf16(const u32* panel, long k, const u16* a, long a_stride, int first, int count, float* sums) {
  for_columns(count, [&](auto n_const, int at) {
    constexpr int N = decltype(n_const)::value;
    vf c[M][N];
    tile_bf16<M, N>(a, a_stride, panel + (first + at) * 16, PANEL, k / 2, c);
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) store(sums + m * PANEL + (first + at + n) * 16, c[m][n]);
  });
}

template <int M>
static void panel_int8(const svk_weights& w, long p, const Rows& rows, long m0, int first, int count, float* sums) {
  const u32* panel = (const u32*)w.packed + p * PANEL * (w.k / 4);
  const float* scales = (const float*)w.scales + p * PANEL;
  for_columns(count, [&](auto n_const, int at) {
    constexpr int N = decltype(n_const)::value;
    vi c[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) c[m][n] = splat_i(-128 * rows.sum[m0 + m]);
    tile_int8<M, N>(rows.q + m0 * rows.stride, rows.stride, panel + (first + at) * 16, w.k / 4, c);
    for (int m = 0; m < M; m++) {
      vf scale = splat(rows.scale[m0 + m]);
      for (int n = 0; n < N; n++) {
        long column = (first + at + n) * 16;
        vf x = mul(to_float(c[m][n]), mul(scale, load(scales + column)));
        store(sums + m * PANEL + column, x);
      }
    }
  });
}

// The eight quads of one group of 32 inputs for 16 columns.
template <int BITS> SVK_INLINE void load_group(const u32* w, int quad_pair, QuadCols (&out)[2]) {
  if constexpr (BITS == 8) {
    out[0] = as_quads(load_i(w + (2 * quad_pair) * PANEL));
    out[1] = as_quads(load_i(w + (2 * quad_pair + 1) * PANEL));
  } else {
    vi both = load_i(w + quad_pair * PANEL), nibble = splat_i(0x0f0f0f0f);
    out[0] = as_quads(and_i(both, nibble));
    out[1] = as_quads(and_i(shift_right<4>(both), nibble));
  }
}

// The next panel, fetched into the second-level cache while the one at hand is computed: with few columns a pass, the
// hardware does not see that the whole panel is read. (With all four it does, and such help is a hindrance then: 7 %.)
struct Ahead {
  const char *at, *end;

  template <int BITS> static Ahead of(const svk_weights& w, long p) {
    const long bytes = PANEL * w.k * BITS / 8;
    const char* next = (const char*)w.packed + (p + 1) * bytes;
    if (bytes > 400 * 1024 || (p + 1) * PANEL >= w.n) return {next - 256, next - 256};
    return {next, next + bytes - 256};
  }

  // At the end the last lines are asked for again and again, which costs less than a branch.
  template <int BITS, int ROWS, int COLUMNS> void step() {
    // With more rows the arithmetic takes longer.
    constexpr int lines = COLUMNS == 4 ? 0 : ROWS <= 2 ? 4 : BITS == 8 ? 2 : 0;
    if (!lines) return;
#pragma GCC unroll 4
    for (int i = 0; i < lines; i++) prefetch_far(at + i * 64);
    at += at < end ? lines * 64 : 0;
  }
};

// Weights in groups of 32 with 16-bit activations: per group an exact integer sum, scaled into the fp32 total.
template <int BITS, int M, int N>
SVK_INLINE void group_columns(const svk_weights& w, long p, const Rows& rows, long m0, int first, float* sums,
                              Ahead& ahead) {
  constexpr long words = BITS == 8 ? 8 : 4;  // of a group, for one column
  constexpr int offset = BITS == 8 ? 128 : 8;
  const long groups = w.k / GROUP;
  const u32* panel = (const u32*)w.packed + p * PANEL * words * groups + first * 16;
  const u16* scales = (const u16*)w.scales + p * PANEL * groups + first * 16;
  vf total[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) total[m][n] = zero();
  for (long g = 0; g < groups; g++) {
    const u32* w_group = panel + g * words * PANEL;
    vi high[M][N], low[M][N];
    for (int m = 0; m < M; m++) {
      vi start = splat_i(-offset * rows.sum[(m0 + m) * rows.scales + g]);
      for (int n = 0; n < N; n++) high[m][n] = zero_i(), low[m][n] = start;
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
      ahead.step<BITS, M, N>();
      QuadCols cols[N][2];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) load_group<BITS>(w_group + n * 16, pair, cols[n]);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        long at = (m0 + m) * rows.stride + g * GROUP + pair * 8;
        const u32_of_bytes *q = (const u32_of_bytes*)(rows.q + at), *q_low = (const u32_of_bytes*)(rows.q_low + at);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          QuadRow upper = splat_quad(q[half]), lower = splat_quad(q_low[half]);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) {
            high[m][n] = dot_quads(high[m][n], cols[n][half], upper);
            low[m][n] = dot_quads(low[m][n], cols[n][half], lower);
          }
        }
      }
    }
    for (int n = 0; n < N; n++) {
      vf scale = load_bf16(scales + g * PANEL + n * 16);
      for (int m = 0; m < M; m++) {
        vf exact = to_float(add_i(shift_left<8>(high[m][n]), low[m][n]));
        total[m][n] = fmadd(exact, mul(scale, splat(rows.scale[(m0 + m) * rows.scales + g])), total[m][n]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(sums + m * PANEL + (first + n) * 16, total[m][n]);
}

template <int BITS, int M>
static void panel_groups(const svk_weights& w, long p, const Rows& rows, long m0, int first, int count, float* sums) {
  Ahead ahead = Ahead::of<BITS>(w, p);
  constexpr int N = TILE_VECS < 4 ? 1 : M == 1 ? 4 : M == 2 ? 2 : 1;
  int at = first;
  for (; at + N <= first + count; at += N) group_columns<BITS, M, N>(w, p, rows, m0, at, sums, ahead);
  for (; at < first + count; at++) group_columns<BITS, M, 1>(w, p, rows, m0, at, sums, ahead);
}

template <int M>
SVK_INLINE void panel_any(const svk_weights& w, long p, const Rows& rows, long m0, int first, int count, float* sums) {
#ifdef SVK_COMPACT_VECTORS
  if (w.kind == SVK_BF16_COMPACT) {
    const u16* a = rows.bf16 + m0 * rows.stride;
    return panel_compact<M>(CompactPanel::of(w, p), w.k, a, rows.stride, first, count, sums);
  }
#endif
  if constexpr (M > TILE_ROWS) return;
  if (w.kind == SVK_BF16) {
    const u16* a = rows.bf16 + m0 * rows.stride;
    panel_bf16<M>((const u32*)w.packed + p * PANEL * (w.k / 2), w.k, a, rows.stride, first, count, sums);
  } else if (w.kind == SVK_INT8_CHANNEL) {
    panel_int8<M>(w, p, rows, m0, first, count, sums);
  } else if constexpr (M <= GROUP_ROWS) {
    if (w.kind == SVK_INT8_GROUPS) panel_groups<8, M>(w, p, rows, m0, first, count, sums);
    if (w.kind == SVK_INT4_GROUPS) panel_groups<4, M>(w, p, rows, m0, first, count, sums);
  }
}

// What happens to the sums of a tile on their way to memory.
struct Epilogue {
  const float* bias = nullptr;
  int64_t activation = SVK_NONE;
  float scale = 1.0f;
  const u16* residual = nullptr;
  u16* out = nullptr;
  float* out_f32 = nullptr;
  bool accumulate = false;  // out_f32 += instead of =
  long stride = 0;
  long outputs = 0;  // columns of `out`

  int width() const { return activation == SVK_SWIGLU ? PANEL / 2 : PANEL; }  // columns of `out` from one panel

  // Asks for the lines that rows [m0, m0 + rows) of panel p go to, while their sums are still computed: memory that was
  // not at hand held every tile up for as long as a tenth of its products take.
  void expect(long m0, int rows, long p) const {
    const long size = out_f32 ? 4 : 2;
    const char* first = (out_f32 ? (const char*)out_f32 : (const char*)out) + (m0 * stride + p * width()) * size;
    const long bytes = lmin(width(), outputs - p * width()) * size;
    for (int m = 0; m < rows; m++) expect_write(first + m * stride * size, bytes);
  }

  // 32 neighbouring columns that all exist.
  void put_two(vf x, vf y, long at) const {
    if (scale != 1.0f) x = mul(x, splat(scale)), y = mul(y, splat(scale));
    if (residual) x = add(x, load_bf16(residual + at)), y = add(y, load_bf16(residual + at + 16));
    if (!out_f32) return store_bf16_two(out + at, x, y);
    if (accumulate) x = add(x, load(out_f32 + at)), y = add(y, load(out_f32 + at + 16));
    store(out_f32 + at, x), store(out_f32 + at + 16, y);
  }

  // 16 columns that all exist.
  void put_one(vf x, long at) const {
    if (scale != 1.0f) x = mul(x, splat(scale));
    if (residual) x = add(x, load_bf16(residual + at));
    if (!out_f32) return store_bf16(out + at, x);
    store(out_f32 + at, accumulate ? add(x, load(out_f32 + at)) : x);
  }

  // `finish` for a whole panel without padding.
  template <class Activation>
  void finish_whole(const float* sums, long m0, int rows, long p, Activation&& activate) const {
    vf shift[4];  // -0 + x is x, whatever its sign
    for (int n = 0; n < 4; n++) shift[n] = bias ? load(bias + p * PANEL + n * 16) : splat(-0.0f);
    for (int m = 0; m < rows; m++) {
      vf x[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) x[n] = activate(add(load(sums + m * PANEL + n * 16), shift[n]));
      const long at = (m0 + m) * stride + p * PANEL;
      put_two(x[0], x[1], at), put_two(x[2], x[3], at + 32);
    }
  }

  void finish_swiglu(const float* sums, long m0, int rows, long p) const {
    vf shift[4];
    for (int n = 0; n < 4; n++) shift[n] = bias ? load(bias + p * PANEL + n * 16) : splat(-0.0f);
    for (int m = 0; m < rows; m++) {
      vf x[4];
      for (int n = 0; n < 4; n++) x[n] = add(load(sums + m * PANEL + n * 16), shift[n]);
      put_two(mul(silu(x[0]), x[2]), mul(silu(x[1]), x[3]), (m0 + m) * stride + p * (PANEL / 2));
    }
  }

  void put(vf x, long m, long column) const {
    long left = outputs - column, at = m * stride + column;
    if (left <= 0) return;
    x = mul(x, splat(scale));
    if (residual) x = add(x, load_bf16_n(residual + at, left));
    if (!out_f32) return store_bf16_n(out + at, x, left);
    store_n(out_f32 + at, accumulate ? add(x, load_n(out_f32 + at, left)) : x, left);
  }

  // sums [rows][64] of panel p, columns [first, first + count) * 16; SwiGLU needs the whole panel.
  void finish(float* sums, long m0, int rows, long p, int first, int count) const {
    if (count == 4 && (p + 1) * width() <= outputs) {
      if (activation == SVK_SWIGLU) return finish_swiglu(sums, m0, rows, p);
      if (activation == SVK_GELU_TANH) return finish_whole(sums, m0, rows, p, gelu_tanh);
      if (activation == SVK_QUICK_GELU) return finish_whole(sums, m0, rows, p, quick_gelu);
      return finish_whole(sums, m0, rows, p, [](vf x) { return x; });
    }
    for (int m = 0; m < rows; m++) {
      vf x[4];
      for (int n = first; n < first + count; n++) {
        x[n] = load(sums + m * PANEL + n * 16);
        if (bias) x[n] = add(x[n], load(bias + p * PANEL + n * 16));
      }
      if (activation == SVK_SWIGLU) {
        put(mul(silu(x[0]), x[2]), m0 + m, p * 32);
        put(mul(silu(x[1]), x[3]), m0 + m, p * 32 + 16);
        continue;
      }
      for (int n = first; n < first + count; n++) {
        if (activation == SVK_GELU_TANH) x[n] = gelu_tanh(x[n]);
        if (activation == SVK_QUICK_GELU) x[n] = quick_gelu(x[n]);
        put(x[n], m0 + m, p * PANEL + n * 16);
      }
    }
  }
};

SVK_INLINE long panel_bytes(const svk_weights& w) {
  switch (w.kind) {
    case SVK_BF16: return PANEL * w.k * 2;
    case SVK_BF16_COMPACT: return w.k / 2 * SVK_COMPACT_ROW;
    case SVK_INT4_GROUPS: return PANEL * w.k / 2;
    default: return PANEL * w.k;
  }
}

// A piece of the panel that comes next, a few lines with every tile of rows, so that it is in the second-level cache
// when its turn comes: weights of a whole model come from memory each time.
struct Upcoming {
  const char *at = nullptr, *end = nullptr;
  long step = 0;

  // Piece `piece` of `pieces` of panel p, over `tiles` tiles; nothing beyond the last panel.
  static Upcoming of(const svk_weights& w, long p, long piece, long pieces, long tiles) {
    if (p * PANEL >= w.n) return {};
    const long bytes = panel_bytes(w);
    const char* panel = (const char*)w.packed + p * bytes;
    Range mine = share(bytes / 64, piece, pieces);
    return {panel + mine.begin * 64, panel + mine.end * 64, ceil_div(mine.end - mine.begin, tiles) * 64};
  }

  void fetch() {
    for (const char* stop = at + lmin(step, end - at); at < stop; at += 64) prefetch_far(at);
  }
};

#ifdef SVK_WIDE_TILES
// Full tiles of 8-bit rows times a whole panel, one after the other: the sums of each go to memory beside the products
// of the next one, as all of that but multiplications is done by other units of the core. (With bf16 rows, whose
// products take twice as long, there is next to nothing to gain, and GELU's values do not fit in the registers.)
template <class Activation> struct Int8Tiles {
  const svk_weights& w;
  const Rows& a;
  const Epilogue& e;
  long p;
  Activation activate;
  long before = -1;  // first row of the tile whose sums wait in sums[1 - now], if any
  int now = 0;
  alignas(64) float sums[2][TILE_ROWS * PANEL] = {};

  // 16 columns of a row of the tile before.
  void put(int piece) {
    const long column = p * PANEL + piece % 4 * 16;
    vf x = load(sums[1 - now] + piece * 16);
    if (e.bias) x = add(x, load(e.bias + column));
    e.put_one(activate(x), (before + piece / 4) * e.stride + column);
  }

  void tile(long m) {
    const u32* panel = (const u32*)w.packed + p * PANEL * (w.k / 4);
    const float* scales = (const float*)w.scales + p * PANEL;
    const int8_t* row = a.q + m * a.stride;
    const int pieces = before < 0 ? 0 : 4 * TILE_ROWS;
    int piece = 0;
    long k = 0;
    vi c[TILE_ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) c[r][n] = splat_i(-128 * a.sum[m + r]);
    for (; piece < pieces && k < w.k / 4; piece++, k++) {
      step_int8<TILE_ROWS, 4>(row, a.stride, panel, k, c);
      put(piece);
    }
    for (; k < w.k / 4; k++) step_int8<TILE_ROWS, 4>(row, a.stride, panel, k, c);
    for (; piece < pieces; piece++) put(piece);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        const vf scale = mul(splat(a.scale[m + r]), load(scales + n * 16));
        store(sums[now] + r * PANEL + n * 16, mul(to_float(c[r][n]), scale));
      }
    before = m, now = 1 - now;
  }

  void run(Range rows, Upcoming upcoming) {
    for (long m = rows.begin; m < rows.end; m += TILE_ROWS) {
      e.expect(m, TILE_ROWS, p);
      upcoming.fetch();
      tile(m);
    }
    for (int piece = 0; piece < 4 * TILE_ROWS; piece++) put(piece);
  }
};

static void int8_tiles(const svk_weights& w, const Rows& a, Range rows, long p, const Epilogue& e, Upcoming upcoming) {
  auto run = [&](auto activate) { Int8Tiles<decltype(activate)>{w, a, e, p, activate}.run(rows, upcoming); };
  if (e.activation == SVK_GELU_TANH) return run([](vf x) { return gelu_tanh(x); });
  if (e.activation == SVK_QUICK_GELU) return run([](vf x) { return quick_gelu(x); });
  run([](vf x) { return x; });
}
#endif

// Rows [begin, end) times 16-wide columns [first, first + count) of panel p.
static void panel_rows(const svk_weights& w, const Rows& a, Range rows, long p, int first, int count,
                       const Epilogue& e, Upcoming upcoming = {}) {
  const int step = rows_per_tile(w.kind);
#ifdef SVK_WIDE_TILES
  const bool whole = count == 4 && (p + 1) * PANEL <= e.outputs && e.activation != SVK_SWIGLU;
  if (const long full = (rows.end - rows.begin) / TILE_ROWS; w.kind == SVK_INT8_CHANNEL && whole && full > 1) {
    const Range tiles = {rows.begin, rows.begin + full * TILE_ROWS};
    int8_tiles(w, a, tiles, p, e, upcoming);
    rows.begin = tiles.end;
  }
#endif
  for (long m = rows.begin; m < rows.end; m += step) {
    int live = (int)lmin(step, rows.end - m);
    alignas(64) float sums[MOST_ROWS * PANEL];
    e.expect(m, live, p);
    upcoming.fetch();
    with_rows<MOST_ROWS>(live, [&](auto m_const) {
      panel_any<decltype(m_const)::value>(w, p, a, m, first, count, sums);
    });
    e.finish(sums, m, live, p, first, count);
  }
}

// Panel p of group-quantised weights as bf16, [k/2][64], for many rows: the cost is shared by all of them.
template <int BITS> static void dequantize_panel(const svk_weights& w, long p, u32* out) {
  constexpr long words = BITS == 8 ? 8 : 4;
  const long groups = w.k / GROUP;
  const u32* panel = (const u32*)w.packed + p * PANEL * words * groups;
  const u16* scales = (const u16*)w.scales + p * PANEL * groups;
  vi mask = splat_i(BITS == 8 ? 0xff : 0xf), offset = splat_i(BITS == 8 ? 128 : 8);
  for (long g = 0; g < groups; g++)
    for (int n = 0; n < 4; n++) {
      vf scale = load_bf16(scales + g * PANEL + n * 16);
      auto value = [&](vi bits) { return mul(to_float(sub_i(and_i(bits, mask), offset)), scale); };
      u32* to = out + g * (GROUP / 2) * PANEL + n * 16;
      for (long i = 0; i < words; i++) {
        vi v = load_i(panel + (g * words + i) * PANEL + n * 16);
        if constexpr (BITS == 8) {
          store_i(to + (2 * i) * PANEL, pack_pairs(value(v), value(shift_right<8>(v))));
          store_i(to + (2 * i + 1) * PANEL, pack_pairs(value(shift_right<16>(v)), value(shift_right<24>(v))));
        } else {  // low nibbles are inputs 0..3 of eight, high nibbles 4..7
          u32* eight = to + 4 * i * PANEL;
          store_i(eight, pack_pairs(value(v), value(shift_right<8>(v))));
          store_i(eight + PANEL, pack_pairs(value(shift_right<16>(v)), value(shift_right<24>(v))));
          store_i(eight + 2 * PANEL, pack_pairs(value(shift_right<4>(v)), value(shift_right<12>(v))));
          store_i(eight + 3 * PANEL, pack_pairs(value(shift_right<20>(v)), value(shift_right<28>(v))));
        }
      }
    }
}

// From this many rows on, group-quantised weights are widened to bf16 a panel at a time.
constexpr long WIDEN_FROM_ROWS = 32;

// The form in which activations go to a linear: what its weights multiply, or bf16 when these are widened.
SVK_INLINE int64_t row_kind(const svk_weights& w, long rows) {
  return w.kind == SVK_BF16_COMPACT || (grouped(w.kind) && rows >= WIDEN_FROM_ROWS) ? (int64_t)SVK_BF16 : w.kind;
}

// Words of the scratch that each thread needs to widen a panel.
SVK_INLINE long widened_words(const svk_weights& w) {
  return grouped(w.kind) || w.kind == SVK_BF16_COMPACT ? PANEL * (w.k / 2) : 0;
}

// Whether a linear's weights become plain bf16, a panel at a time, before they are multiplied: grouped ones where the
// activations are bf16, compact ones for many rows (or without the vectors that unpack them).
SVK_INLINE bool widens(const svk_weights& w, const Rows& a, long rows) {
#ifdef SVK_COMPACT_VECTORS
  if (w.kind == SVK_BF16_COMPACT) return rows > 4 * COMPACT_ROWS;
#else
  (void)rows;
#endif
  return a.bf16 && w.kind != SVK_BF16;
}

static void widen_panel(const svk_weights& w, long p, u32* out) {
  if (w.kind == SVK_BF16_COMPACT) return unpack_panel(CompactPanel::of(w, p), w.k / 2, out);
  w.kind == SVK_INT8_GROUPS ? dequantize_panel<8>(w, p, out) : dequantize_panel<4>(w, p, out);
}

// The weights as they are multiplied: themselves, or, where they widen, a panel at a time in the scratch.
struct Panels {
  const svk_weights& w;
  u32* scratch;  // null: they do not widen
  long held = -1;

  svk_weights at(long p) {
    if (!scratch) return w;
    if (p != held) widen_panel(w, held = p, scratch);
    svk_weights one = w;
    one.kind = SVK_BF16;
    one.packed = (const void*)((uintptr_t)scratch - (uintptr_t)(p * PANEL * (w.k / 2) * 4));
    return one;
  }
};

// One thread's share of the columns, for all rows: few rows, so that each weight is read by one thread only.
static void linear_by_columns(const svk_weights& w, const Rows& a, long rows, int thread, int threads, u32* bf16_panel,
                              const Epilogue& e) {
  const bool whole = e.activation == SVK_SWIGLU;  // gate and up of an output lie in both halves of a panel
  const long half = whole ? 4 : 2;                // vectors that stay together
  Panels panels = {w, widens(w, a, rows) ? bf16_panel : nullptr};
  Range mine = share(ceil_div(w.n, half * 16), thread, threads);
  for (long at = mine.begin * half; at < mine.end * half;) {
    long p = at / 4;
    int first = (int)(at % 4), count = (int)lmin(4 - first, mine.end * half - at);
    panel_rows(panels.at(p), a, {0, rows}, p, first, count, e);
    at += count;
  }
}

// One of `threads` parts of a grid of rows and columns: a panel stays in the core's cache while the rows pass by. With
// `taken`, a counter for each part, the pieces of a part may be shared: who takes one counts it.
static void linear_by_rows(const svk_weights& w, const Rows& a, long rows, int part, int threads, u32* bf16_panel,
                           const Epilogue& e, long* taken) {
  const long tiles = ceil_div(rows, TILE_ROWS);
  long row_parts = lmax(1, lmin(threads, tiles / 4));  // runs of four tiles or more; threads left over cut the panels
  while (threads % row_parts) row_parts--;
  const Range mine = share(tiles, part % row_parts, row_parts);
  const Range panels = share(ceil_div(w.n, PANEL), part / row_parts, threads / row_parts);
  const long pieces = taken ? lmax(1, (mine.end - mine.begin) / 16) : 1;
  Panels plain = {w, widens(w, a, rows) ? bf16_panel : nullptr};
  long own = 0;
  for (long i; (i = taken ? next_item(taken + part) : own++) < (panels.end - panels.begin) * pieces;) {
    const long p = panels.begin + i / pieces;
    Range piece = share(mine.end - mine.begin, i % pieces, pieces);
    const Range run = {(mine.begin + piece.begin) * TILE_ROWS, lmin((mine.begin + piece.end) * TILE_ROWS, rows)};
    const int count = e.activation == SVK_SWIGLU ? 4 : (int)lmin(4, ceil_div(w.n - p * PANEL, 16));
    const Upcoming next = Upcoming::of(w, p + 1, i % pieces, pieces, lmax(1, piece.end - piece.begin));
    panel_rows(plain.at(p), a, run, p, 0, count, e, next);
  }
}

// This thread's part of a linear. Every thread of the team calls it with the same arguments but for its scratch. With
// `taken`, `threads` zeros, a thread that is done helps the others: no two cores are equally fast for long.
SVK_INLINE void linear_part(const svk_weights& w, const Rows& a, long rows, int thread, int threads, u32* bf16_panel,
                            const Epilogue& e, long* taken = nullptr) {
  if (ceil_div(rows, TILE_ROWS) < 4 * threads) return linear_by_columns(w, a, rows, thread, threads, bf16_panel, e);
  for (int other = 0; other < (taken ? threads : 1); other++)
    linear_by_rows(w, a, rows, (thread + other) % threads, threads, bf16_panel, e, taken);
}

// Row `id` in bf16, [k]: a head may be the embedding, too.
static void weight_row(const svk_weights& w, long id, u16* out) {
  const long p = id / PANEL, column = id % PANEL, pairs = w.k / 2;
  if (w.kind == SVK_BF16) {
    const u32* words = (const u32*)w.packed + p * pairs * PANEL + column;
    for (long k = 0; k < pairs; k++) ((u32_of_row*)out)[k] = words[k * PANEL];
  } else if (w.kind == SVK_BF16_COMPACT) {
    const CompactPanel panel = CompactPanel::of(w, p);
    for (long k = 0; k < pairs; k++)
      ((u32_of_row*)out)[k] = svk_compact_word(panel.rows + k * SVK_COMPACT_ROW, column, panel.base);
    for (const svk_listed_word* one = panel.listed; one < panel.end; one++)
      if (one->word % PANEL == column) ((u32_of_row*)out)[one->word / PANEL] = one->value;
  } else {
    const bool bytes = w.kind == SVK_INT8_GROUPS;
    const u32* words = (const u32*)w.packed + p * (w.k / (bytes ? 4 : 8)) * PANEL + column;
    const u16* scales = (const u16*)w.scales + p * (w.k / GROUP) * PANEL + column;
    for (long i = 0; i < w.k; i += 16) {
      const u32 bits = (u32)scales[i / GROUP * PANEL] << 16;
      float step, values[16];
      memcpy(&step, &bits, 4);
      for (long j = i; j < i + 16; j++) {
        const u32 word = words[j / (bytes ? 4 : 8) * PANEL];
        const long shift = j % 4 * 8;
        values[j - i] = step * (bytes ? (int)(word >> shift & 255) - 128 : (int)(word >> (shift + (j & 4)) & 15) - 8);
      }
      store_bf16(out + i, load(values));
    }
  }
}

static int weight_rows(const svk_weights& w, const int64_t* ids, int64_t count, u16* out) {
  if (w.kind == SVK_INT8_CHANNEL) return SVK_BAD_ARGUMENT;
  for (long i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= w.n) return SVK_BAD_ARGUMENT;
    weight_row(w, ids[i], out + i * w.k);
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
