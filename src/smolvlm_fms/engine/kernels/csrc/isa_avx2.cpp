#define SVK_ISA svk_avx2
#include "simd_avx2.h"

#include "isa_table.h"

SVK_DEFINE_TABLE(svk_table_avx2, "avx2");
