// What every kernel shares: elementary functions on sixteen lanes, scratch memory, and how work is cut for threads.
#pragma once
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "svk.h"

namespace SVK_ISA {

typedef uint16_t u16;
typedef uint32_t u32;
// A row of bf16 read two at a time: rows need not start on four bytes, and the compiler is told that types alias.
typedef u32 __attribute__((may_alias, aligned(2))) u32_of_row;
typedef u32 __attribute__((may_alias, aligned(1))) u32_of_bytes;

constexpr long PANEL = 64;  // outputs of a linear, or keys, that are packed side by side
constexpr long GROUP = 32;  // inputs that share a scale

SVK_INLINE long lmin(long a, long b) { return a < b ? a : b; }
SVK_INLINE long lmax(long a, long b) { return a > b ? a : b; }
SVK_INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
SVK_INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }

// The share of one thread when `total` items are cut into `parts` runs of nearly equal length.
struct Range { long begin, end; };
SVK_INLINE Range share(long total, long part, long parts) { return {total * part / parts, total * (part + 1) / parts}; }

SVK_INLINE int threads_or_default(int64_t threads) { return threads > 0 ? (int)threads : omp_get_max_threads(); }

// Fresh memory of megabytes comes from the kernel with every call, and costs a fault a page: larger ones are asked for.
SVK_INLINE void prefer_huge_pages(void* memory, long bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
  if (memory && bytes > (4 << 20)) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Asks for `bytes` from p on: rows that lie far apart are nothing that the hardware foresees.
SVK_INLINE void expect_read(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) prefetch_near((const char*)p + i);
}
SVK_INLINE void expect_write(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) prefetch_to_write((const char*)p + i);
}

// Memory of one call, aligned to cache lines. Calls may run side by side, so each has its own; one block of megabytes
// outlives its call for the next one, because fresh memory is cleared page by page while both cores wait.
struct Scratch {
  char* base;
  explicit Scratch(long bytes) : base(nullptr) {
    char* block = bytes >= LEAST_KEPT ? __atomic_exchange_n(&kept(), (char*)nullptr, __ATOMIC_ACQ_REL) : nullptr;
    if (block && capacity(block) < bytes) free(block), block = nullptr;
    if (!block) {
      block = (char*)aligned_alloc(64, (size_t)round_up(bytes + 64, 64));
      prefer_huge_pages(block, bytes + 64);
      if (block) capacity(block) = bytes;
    }
    if (block) base = block + 64;
  }
  ~Scratch() {
    char* block = base ? base - 64 : nullptr;
    if (block && capacity(block) >= LEAST_KEPT && capacity(block) <= MOST_KEPT)
      block = __atomic_exchange_n(&kept(), block, __ATOMIC_ACQ_REL);
    free(block);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr long LEAST_KEPT = 1l << 62, MOST_KEPT = 0;  // a block that is too large would hide an overrun
#else
  static constexpr long LEAST_KEPT = 1 << 20, MOST_KEPT = 32 << 20;
#endif
  static long& capacity(char* block) { return *(long*)block; }
  static char*& kept() {
    static char* block = nullptr;
    return block;
  }
};

// Cuts aligned pieces from a scratch; with a null base it only measures.
struct Carver {
  char* base;
  long used = 0;
  template <class T> T* take(long count) {
    long at = used;
    used += round_up(count * (long)sizeof(T), 64);
    return base ? (T*)(base + at) : nullptr;
  }
};

// f(j, i) for i = 0, 16, ... below k, with j = 0, 1, 2, 3 in turns: sums of one row in four accumulators, so that an
// addition does not wait for the one before.
template <class F> SVK_INLINE void in_turns(long k, F&& f) {
  long i = 0;
  for (; i + 64 <= k; i += 64) f(0, i), f(1, i + 16), f(2, i + 32), f(3, i + 48);
  for (; i < k; i += 16) f(0, i);
}
SVK_INLINE float sum_of_four(const vf (&x)[4]) { return sum_lanes(add(add(x[0], x[1]), add(x[2], x[3]))); }

// 2^x to 3e-6; infinity from 128 on, and zero or 2^-126 below -126; NaN stays NaN.
SVK_INLINE vf exp2_of(vf x) {
  vf f = fraction(x);  // minimax polynomial on [0, 1]
  vf p = fmadd(splat(0.0134268f), f, splat(0.0522423f));
  p = fmadd(p, f, splat(0.2412803f));
  p = fmadd(p, f, splat(0.6930448f));
  p = fmadd(p, f, splat(1.0f));
  return times_exp2_floor(p, x);
}

// The same for the weights of a softmax: to 9e-5, a tenth of what their bf16 rounding leaves.
SVK_INLINE vf exp2_of_weight(vf x) {
  vf f = fraction(x);
  vf p = fmadd(splat(0.0770671f), f, splat(0.2276450f));
  p = fmadd(p, f, splat(0.6951168f));
  p = fmadd(p, f, splat(1.0f));
  return times_exp2_floor(p, x);
}

constexpr float LOG2_E = 1.44269504f;

// x / (1 + 2^y), a sigmoid of -y / log2(e) times x. Beyond 2^125 the divisor stays there.
SVK_INLINE vf gated(vf x, vf y) { return quotient(x, add(splat(1.0f), exp2_of(vmin(splat(125.0f), y)))); }

SVK_INLINE vf silu(vf x) { return gated(x, mul(x, splat(-LOG2_E))); }

// x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
SVK_INLINE vf gelu_tanh(vf x) {
  constexpr float twice = -2.0f * 0.7978845608f * LOG2_E;
  return gated(x, mul(x, fmadd(mul(x, x), splat(0.044715f * twice), splat(twice))));
}

// x sigmoid(1.702 x), CLIP's
SVK_INLINE vf quick_gelu(vf x) { return gated(x, mul(x, splat(-1.702f * LOG2_E))); }

}  // namespace SVK_ISA
