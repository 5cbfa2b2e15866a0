#define SVK_ISA svk_avx512
#include "simd_avx512.h"

#include "isa_table.h"

SVK_DEFINE_TABLE(svk_table_avx512, "avx512");
