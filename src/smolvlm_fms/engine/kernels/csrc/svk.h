// The C ABI of the CPU kernels. Plain pointers and numbers: no torch headers, so one library serves every torch.
// bf16 is passed as uint16_t. Strides and sizes count elements. Functions return 0, or a negative SVK_* error.
//
// Packed weights. A linear of n outputs and k inputs is cut into panels of 64 outputs (the last one padded with zeros):
//   SVK_BF16          uint32 [panels][k/2][64]   two consecutive inputs of one output: k even in the low half
//   SVK_INT8_CHANNEL  uint32 [panels][k/4][64]   four consecutive inputs, each stored as unsigned q + 128
//   SVK_INT8_GROUPS   the same bytes
//   SVK_INT4_GROUPS   uint32 [panels][k/8][64]   inputs 0..3 in the low nibbles of the bytes, 4..7 in the high, q + 8
//   SVK_BF16_COMPACT  192 bytes [panels][k/2]     the words of SVK_BF16 in 12 bits a weight: compact_format.h
// Scales: float [panels*64] for _CHANNEL, bf16 [panels][k/32][64] for _GROUPS. k is padded with zeros to 2, 4 or 32.
// In their place _COMPACT has int32: [panels] bases of exponents, [panels + 1] first listed words, svk_listed_word [...].
// A SwiGLU linear holds 32 gate outputs and then their 32 up outputs in each panel; n counts both.
//
// Keys and values. One layer and head has blocks of 64 positions one after another:
//   keys    uint32 [blocks][d/2][64]    64 positions side by side, so that scores are an outer product
//   values  uint32 [blocks][32][d16]    two consecutive positions in one word; d16 is d rounded up to 16
// A sequence owns a run of blocks; its `start` is the cache position, a multiple of 64, of its position 0.
#pragma once
#include <stdint.h>

#define SVK_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { SVK_BF16 = 0, SVK_INT8_CHANNEL = 1, SVK_INT8_GROUPS = 2, SVK_INT4_GROUPS = 3, SVK_BF16_COMPACT = 4 };
enum { SVK_NONE = 0, SVK_GELU_TANH = 1, SVK_SWIGLU = 2, SVK_QUICK_GELU = 3 };
enum { SVK_OK = 0, SVK_NO_MEMORY = -1, SVK_BAD_ARGUMENT = -2 };

typedef struct {
  uint32_t word, value;  // its place in a panel of SVK_BF16, and what stands there
} svk_listed_word;

typedef struct {
  int64_t kind;
  int64_t n, k;        // outputs (unpadded), inputs (padded as above)
  const void* packed;
  const void* scales;  // or null for bf16
  const float* bias;   // [panels*64] in the order of the packed outputs, or null
} svk_weights;

typedef struct {
  const uint16_t* x;  // [rows, k]
  int64_t rows, x_stride;
  int64_t activation;
  float scale;               // out = residual + scale * activation(x W^T + bias)
  const uint16_t* residual;  // [rows, outputs], stride out_stride, or null; may be `out` itself
  uint16_t* out;             // [rows, outputs]; outputs = n, or n / 2 for SwiGLU
  float* out_f32;            // instead of `out`: fp32 results
  int64_t out_stride;
  int64_t threads;
} svk_linear_args;

typedef struct {
  const uint16_t* qkv;      // [batch, tokens, 3, heads, d]
  const uint8_t* key_mask;  // [batch, tokens], 0 where a key is left out, or null
  uint16_t* out;            // [batch, tokens, heads, d]; zeros where no key is left
  int64_t batch, tokens, heads, d;
  float scale;
  int64_t threads;
} svk_vision_attention_args;

typedef struct {
  const uint16_t* x;    // [rows, width]
  const float* weight;  // [width]
  const float* bias;    // [width] or null
  uint16_t* out;        // [rows, width]
  int64_t rows, width, x_stride;
  int64_t subtract_mean;  // 1: LayerNorm, 0: RMSNorm
  float eps;
  int64_t threads;
} svk_norm_args;

typedef struct {
  uint32_t *keys, *values;
  int64_t key_layer, key_head, value_layer, value_head;  // strides in words
  int64_t tokens;                                        // positions in all
} svk_cache;

typedef struct {
  const float *cos, *sin;  // [positions, d/2]
  int64_t interleaved;     // 1: pairs (2i, 2i+1), as FMS has them; 0: pairs (i, i + d/2), as transformers has them
} svk_rope;

