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

// x[rows] := embeddings * scale, in fp32, which the residual stream keeps. `room` holds one row.
SVK_INLINE void load_embeddings(const svk_text_model& m, const svk_step_args& a, float* x, long stride, Range rows,
                                u16* room) {
  for (long r = rows.begin; r < rows.end; r++) {
    const u16* from = a.hidden ? a.hidden + r * m.width : m.embeddings ? m.embeddings + a.ids[r] * m.width : room;
    if (from == room) weight_row(m.head, a.ids[r], room);
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
