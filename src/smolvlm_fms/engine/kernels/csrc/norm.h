// RMSNorm and LayerNorm of rows, and svk_norm.
#pragma once
#include "rows.h"

namespace SVK_ISA {

// out = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, the mean being zero for RMSNorm. x holds k floats
// and zeros up to a multiple of 32; so does out, which may be x.
SVK_INLINE void norm_row(const float* x, long k, const float* weight, const float* bias, float eps, bool subtract_mean,
                         float* out) {
  float mean = 0.0f;
  if (subtract_mean) {
    vf total[4] = {zero(), zero(), zero(), zero()};
    in_turns(k, [&](int j, long i) { total[j] = add(total[j], load(x + i)); });
    mean = sum_of_four(total) / (float)k;
  }
  vf squares[4] = {zero(), zero(), zero(), zero()}, shift = splat(-mean);
  const long whole = k / 16 * 16;
  in_turns(whole, [&](int j, long i) {
    const vf centred = add(load(x + i), shift);
    squares[j] = fmadd(centred, centred, squares[j]);
  });
  if (whole < k) {
    const vf centred = keep_first(add(load(x + whole), shift), k - whole, zero());
    squares[0] = fmadd(centred, centred, squares[0]);
  }
  vf inverse = splat(1.0f / __builtin_sqrtf(sum_of_four(squares) / (float)k + eps));
  for (long i = 0; i < round_up(k, 32); i += 16) {
    vf y = mul(mul(add(load(x + i), shift), inverse), load_n(weight + i, k - i));
    if (bias) y = add(y, load_n(bias + i, k - i));
    store(out + i, y);
  }
}

static int norm(const svk_norm_args& a) {
  const int threads = threads_or_default(a.threads);
  const long floats = round_up(a.width, 64);
  Scratch scratch(threads * floats * 4);
  if (!scratch.base) return SVK_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    float* x = (float*)scratch.base + omp_get_thread_num() * floats;
#pragma omp for schedule(static)
    for (long m = 0; m < a.rows; m++) {
      widen_row(a.x + m * a.x_stride, a.width, x);
      norm_row(x, a.width, a.weight, a.bias, a.eps, a.subtract_mean, x);
      for (long i = 0; i < a.width; i += 16) store_bf16_n(a.out + m * a.width + i, load(x + i), a.width - i);
    }
  }
  return SVK_OK;
}

}  // namespace SVK_ISA
