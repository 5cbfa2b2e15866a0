// svk_decode: one token for each of a few sequences, the whole model in one call. At one row it moves every weight once
// and is bound by memory; five barriers a layer are all that is left between the threads.
#pragma once
#include "text_model.h"

namespace SVK_ISA {

// Keys that one item of attention looks at. Items are cut alike whatever the batch and the threads, and sums are formed
// alike for one row and for many, so that a row's answer never depends on its neighbours.
constexpr long PART_KEYS = 256;

struct Decode {
  const svk_text_model& m;
  const svk_cache& cache;
  const svk_step_args& a;
  Team team;
  long splits;  // parts of PART_KEYS keys that the longest sequence has
  bool solo;    // each thread prepares activations for itself
  // Shared by the team.
  float *x = nullptr, *qkv = nullptr, *h = nullptr;  // [rows][width, qkv, ff], each padded to 64
  long* best = nullptr;                              // [threads][rows]
  float *part_out = nullptr, *part_max = nullptr, *part_sum = nullptr;  // [rows][heads][splits], out with [d16] more
  long* counters = nullptr;                                             // attention items handed out, one a layer
  // Each thread's own.
  Rows rows = {};            // activations of the linear at hand; shared unless `solo`
  float* y = nullptr;        // one row of the widest input
  u32* panel = nullptr;      // room to widen a panel of compact weights in
  AttentionScratch scratch = {};

  long x_stride() const { return round_up(m.width, 64); }
  long qkv_stride() const { return round_up(qkv_width(m), 64); }
  long h_stride() const { return round_up(m.ff, 64); }
  long widest() const { return round_up(lmax(lmax(m.width, m.ff), m.heads * m.d), 64); }
  long d16() const { return padded_d(m.d); }

  void carve_shared(Carver& from) {
    x = from.take<float>(a.rows * x_stride());
    qkv = from.take<float>(a.rows * qkv_stride());
    h = from.take<float>(a.rows * h_stride());
    part_out = from.take<float>(a.rows * m.heads * splits * d16());
    part_max = from.take<float>(a.rows * m.heads * splits);
    part_sum = from.take<float>(a.rows * m.heads * splits);
    counters = from.take<long>(m.layers);
    best = from.take<long>(team.threads * a.rows);
    if (!solo) rows = Rows::carve_any(from, a.rows, widest());
  }

  void carve_own(Carver& from) {
    if (solo) rows = Rows::carve_any(from, a.rows, widest());
    y = from.take<float>(widest());
    panel = from.take<u32>(most_widened_words(m));
    scratch = AttentionScratch::carve(from, PART_KEYS);
  }

  // Activations for linear w: fill(r, y) writes row r as floats. Alone each thread prepares its own copy, which is
  // quicker than a barrier; with more rows they share.
  template <class Fill> Rows prepare(const svk_weights& w, Fill&& fill) {
    Range mine = solo ? Range{0, a.rows} : team.of(a.rows);
    for (long r = mine.begin; r < mine.end; r++) {
      fill(r, y);
      prepare_row(y, w.k, w.kind, rows, r);
    }
    if (!solo) team.wait();
    Rows of_kind = rows;
    if (w.kind != SVK_BF16 && w.kind != SVK_BF16_COMPACT) of_kind.bf16 = nullptr;  // never widened
    return of_kind;
  }

  Rows prepare_normed(const svk_weights& w, const float* weight) {
    return prepare(w, [&](long r, float* to) {
      norm_row(x + r * x_stride(), m.width, weight, nullptr, m.eps, false, to);
    });
  }

  void run_linear(const svk_weights& w, const Rows& in, const Epilogue& e) {
    linear_by_columns(w, in, a.rows, team.thread, team.threads, panel, e);
    team.wait();
  }

  // Row r, the queries that share key-value head kv, one part of the keys. The part that holds the new position stores
  // its key and value first.
  void attend_part(long layer, long r, long kv, long split) {
    const long position = a.positions[r], group = m.heads / m.kv_heads;
    const long begin = split * PART_KEYS, end = lmin(begin + PART_KEYS, position + 1);
    if (begin >= end) return;
    const float* row = qkv + r * qkv_stride();
    Store s = store_of(cache, layer, kv, a.starts[r], m.d);
    if (end == position + 1) {
      u16 key[256], value[256];
      rotate(m.rope, row + (m.heads + kv) * m.d, m.d, position, key);
      store_bf16_row(row + (m.heads + m.kv_heads + kv) * m.d, m.d, value);
      pack_key(key, m.d, s.keys, position);
      pack_value(value, m.d, s.values, position);
    }
    long visible[TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; i++) visible[i] = position + 1;
    for (long first = 0; first < group; first += TILE_ROWS) {
      const int count = (int)lmin(TILE_ROWS, group - first);
      const long head = kv * group + first, at = (r * m.heads + head) * splits + split;
      u16 queries[TILE_ROWS * 256];
      for (int i = 0; i < count; i++) rotate(m.rope, row + (head + i) * m.d, m.d, position, queries + i * 256);
      float largest[TILE_ROWS], sum[TILE_ROWS];
      Head h = {queries, 256, s.keys, s.values, m.d, m.attention_scale};
      with_rows<TILE_ROWS>(count, [&](auto count_const) {
        attend<decltype(count_const)::value>(h, begin, end, visible, scratch, part_out + at * d16(), splits * d16(),
                                             largest, sum);
      });
      for (int i = 0; i < count; i++) part_max[at + i * splits] = largest[i], part_sum[at + i * splits] = sum[i];
    }
  }

