// The layout of SVK_BF16_COMPACT: bf16 weights in 12 bits, every bit of them kept. A panel's exponents are nearly all
// among fifteen neighbours, so a weight is stored as its sign, its seven bits of mantissa and a code of four bits; the few
// words with another exponent are listed and put back in their place.
//
// A row of a panel, two inputs of 64 outputs, is 128 weights, four vectors of 32 (16 outputs with two inputs each), in
// lanes of 16 bits: two vectors of lanes with sign and mantissa of two of those each, the second one's with its bytes
// swapped, in the other's free bits; then one of lanes with all four codes. Code 0 is the exponent 0, code c is base + c.
#pragma once
#include <stdint.h>

enum { SVK_COMPACT_ROW = 192, SVK_CODES = 16 };  // bytes, of 256 in a plain panel

static inline uint16_t svk_swap_bytes(uint16_t x) { return (uint16_t)(x << 8 | x >> 8); }

// The weight in lane `lane` of vector `vector` of a row.
static inline uint16_t svk_compact_value(const void* row, int64_t vector, int64_t lane, int base) {
  const uint16_t* lanes = (const uint16_t*)row;
  const uint16_t both = lanes[vector / 2 * 32 + lane], code = lanes[64 + lane] >> (4 * vector) & 15;
  return (uint16_t)(((vector & 1 ? svk_swap_bytes(both) : both) & 0x807f) | (code ? base + code : 0) << 7);
}
