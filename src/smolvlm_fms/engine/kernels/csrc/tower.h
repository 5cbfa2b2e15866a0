// svk_tower_blocks: one tile through a vision tower's blocks. One call: its buffers are made once, and threads meet at
// barriers instead of at the ends of parallel regions. The residual stream is fp32.
#pragma once
#include "int8_attention.h"
#include "text_model.h"

namespace SVK_ISA {

struct TowerRun {
  const svk_tower& m;
  const svk_tower_args& a;
  Team team;
  bool quantized;  // 8-bit weights: activations are rounded to 8 bits a row
  // Shared by the team; widths are padded to 64.
  float* x = nullptr;                                                        // [tokens][width]: the residual stream
  u16 *normed = nullptr, *qkv = nullptr, *attended = nullptr, *h = nullptr;  // [tokens][width, 3 width, width, ff]
  Rows rows = {};
  long* counters = nullptr;  // [layers] for attention's heads, then [layers][4][threads] for the linears
  // Each thread's own.
  float* y = nullptr;
  u32 *keys = nullptr, *values = nullptr;
  AttentionScratch scratch = {};
#ifdef SVK_INT8_ATTENTION
  QuantizedHead head8 = {};
#endif

  long x_stride() const { return round_up(m.width, 64); }
  long attended_width() const { return m.heads * m.d; }
  long attended_stride() const { return round_up(attended_width(), 64); }
  long h_stride() const { return round_up(m.ff, 64); }
  long widest() const { return lmax(lmax(x_stride(), h_stride()), attended_stride()); }

  long counter_count() const { return m.layers * (1 + 4 * team.threads); }

  void carve_shared(Carver& from) {
    x = from.take<float>(a.tokens * x_stride());
    normed = from.take<u16>(a.tokens * x_stride());
    qkv = from.take<u16>(a.tokens * 3 * attended_width());
    attended = from.take<u16>(a.tokens * attended_stride());
    h = from.take<u16>(a.tokens * h_stride());
    counters = from.take<long>(counter_count());
    if (quantized) rows = Rows::carve(from, SVK_INT8_CHANNEL, a.tokens, widest());
  }

  void carve_own(Carver& from) {
    y = from.take<float>(widest());
    keys = from.take<u32>(key_words(a.tokens, m.d));
    values = from.take<u32>(value_words(a.tokens, m.d));
    scratch = AttentionScratch::carve(from, a.tokens);
#ifdef SVK_INT8_ATTENTION
    if (quantized) head8 = QuantizedHead::carve(from, a.tokens, m.d);
#endif
  }

  static Rows of_bf16(const u16* in, long stride) {
    Rows r;
    r.bf16 = in, r.stride = stride;
    return r;
  }

  // Activations for linear w: the normed residual stream.
  Rows prepare_normed(const svk_weights& w, const float* weight, const float* bias) {
    Range mine = team.of(a.tokens);
    for (long r = mine.begin; r < mine.end; r++) {
      norm_row(x + r * x_stride(), m.width, weight, bias, m.eps, true, y);
      if (quantized) prepare_row(y, w.k, w.kind, rows, r);
      else for (long i = 0; i < round_up(m.width, 32); i += 16) store_bf16(normed + r * x_stride() + i, load(y + i));
    }
    team.wait();
    return quantized ? rows : of_bf16(normed, x_stride());
  }

  // What an earlier linear or the attention wrote as bf16, `width` values a row.
  Rows prepare_bf16(const svk_weights& w, const u16* in, long width, long stride) {
    if (!quantized) return of_bf16(in, stride);
    Range mine = team.of(a.tokens);
    for (long r = mine.begin; r < mine.end; r++) {
      const u16* row = in + r * stride;
      quantize_row8([=](long i) { return load_bf16_n(row + i, width - i); }, w.k, rows.q + r * rows.stride,
                    rows.scale + r, rows.sum + r);
    }
    team.wait();
    return rows;
  }

  // Linear `index` of a layer's four.
  void run_linear(long layer, int index, const svk_weights& w, const Rows& in, const Epilogue& e) {
    long* taken = counters + m.layers + (layer * 4 + index) * team.threads;
    linear_part(w, in, a.tokens, team.thread, team.threads, nullptr, e, taken);
    team.wait();
  }

