// svk_linear: prepares the activations, then shares the work.
#pragma once
#include "linear.h"

namespace SVK_ISA {

static Epilogue linear_epilogue(const svk_weights& w, const svk_linear_args& args) {
  Epilogue e;
  e.bias = w.bias, e.activation = args.activation, e.scale = args.scale, e.residual = args.residual;
  e.out = args.out, e.out_f32 = args.out_f32, e.stride = args.out_stride;
  e.outputs = args.activation == SVK_SWIGLU ? w.n / 2 : w.n;
  return e;
}

static int linear(const svk_weights& w, const svk_linear_args& args) {
  const int threads = threads_or_default(args.threads);
  const Epilogue e = linear_epilogue(w, args);
  const int64_t kind = row_kind(w, args.rows);
  const bool quantize = kind != SVK_BF16;
  const long row_floats = round_up(w.k, 64), panel_words = quantize ? 0 : widened_words(w);

  Rows rows;
  float* floats;
  u32* panels;
  auto carve = [&](Carver& from) {
    if (quantize) rows = Rows::carve(from, kind, args.rows, w.k);
    floats = from.take<float>(quantize ? threads * row_floats : 0);
    panels = from.take<u32>(threads * panel_words);
    return from.used;
  };
  Carver measure{nullptr};
  Scratch scratch(carve(measure));
  if (!scratch.base) return SVK_NO_MEMORY;
  Carver real{scratch.base};
  carve(real);
  if (!quantize) rows.bf16 = args.x, rows.stride = args.x_stride;

#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    if (quantize) {
      float* x = floats + thread * row_floats;
#pragma omp for schedule(static)
      for (long m = 0; m < args.rows; m++) {
        widen_row(args.x + m * args.x_stride, w.k, x);
        prepare_row(x, w.k, kind, rows, m);
      }
    }
    linear_part(w, rows, args.rows, thread, team, panels + thread * panel_words, e);
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
