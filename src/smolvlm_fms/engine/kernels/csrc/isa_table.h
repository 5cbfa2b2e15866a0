// The kernels of one instruction set. Each isa_*.cpp names its namespace and simd header and includes this file; it is
// compiled with that instruction set's flags, and nothing in it may come from a template of the standard library: the
// linker would keep one copy, perhaps the one that an older machine cannot run.
#pragma once
#include "svk.h"

struct svk_table {
  const char* name;
  int (*linear)(const svk_weights&, const svk_linear_args&);
  int (*vision_attention)(const svk_vision_attention_args&);
};

#ifdef SVK_ISA
#include "linear_call.h"
#include "vision_attention.h"

#define SVK_DEFINE_TABLE(variable, isa_name) \
  extern const svk_table variable;           \
  const svk_table variable = {isa_name, SVK_ISA::linear, SVK_ISA::vision_attention}
#endif
