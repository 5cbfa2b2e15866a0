// svk_linear: prepares the activations, then shares the work by columns (few rows) or by rows and columns (many).
#pragma once
#include "linear.h"

namespace SVK_ISA {

// From this many rows on, group-quantised weights are widened to bf16 a panel at a time.
constexpr long WIDEN_FROM_ROWS = 12;

struct LinearPlan {
  bool quantize, widen, by_columns;
  long row_parts, column_parts;
};

static LinearPlan plan_linear(const svk_weights& w, long rows, int threads) {
  LinearPlan plan;
  plan.widen = w.kind >= SVK_INT8_GROUPS && rows >= WIDEN_FROM_ROWS;
  plan.quantize = w.kind != SVK_BF16 && !plan.widen;
  const long tiles = ceil_div(rows, TILE_ROWS);
  plan.by_columns = !plan.widen && tiles < 4 * threads;
  // As many runs of rows as keep each at four tiles or more; the threads left over cut the panels.
  plan.row_parts = lmax(1, lmin(threads, tiles / 4));
  while (threads % plan.row_parts) plan.row_parts--;
  plan.column_parts = threads / plan.row_parts;
  return plan;
}

static Epilogue linear_epilogue(const svk_weights& w, const svk_linear_args& args) {
  Epilogue e;
  e.bias = w.bias, e.activation = args.activation, e.scale = args.scale, e.residual = args.residual;
  e.out = args.out, e.out_f32 = args.out_f32, e.stride = args.out_stride;
  e.outputs = args.activation == SVK_SWIGLU ? w.n / 2 : w.n;
  return e;
}

static int linear(const svk_weights& w, const svk_linear_args& args) {
  const int threads = threads_or_default(args.threads);
  const LinearPlan plan = plan_linear(w, args.rows, threads);
  const Epilogue e = linear_epilogue(w, args);

  const long row_floats = round_up(w.k, 64), panel_words = plan.widen ? PANEL * (w.k / 2) : 0;
  Rows rows;
  auto carve = [&](Carver& from, float*& floats, u32*& panels) {
    if (plan.quantize) rows = Rows::carve(from, w.kind, args.rows, w.k);
    floats = from.take<float>(plan.quantize ? threads * row_floats : 0);
    panels = from.take<u32>(threads * panel_words);
    return from.used;
  };
  float* floats;
  u32* panels;
  Carver measure{nullptr};
  Scratch scratch(carve(measure, floats, panels));
  if (!scratch.base) return SVK_NO_MEMORY;
  Carver real{scratch.base};
  carve(real, floats, panels);
  if (!plan.quantize) rows.bf16 = args.x, rows.stride = args.x_stride;

#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    if (plan.quantize) {
#pragma omp for schedule(static)
      for (long m = 0; m < args.rows; m++) {
        float* x = floats + thread * row_floats;
        widen_row(args.x + m * args.x_stride, w.k, x);
        prepare_row(x, w.k, w.kind, rows, m);
      }
    }
    if (plan.by_columns) {
      linear_by_columns(w, rows, args.rows, thread, team, e);
    } else {
      const long parts = plan.row_parts * plan.column_parts;
      for (long part = thread; part < parts; part += team) {  // a smaller team than asked for still does it all
        Range tiles = share(ceil_div(args.rows, TILE_ROWS), part % plan.row_parts, plan.row_parts);
        Range mine = {tiles.begin * TILE_ROWS, lmin(tiles.end * TILE_ROWS, args.rows)};
        Range columns = share(ceil_div(w.n, PANEL), part / plan.row_parts, plan.column_parts);
        linear_by_rows(w, rows, mine, columns, plan.widen ? panels + thread * panel_words : nullptr, e);
      }
    }
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
