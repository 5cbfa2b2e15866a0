#define SVK_ISA svk_neon
#include "simd_neon.h"

#include "isa_table.h"

SVK_DEFINE_TABLE(svk_table_neon, "neon");