typedef struct {
  const uint16_t* qkv;  // [rows, (heads + 2 kv_heads) d], queries, keys, values; before the rotation
  uint16_t* out;        // [rows, heads d]
  int64_t rows, out_stride, heads, kv_heads, d;
  int64_t layer, start, position;  // of the first row; the others follow, and earlier positions are in the cache
  float scale;
  int64_t threads;
} svk_causal_attention_args;

typedef struct {
  svk_weights qkv, out, gate_up, down;  // gate_up as SwiGLU panels
  const float *attention_norm, *mlp_norm;
} svk_layer;

typedef struct {
  int64_t layers, width, heads, kv_heads, d, ff;
  const svk_layer* layer;
  const float* final_norm;
  const uint16_t* embeddings;  // [vocabulary, width], or null: the head's rows
  svk_weights head;
  svk_rope rope;
  float eps, attention_scale, embedding_scale, residual_scale, logits_scale;
} svk_text_model;

typedef struct {
  const uint16_t* hidden;              // [rows, width] embeddings; or null, in decode: those of `ids`
  const int64_t *positions, *starts;   // [rows]; prefill reads the first of each
  float* logits;                       // [rows, vocabulary]; prefill: of the last row; or null
  uint16_t* normed;                    // [rows, width] after the final norm, or null (prefill then skips what only
                                       // the other rows' last hidden states would need)
  int64_t rows, threads;
  const int64_t* ids;                  // [rows]
  const int64_t* banned;               // tokens whose logits decode sets to -infinity, banned_count of them
  int64_t banned_count;
  int64_t* best;                       // [rows], decode: where each row's largest logit is, the first of equals; or null
} svk_step_args;

typedef struct {
  svk_weights qkv, out, up, down;  // up carries the activation
  const float *attention_norm, *attention_norm_bias, *mlp_norm, *mlp_norm_bias;  // LayerNorms, [width]
} svk_tower_layer;

typedef struct {
  int64_t layers, width, heads, d, ff, activation;
  const svk_tower_layer* layer;
  float eps, attention_scale;
} svk_tower;

typedef struct {
  const uint16_t* hidden;   // [tokens, width]
  uint16_t* out;            // [tokens, width], after the layers [first, last); before any final norm
  const uint8_t* key_mask;  // [tokens], 0 where a key is left out, or null
  int64_t tokens, first, last, threads;
} svk_tower_args;

SVK_EXPORT const char* svk_isa(void);                // the instruction set in use: "avx512", "avx2", "neon" or "portable"
SVK_EXPORT int svk_set_isa(const char* name);        // for tests; SVK_BAD_ARGUMENT where this machine cannot run it
// Packs n rows of k bf16 values, row i at rows[i] (null: zeros), into SVK_BF16 panels at `packed`. n is a multiple of 64.
SVK_EXPORT int svk_pack_bf16(const uint16_t* const* rows, int64_t n, int64_t k, uint32_t* packed, int64_t threads);
// The same into SVK_BF16_COMPACT: `packed`, and into `listed` what weights have as `scales`, in the end cut to the answer,
// a number of int32. SVK_BAD_ARGUMENT also where a panel has more words to list than one for 256 weights; `listed` has
// room for 2 panels + 1 + 2 * panels * (k/2/2 + 1) int32.
SVK_EXPORT int64_t svk_pack_bf16_compact(const uint16_t* const* rows, int64_t n, int64_t k, char* packed,
                                         int32_t* listed, int64_t threads);
// Rows `ids` of weights as bf16, [count][k]: an embedding that is tied to them. Not of SVK_INT8_CHANNEL.
SVK_EXPORT int svk_rows(const svk_weights*, const int64_t* ids, int64_t count, uint16_t* out);
SVK_EXPORT int svk_linear(const svk_weights*, const svk_linear_args*);
SVK_EXPORT int svk_vision_attention(const svk_vision_attention_args*);
SVK_EXPORT int svk_norm(const svk_norm_args*);
// Rotates and stores the rows' keys and values, then lets each row attend to its position and all before.
SVK_EXPORT int svk_causal_attention(const svk_cache*, const svk_rope*, const svk_causal_attention_args*);
// Blocks of a vision tower on one tile.
SVK_EXPORT int svk_tower_blocks(const svk_tower*, const svk_tower_args*);
// The whole text model: rows of different sequences (decode), or consecutive rows of one (prefill).
SVK_EXPORT int svk_decode(const svk_text_model*, const svk_cache*, const svk_step_args*);
SVK_EXPORT int svk_prefill(const svk_text_model*, const svk_cache*, const svk_step_args*);

#ifdef __cplusplus
}
#endif
