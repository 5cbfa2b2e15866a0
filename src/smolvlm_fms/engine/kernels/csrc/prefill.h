// svk_prefill: consecutive rows of one sequence through the whole model, keys and values into the cache.
#pragma once
#include "text_model.h"

namespace SVK_ISA {

struct Prefill {
  const svk_text_model& m;
  const svk_cache& cache;
  const svk_step_args& a;
  Team team;
  // Shared by the team; widths are padded to 64.
  float* x = nullptr;                                                      // [rows][width]: the residual stream
  u16 *normed = nullptr, *qkv = nullptr, *attended = nullptr, *h = nullptr;  // [rows][width, qkv, heads * d, ff]
  long* counters = nullptr;  // [layers] for attention's tiles, then [layers][4][threads] for the linears
  // Each thread's own.
  float* y = nullptr;
  u32* panel = nullptr;
  Rows last = {};
  AttentionScratch scratch = {};

  long x_stride() const { return round_up(m.width, 64); }
  long attended_stride() const { return round_up(m.heads * m.d, 64); }
  long h_stride() const { return round_up(m.ff, 64); }

  long counter_count() const { return m.layers * (1 + 4 * team.threads); }

  void carve_shared(Carver& from) {
    x = from.take<float>(a.rows * x_stride());
    normed = from.take<u16>(a.rows * x_stride());
    qkv = from.take<u16>(a.rows * qkv_width(m));
    attended = from.take<u16>(a.rows * attended_stride());
    h = from.take<u16>(a.rows * h_stride());
    counters = from.take<long>(counter_count());
  }

  void carve_own(Carver& from) {
    y = from.take<float>(x_stride());
    panel = from.take<u32>(most_widened_words(m));
    last = Rows::carve_any(from, 1, x_stride());
    scratch = AttentionScratch::carve(from, a.positions[0] + a.rows);
  }

  void norm(const float* weight) {
    Range mine = team.of(a.rows);
    for (long r = mine.begin; r < mine.end; r++) {
      norm_row(x + r * x_stride(), m.width, weight, nullptr, m.eps, false, y);
      for (long i = 0; i < round_up(m.width, 32); i += 16) store_bf16(normed + r * x_stride() + i, load(y + i));
    }
    team.wait();
  }

  // Linear `index` of a layer's four.
  void run_linear(long layer, int index, const svk_weights& w, const u16* in, long in_stride, const Epilogue& e) {
    Rows rows;
    rows.bf16 = in, rows.stride = in_stride;
    long* taken = counters + m.layers + (layer * 4 + index) * team.threads;
    linear_part(w, rows, a.rows, team.thread, team.threads, panel, e, taken);
    team.wait();
  }

  static Epilogue to_bf16(const svk_weights& w, int64_t activation, u16* out, long stride) {
    Epilogue e = to_floats(w, activation, nullptr, stride);
    e.out = out;
    return e;
  }

  void attention(long layer) {
    svk_causal_attention_args args = {qkv, attended, a.rows, attended_stride(), m.heads, m.kv_heads, m.d, layer,
                                      a.starts[0], a.positions[0], m.attention_scale, team.threads};
    store_rows(cache, m.rope, args, team.thread, team.threads);
    team.wait();
    attend_rows(cache, m.rope, args, counters + layer, scratch);
    team.wait();
  }

  void run_layer(long index) {
    const svk_layer& l = m.layer[index];
    norm(l.attention_norm);
    run_linear(index, 0, l.qkv, normed, x_stride(), to_bf16(l.qkv, SVK_NONE, qkv, qkv_width(m)));
    attention(index);
    run_linear(index, 1, l.out, attended, attended_stride(), add_to(m, l.out, x, x_stride()));
    norm(l.mlp_norm);
    run_linear(index, 2, l.gate_up, normed, x_stride(), to_bf16(l.gate_up, SVK_SWIGLU, h, h_stride()));
    run_linear(index, 3, l.down, h, h_stride(), add_to(m, l.down, x, x_stride()));
  }