  static Epilogue to_bf16(const svk_weights& w, int64_t activation, u16* out, long stride) {
    Epilogue e;
    e.bias = w.bias, e.activation = activation, e.out = out, e.stride = stride, e.outputs = w.n;
    return e;
  }

  Epilogue to_stream(const svk_weights& w) {
    Epilogue e;
    e.bias = w.bias, e.out_f32 = x, e.accumulate = true, e.stride = x_stride(), e.outputs = w.n;
    return e;
  }

  // With fewer heads than threads each head's queries are cut as well, and its keys are packed by each part.
  void attention(long layer) {
    svk_vision_attention_args args = {qkv, a.key_mask, attended, 1, a.tokens, m.heads, m.d, m.attention_scale,
                                      team.threads};
    const long parts = m.heads >= team.threads ? 1 : ceil_div(2 * team.threads, m.heads);
    for (long i; (i = next_item(counters + layer)) < m.heads * parts;) {
      Range tiles = share(ceil_div(a.tokens, TILE_ROWS), i % parts, parts);
      attend_head(args, i / parts, {tiles.begin * TILE_ROWS, lmin(tiles.end * TILE_ROWS, a.tokens)});
    }
    team.wait();
  }

  void attend_head(const svk_vision_attention_args& args, long head, Range mine) {
#ifdef SVK_INT8_ATTENTION
    if (quantized) {
      quantize_head(args, 0, head, head8);
      return int8_vision_rows(args, 0, head, mine, head8, attended_stride());
    }
#endif
    const long packed = pack_head(args, 0, head, keys, values);
    vision_rows(args, 0, head, mine, packed, keys, values, scratch, attended_stride());
  }

  void run_layer(long index) {
    const svk_tower_layer& l = m.layer[index];
    run_linear(index, 0, l.qkv, prepare_normed(l.qkv, l.attention_norm, l.attention_norm_bias),
               to_bf16(l.qkv, SVK_NONE, qkv, 3 * attended_width()));
    attention(index);
    run_linear(index, 1, l.out, prepare_bf16(l.out, attended, attended_width(), attended_stride()), to_stream(l.out));
    run_linear(index, 2, l.up, prepare_normed(l.up, l.mlp_norm, l.mlp_norm_bias),
               to_bf16(l.up, m.activation, h, h_stride()));
    run_linear(index, 3, l.down, prepare_bf16(l.down, h, m.ff, h_stride()), to_stream(l.down));
  }

  void run() {
    Range mine = team.of(a.tokens);
    for (long r = mine.begin; r < mine.end; r++) {
      widen_row(a.hidden + r * m.width, m.width, x + r * x_stride());
      // What pads the widths must be zeros.
      memset((void*)(h + r * h_stride() + m.ff), 0, (size_t)(h_stride() - m.ff) * 2);
      memset((void*)(attended + r * attended_stride() + attended_width()), 0,
             (size_t)(attended_stride() - attended_width()) * 2);
    }
    memset((void*)keys, 0, (size_t)key_words(a.tokens, m.d) * 4);  // keys and values past the last one are read
    memset((void*)values, 0, (size_t)value_words(a.tokens, m.d) * 4);
    for (long i = team.thread; i < counter_count(); i += team.threads) counters[i] = 0;
    team.wait();
    for (long l = a.first; l < a.last; l++) run_layer(l);
    for (long r = mine.begin; r < mine.end; r++) {
      const float* from = x + r * x_stride();
      for (long i = 0; i < m.width; i += 16) store_bf16_n(a.out + r * m.width + i, load(from + i), m.width - i);
    }
  }
};

static int tower_blocks(const svk_tower& m, const svk_tower_args& a) {
  const int threads = threads_or_default(a.threads);
  Barrier barrier;
  TowerRun plan = {m, a, {0, threads, &barrier}, m.layers > 0 && m.layer[0].qkv.kind == SVK_INT8_CHANNEL};
  Carver shared{nullptr}, own{nullptr};
  plan.carve_shared(shared), plan.carve_own(own);
  Scratch scratch(shared.used + threads * own.used);
  if (!scratch.base) return SVK_NO_MEMORY;
  Carver real{scratch.base};
  plan.carve_shared(real);
#pragma omp parallel num_threads(threads)
  {
    TowerRun mine = plan;
    mine.team.thread = omp_get_thread_num(), mine.team.threads = omp_get_num_threads();
    Carver piece{scratch.base + shared.used + mine.team.thread * own.used};
    mine.carve_own(piece);
    mine.run();
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
