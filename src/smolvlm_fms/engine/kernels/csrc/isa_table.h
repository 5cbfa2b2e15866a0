// The kernels of one instruction set. Each isa_*.cpp names its namespace and simd header and includes this file; it is
// compiled with that instruction set's flags, and nothing in it may come from a template of the standard library: the
// linker would keep one copy, perhaps the one that an older machine cannot run.
#pragma once
#include "svk.h"

struct svk_table {
  const char* name;
  int (*linear)(const svk_weights&, const svk_linear_args&);
  int (*vision_attention)(const svk_vision_attention_args&);
  int (*norm)(const svk_norm_args&);
  int (*causal_attention)(const svk_cache&, const svk_rope&, const svk_causal_attention_args&);
  int (*decode)(const svk_text_model&, const svk_cache&, const svk_step_args&);
  int (*prefill)(const svk_text_model&, const svk_cache&, const svk_step_args&);
  int (*tower_blocks)(const svk_tower&, const svk_tower_args&);
  int (*rows)(const svk_weights&, const int64_t*, int64_t, uint16_t*);
  long (*pack_compact_panel)(const uint32_t*, long, char*, int32_t*, svk_listed_word*, long);
};

const svk_table& svk_current_table();  // the one in use

#ifdef SVK_ISA
#include "decode.h"
#include "linear_call.h"
#include "prefill.h"
#include "tower.h"

#define SVK_DEFINE_TABLE(variable, isa_name) \
  extern const svk_table variable;           \
  const svk_table variable = {isa_name,                  SVK_ISA::linear, SVK_ISA::vision_attention, SVK_ISA::norm, \
                              SVK_ISA::causal_attention, SVK_ISA::decode, SVK_ISA::prefill, SVK_ISA::tower_blocks, \
                              SVK_ISA::weight_rows,      SVK_ISA::pack_compact_panel}
#endif