  // Joins the parts of row r: [heads * d] floats.
  void join_parts(long r, float* to) {
    const long parts = a.positions[r] / PART_KEYS + 1;
    for (long h = 0; h < m.heads; h++) {
      const long at = (r * m.heads + h) * splits;
      float top = part_max[at], total = 0.0f, *head = to + h * m.d;
      for (long s = 1; s < parts; s++) top = part_max[at + s] > top ? part_max[at + s] : top;
      for (long s = 0; s < parts; s++) {
        const float factor = __builtin_exp2f(part_max[at + s] - top);
        total += factor * part_sum[at + s];
        for (long i = 0; i < m.d; i += 16) {
          vf before = s ? load_n(head + i, m.d - i) : zero();
          store_n(head + i, fmadd(load(part_out + (at + s) * d16() + i), splat(factor), before), m.d - i);
        }
      }
      for (long i = 0; i < m.d; i++) head[i] /= total;
    }
    for (long i = m.heads * m.d; i % 32; i++) to[i] = 0.0f;
  }

  void attention(long layer) {
    const long items = a.rows * m.kv_heads * splits;
    for (long i; (i = next_item(counters + layer)) < items;)
      attend_part(layer, i / (m.kv_heads * splits), i / splits % m.kv_heads, i % splits);
    team.wait();
  }

  void run_layer(long index) {
    const svk_layer& l = m.layer[index];
    run_linear(l.qkv, prepare_normed(l.qkv, l.attention_norm), to_floats(l.qkv, SVK_NONE, qkv, qkv_stride()));
    attention(index);
    Rows joined = prepare(l.out, [&](long r, float* to) { join_parts(r, to); });
    run_linear(l.out, joined, add_to(m, l.out, x, x_stride()));
    run_linear(l.gate_up, prepare_normed(l.gate_up, l.mlp_norm), to_floats(l.gate_up, SVK_SWIGLU, h, h_stride()));
    Rows features = prepare(l.down, [&](long r, float* to) {
      for (long i = 0; i < round_up(m.ff, 32); i += 16) store(to + i, load(h + r * h_stride() + i));
    });
    run_linear(l.down, features, add_to(m, l.down, x, x_stride()));
  }

  void run() {
    Range mine = team.of(a.rows);
    load_embeddings(m, a, x, x_stride(), mine, (u16*)y);
    for (long r = mine.begin; r < mine.end; r++) memset(h + r * h_stride(), 0, (size_t)h_stride() * 4);
    for (long l = team.thread; l < m.layers; l += team.threads) counters[l] = 0;
    team.wait();
    for (long l = 0; l < m.layers; l++) run_layer(l);
    if (a.normed)
      for (long r = mine.begin; r < mine.end; r++) {
        norm_row(x + r * x_stride(), m.width, m.final_norm, nullptr, m.eps, false, y);
        store_bf16_row(y, m.width, a.normed + r * m.width);
      }
    if (!a.logits) return;
    Epilogue e = to_floats(m.head, SVK_NONE, a.logits, m.head.n);
    e.scale = m.logits_scale;
    run_linear(m.head, prepare_normed(m.head, m.final_norm), e);
    choose();
  }

  // Bans tokens, and finds each row's largest logit: every thread looks at what is likely in its own cache.
  void choose() {
    const Range mine = team.of(m.head.n);
    for (long r = 0; r < a.rows; r++) {
      float* logits = a.logits + r * m.head.n;
      for (long i = 0; i < a.banned_count; i++)
        if (a.banned[i] >= mine.begin && a.banned[i] < mine.end) logits[a.banned[i]] = -__builtin_inff();
      if (a.best) best[team.thread * a.rows + r] = first_largest(logits, mine);
    }
    if (!a.best) return;
    team.wait();
    if (team.thread) return;
    for (long r = 0; r < a.rows; r++) {
      const float* logits = a.logits + r * m.head.n;
      long found = best[r];
      for (long t = 1; t < team.threads; t++) {
        const long other = best[t * a.rows + r];
        if (other >= 0 && (found < 0 || logits[other] > logits[found])) found = other;
      }
      a.best[r] = lmax(0, found);
    }
  }

  // -1 where there is none: an empty range, or no numbers.
  static long first_largest(const float* logits, Range range) {
    vf top = splat(-__builtin_inff());
    long i = range.begin;
    for (; i + 16 <= range.end; i += 16) top = vmax(load(logits + i), top);
    float largest = max_lanes(top);
    for (; i < range.end; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (i = range.begin; i < range.end; i++)
      if (logits[i] == largest) return i;
    return -1;
  }
};

static int decode(const svk_text_model& m, const svk_cache& cache, const svk_step_args& a) {
  const int threads = threads_or_default(a.threads);
  Barrier barrier;
  long longest = 0;
  for (long r = 0; r < a.rows; r++) longest = lmax(longest, a.positions[r] + 1);
  Decode plan = {m, cache, a, {0, threads, &barrier}, ceil_div(longest, PART_KEYS), a.rows < threads};
  Carver shared{nullptr}, own{nullptr};
  plan.carve_shared(shared), plan.carve_own(own);
  Scratch scratch(shared.used + threads * own.used);
  if (!scratch.base) return SVK_NO_MEMORY;
  Carver real{scratch.base};
  plan.carve_shared(real);
#pragma omp parallel num_threads(threads)
  {
    Decode mine = plan;
    mine.team.thread = omp_get_thread_num(), mine.team.threads = omp_get_num_threads();
    Carver piece{scratch.base + shared.used + mine.team.thread * own.used};
    mine.carve_own(piece);
    mine.run();
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
