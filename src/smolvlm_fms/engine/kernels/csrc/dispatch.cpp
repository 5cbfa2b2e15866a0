// The exported functions: each calls the best instruction set that this machine has. Compiled without special flags.
#include <string.h>

#include <atomic>

#if defined(SVK_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(SVK_ARM)
#include <sys/auxv.h>
#endif

#include "isa_table.h"

extern const svk_table svk_table_portable;
#ifdef SVK_X86
extern const svk_table svk_table_avx2, svk_table_avx512;
#endif
#ifdef SVK_ARM
extern const svk_table svk_table_neon;
#endif

namespace {

#ifdef SVK_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(SVK_ARM) && defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return !sysctlbyname(feature, &value, &size, nullptr, 0) && value;
}
bool has_neon() { return has("hw.optional.arm.FEAT_BF16") && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(SVK_ARM)
bool has_neon() {
  constexpr unsigned long i8mm = 1 << 13, bf16 = 1 << 14;  // older headers do not name them
  return (getauxval(AT_HWCAP2) & (i8mm | bf16)) == (i8mm | bf16);
}
#endif

// The named table, or the best one for null; null where this machine cannot run it.
const svk_table* find_table(const char* name) {
#ifdef SVK_X86
  if ((!name || !strcmp(name, "avx512")) && has_avx512()) return &svk_table_avx512;
  if ((!name || !strcmp(name, "avx2")) && has_avx2()) return &svk_table_avx2;
#endif
#ifdef SVK_ARM
  if ((!name || !strcmp(name, "neon")) && has_neon()) return &svk_table_neon;
#endif
  return !name || !strcmp(name, "portable") ? &svk_table_portable : nullptr;
}

std::atomic<const svk_table*> chosen{nullptr};

const svk_table& table() { return svk_current_table(); }

}  // namespace

const svk_table& svk_current_table() {
  const svk_table* t = chosen.load(std::memory_order_relaxed);
  if (!t) chosen.store(t = find_table(nullptr), std::memory_order_relaxed);
  return *t;
}

extern "C" {

const char* svk_isa(void) { return table().name; }

int svk_set_isa(const char* name) {
  const svk_table* t = find_table(name);
  if (!t) return SVK_BAD_ARGUMENT;
  chosen.store(t, std::memory_order_relaxed);
  return SVK_OK;
}

int svk_linear(const svk_weights* w, const svk_linear_args* args) { return table().linear(*w, *args); }
int svk_rows(const svk_weights* w, const int64_t* ids, int64_t count, uint16_t* out) {
  return table().rows(*w, ids, count, out);
}
int svk_vision_attention(const svk_vision_attention_args* args) { return table().vision_attention(*args); }
int svk_norm(const svk_norm_args* args) { return table().norm(*args); }
int svk_causal_attention(const svk_cache* cache, const svk_rope* rope, const svk_causal_attention_args* args) {
  return table().causal_attention(*cache, *rope, *args);
}
int svk_tower_blocks(const svk_tower* tower, const svk_tower_args* args) { return table().tower_blocks(*tower, *args); }
int svk_decode(const svk_text_model* m, const svk_cache* cache, const svk_step_args* args) {
  return table().decode(*m, *cache, *args);
}
int svk_prefill(const svk_text_model* m, const svk_cache* cache, const svk_step_args* args) {
  return table().prefill(*m, *cache, *args);
}
}
