// Packing: a transposition at the speed of memory, the same on every instruction set; compact panels by its kernels.
#include <string.h>

#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <omp.h>

#include "compact_format.h"
#include "isa_table.h"

namespace {

constexpr int64_t PANEL = 64, LINE = 16;  // outputs side by side; words of a cache line

// Fresh memory in pages of 2 MB where the system has them: an eighth of the time goes into faults otherwise, and a
// decode step, which reads all weights, looks up fewer addresses.
void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
  if (end > begin) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: where it is refused, so be it
#else
  (void)memory, (void)bytes;
#endif
}

// Words [first, first + LINE) of a row of k values; beyond its end zeros.
void read_line(const uint16_t* row, int64_t k, int64_t first, uint32_t* words) {
  if (row && 2 * (first + LINE) <= k) {
    memcpy(words, row + 2 * first, sizeof(uint32_t) * LINE);
    return;
  }
  memset(words, 0, sizeof(uint32_t) * LINE);
  if (row) memcpy(words, row + 2 * first, (size_t)(k - 2 * first) * 2);
}

void pack_panel(const uint16_t* const* rows, int64_t k, uint32_t* panel) {
  const int64_t width = (k + 1) / 2;
  for (int64_t first = 0; first < width; first += LINE) {
    uint32_t words[PANEL][LINE + 1];  // one more: a column of it then touches every set of the cache
    for (int64_t r = 0; r < PANEL; r++) read_line(rows[r], k, first, words[r]);
    const int64_t count = width - first < LINE ? width - first : LINE;
    for (int64_t i = 0; i < count; i++) {
      uint32_t* out = panel + (first + i) * PANEL;
      for (int64_t r = 0; r < PANEL; r++) out[r] = words[r][i];
    }
  }
}

}  // namespace

extern "C" int svk_pack_bf16(const uint16_t* const* rows, int64_t n, int64_t k, uint32_t* packed, int64_t threads) {
  if (n % PANEL || k < 1 || threads < 1) return SVK_BAD_ARGUMENT;
  const int64_t words = (k + 1) / 2 * PANEL;
  prefer_huge_pages(packed, n / PANEL * words * 4);
#pragma omp parallel for schedule(static) num_threads((int)threads)
  for (int64_t p = 0; p < n / PANEL; p++) pack_panel(rows + p * PANEL, k, packed + p * words);
  return SVK_OK;
}

extern "C" int64_t svk_pack_bf16_compact(const uint16_t* const* rows, int64_t n, int64_t k, char* packed,
                                         int32_t* listed, int64_t threads) {
  if (n % PANEL || k < 1 || threads < 1) return SVK_BAD_ARGUMENT;
  const int64_t panels = n / PANEL, pairs = (k + 1) / 2, room = pairs / 2 + 1;  // of 128 weights a pair: one in 256
  int32_t *bases = listed, *first = bases + panels;
  svk_listed_word* words = (svk_listed_word*)(first + panels + 1);
  std::unique_ptr<uint32_t[]> plain(new (std::nothrow) uint32_t[(size_t)(threads * pairs * PANEL)]);
  std::unique_ptr<int64_t[]> count(new (std::nothrow) int64_t[(size_t)panels]);
  if (!plain || !count) return SVK_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads((int)threads)
  for (int64_t p = 0; p < panels; p++) {
    uint32_t* panel = plain.get() + omp_get_thread_num() * pairs * PANEL;
    pack_panel(rows + p * PANEL, k, panel);
    count[p] = svk_current_table().pack_compact_panel(panel, pairs, packed + p * pairs * SVK_COMPACT_ROW, bases + p,
                                                      words + p * room, room);
  }
  int64_t used = 0;
  for (int64_t p = 0; p < panels; p++) {
    if (count[p] < 0) return SVK_BAD_ARGUMENT;
    memmove(words + used, words + p * room, (size_t)count[p] * sizeof *words);
    first[p] = (int32_t)used, used += count[p];
  }
  first[panels] = (int32_t)used;
  return (int32_t*)(words + used) - listed;
}
