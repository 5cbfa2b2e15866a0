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

typedef uint16_t __attribute__((may_alias)) svk_lane;  // half of a word
typedef uint32_t __attribute__((may_alias)) svk_two_lanes;

static inline uint32_t svk_swap_bytes(uint32_t lanes) { return (lanes & 0x00ff00ff) << 8 | (lanes >> 8 & 0x00ff00ff); }

// The word of one column of a row, or what stands for one that is listed.
static inline uint32_t svk_compact_word(const void* row, int64_t column, int base) {
  const svk_two_lanes* lanes = (const svk_two_lanes*)row;
  const uint32_t both = lanes[column / 32 * 16 + column % 16], codes = lanes[32 + column % 16] >> (column / 16 * 4);
  const uint32_t low = codes & 15, high = codes >> 16 & 15;
  const uint32_t exponents = (low ? base + low : 0) << 7 | (high ? base + high : 0) << 23;
  return ((column & 16 ? svk_swap_bytes(both) : both) & 0x807f807f) | exponents;
}
