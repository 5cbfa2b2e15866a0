#define SVK_ISA svk_portable
#include "simd_portable.h"

#include "isa_table.h"

SVK_DEFINE_TABLE(svk_table_portable, "portable");
