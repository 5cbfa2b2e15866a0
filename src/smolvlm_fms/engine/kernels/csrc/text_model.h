// The text model in one call. Decode: one row for each of several sequences. Prefill: many rows of one sequence.
#pragma once
#include "causal_attention.h"
#include "linear.h"
#include "norm.h"

namespace SVK_ISA {

// What a thread needs to know of its team.
struct Team {
  int thread, threads;
  Barrier* barrier;
  void wait() const { barrier->wait(threads); }
  Range of(long total) const { return share(total, thread, threads); }
};

SVK_INLINE long qkv_width(const svk_text_model& m) { return (m.heads + 2 * m.kv_heads) * m.d; }

SVK_INLINE const svk_weights* linears_of(const svk_layer& l, int i) {
  const svk_weights* all[] = {&l.qkv, &l.out, &l.gate_up, &l.down};
  return all[i];
}

// The largest panel scratch and input width over all linears.
SVK_INLINE long most_widened_words(const svk_text_model& m) {
  long most = widened_words(m.head);
  for (long l = 0; l < m.layers; l++)
    for (int i = 0; i < 4; i++) most = lmax(most, widened_words(*linears_of(m.layer[l], i)));
  return most;
}

// Row `id` of a packed head, which is the embedding too where the two are tied, in bf16.
static void head_row(const svk_weights& w, long id, long width, u16* out) {
  const long p = id / PANEL, column = id % PANEL, groups = w.k / GROUP;
  const u32* words = (const u32*)w.packed + column;
  if (w.kind == SVK_BF16) {
    for (long i = 0; i < width; i++) out[i] = (u16)(words[(p * (w.k / 2) + i / 2) * PANEL] >> (i % 2 * 16));
  } else if (w.kind == SVK_BF16_COMPACT) {
    const CompactPanel panel = CompactPanel::of(w, p);
    for (long i = 0; i < width; i++)
      out[i] = svk_compact_value(panel.rows + i / 2 * SVK_COMPACT_ROW, column / 16, column % 16 * 2 + i % 2, panel.base);
    for (const svk_listed_word* one = panel.listed; one < panel.end; one++)
      if (one->word % PANEL == column)
        for (long i = one->word / PANEL * 2, h = 0; h < 2 && i + h < width; h++) out[i + h] = (u16)(one->value >> 16 * h);
  } else {
    const bool bytes = w.kind == SVK_INT8_GROUPS;
    for (long i = 0; i < width; i += 16) {
      float values[16] = {};
      for (long j = i; j < lmin(i + 16, width); j++) {
        const u32 word = words[(p * groups * (bytes ? 8 : 4) + (bytes ? j / 4 : j / 8)) * PANEL];
        const u32 scale = (u32)((const u16*)w.scales)[(p * groups + j / GROUP) * PANEL + column] << 16;
        const int q = bytes ? (int)(word >> (j % 4 * 8) & 255) - 128 : (int)(word >> (j % 4 * 8 + j / 4 % 2 * 4) & 15) - 8;
        float step;
        memcpy(&step, &scale, 4);
        values[j - i] = (float)q * step;
      }
      store_bf16_n(out + i, load(values), width - i);
    }
  }
}

// x[rows] := embeddings * scale, in fp32, which the residual stream keeps. `room` holds one row.
SVK_INLINE void load_embeddings(const svk_text_model& m, const svk_step_args& a, float* x, long stride, Range rows,
                                u16* room) {
  for (long r = rows.begin; r < rows.end; r++) {
    const u16* from = a.hidden ? a.hidden + r * m.width : m.embeddings ? m.embeddings + a.ids[r] * m.width : room;
    if (from == room) head_row(m.head, a.ids[r], m.width, room);
    widen_row(from, m.width, x + r * stride);
    for (long i = 0; i < m.width; i += 16) {
      float* at = x + r * stride + i;
      store(at, mul(load(at), splat(m.embedding_scale)));
    }
  }
}

// The residual stream += residual_scale * linear.
SVK_INLINE Epilogue add_to(const svk_text_model& m, const svk_weights& w, float* x, long stride) {
  Epilogue e;
  e.bias = w.bias, e.scale = m.residual_scale, e.out_f32 = x, e.accumulate = true, e.stride = stride, e.outputs = w.n;
  return e;
}

SVK_INLINE Epilogue to_floats(const svk_weights& w, int64_t activation, float* out, long stride) {
  Epilogue e;
  e.bias = w.bias, e.activation = activation, e.out_f32 = out, e.stride = stride;
  e.outputs = activation == SVK_SWIGLU ? w.n / 2 : w.n;
  return e;
}

SVK_INLINE void store_bf16_row(const float* y, long width, u16* out) {
  for (long i = 0; i < width; i += 16) store_bf16_n(out + i, load(y + i), width - i);
}

}  // namespace SVK_ISA