  // The last layer where nobody asks for all rows' hidden states: keys and values of every row, and the rest of the
  // layer for the last row alone, if its logits are wanted.
  void run_last_layer(long index) {
    const svk_layer& l = m.layer[index];
    const long last_row = a.rows - 1;
    norm(l.attention_norm);
    run_linear(index, 0, l.qkv, normed, x_stride(), to_bf16(l.qkv, SVK_NONE, qkv, qkv_width(m)));
    svk_causal_attention_args args = {qkv, attended, a.rows, attended_stride(), m.heads, m.kv_heads, m.d, index,
                                      a.starts[0], a.positions[0], m.attention_scale, team.threads};
    store_rows(cache, m.rope, args, team.thread, team.threads);
    team.wait();
    if (!a.logits) return;
    Attention attention(scratch);
    for (long head; (head = next_item(counters + index)) < m.heads;)
      attend_tile(cache, m.rope, args, head, last_row, 1, attention);
    attention.finish();
    team.wait();
    float* stream = x + last_row * x_stride();
    u16* features = h + last_row * h_stride();
    run_row(l.out, attended + last_row * attended_stride(), add_to(m, l.out, stream, x_stride()));
    norm_row(stream, m.width, l.mlp_norm, nullptr, m.eps, false, y);  // every thread for itself
    u16* mine = normed + team.thread * x_stride();
    for (long i = 0; i < round_up(m.width, 32); i += 16) store_bf16(mine + i, load(y + i));
    run_row(l.gate_up, mine, to_bf16(l.gate_up, SVK_SWIGLU, features, h_stride()));
    run_row(l.down, features, add_to(m, l.down, stream, x_stride()));
  }

  // bf16 activations also for quantised weights: the rows before them were computed so.
  void run_row(const svk_weights& w, const u16* in, const Epilogue& e) {
    Rows row;
    row.bf16 = in, row.stride = x_stride();
    linear_by_columns(w, row, 1, team.thread, team.threads, panel, e);
    team.wait();
  }

  // Logits of the last row only: a prompt asks for one next token.
  void last_logits() {
    norm_row(x + (a.rows - 1) * x_stride(), m.width, m.final_norm, nullptr, m.eps, false, y);
    const int64_t kind = row_kind(m.head, 1);
    prepare_row(y, m.head.k, kind, last, 0);
    if (kind != SVK_BF16) last.bf16 = nullptr;
    Epilogue e = to_floats(m.head, SVK_NONE, a.logits, m.head.n);
    e.scale = m.logits_scale;
    linear_by_columns(m.head, last, 1, team.thread, team.threads, panel, e);
  }

  void run() {
    Range mine = team.of(a.rows);
    load_embeddings(m, a, x, x_stride(), mine, nullptr);
    for (long r = mine.begin; r < mine.end; r++) {  // what pads the widths must be zeros
      memset((void*)(h + r * h_stride()), 0, (size_t)h_stride() * 2);
      memset((void*)(attended + r * attended_stride()), 0, (size_t)attended_stride() * 2);
    }
    for (long i = team.thread; i < counter_count(); i += team.threads) counters[i] = 0;
    team.wait();
    const bool whole = a.normed || team.threads > a.rows;  // run_last_layer keeps a row of `normed` for each thread
    for (long l = 0; l < m.layers - !whole; l++) run_layer(l);
    if (!whole) run_last_layer(m.layers - 1);
    if (a.logits) last_logits();
    if (!a.normed) return;
    norm(m.final_norm);
    for (long r = mine.begin; r < mine.end; r++)
      memcpy(a.normed + r * m.width, normed + r * x_stride(), (size_t)m.width * 2);
  }
};

static int prefill(const svk_text_model& m, const svk_cache& cache, const svk_step_args& a) {
  const int threads = threads_or_default(a.threads);
  Barrier barrier;
  Prefill plan = {m, cache, a, {0, threads, &barrier}};
  Carver shared{nullptr}, own{nullptr};
  plan.carve_shared(shared), plan.carve_own(own);
  Scratch scratch(shared.used + threads * own.used);
  if (!scratch.base) return SVK_NO_MEMORY;
  Carver real{scratch.base};
  plan.carve_shared(real);
#pragma omp parallel num_threads(threads)
  {
    Prefill mine = plan;
    mine.team.thread = omp_get_thread_num(), mine.team.threads = omp_get_num_threads();
    Carver piece{scratch.base + shared.used + mine.team.thread * own.used};
    mine.carve_own(piece);
    mine.run();
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
