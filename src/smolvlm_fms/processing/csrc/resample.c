/* Pillow's separable resize on 8-bit pixels, bit for bit, with the loops turned so that a compiler can vectorise them.

   Weights are integers of 22 fractional bits, as Pillow makes them; a pass multiplies, adds, shifts and clips to 0..255.
   The horizontal pass takes 16 rows at a time and lays them side by side, so that both passes are the same loop: one
   weight times a run of neighbouring bytes. Callers split rows among threads; nothing here allocates or locks.

   Plain C without intrinsics. On x86 with GCC or Clang every function is compiled for three instruction sets and the
   loader picks one. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define EXPORT __attribute__((visibility("default")))

enum { LANES = 16, RUN = 64, BITS = 22 };

static inline __attribute__((always_inline)) uint8_t clip(int32_t sum) {
    int32_t value = sum >> BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* One axis: output i is the sum over k < count[i] of weights[i * taps + k] times input first[i] + k. */
struct axis {
    const int32_t *first, *count, *weights;
    int64_t taps;
};

/* Rows [begin, end) of out, each the weighted sum of rows of in; row_bytes is the same for both. */
EXPORT EACH_CPU void svr_vertical(const uint8_t *in, uint8_t *out, int64_t row_bytes, const struct axis *axis,
                                  int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; y++) {
        const int32_t *weights = axis->weights + y * axis->taps;
        const uint8_t *top = in + axis->first[y] * row_bytes;
        uint8_t *row = out + y * row_bytes;
        int64_t x = 0;
        for (; x + RUN <= row_bytes; x += RUN) {
            int32_t sum[RUN];
            for (int i = 0; i < RUN; i++) sum[i] = 1 << (BITS - 1);
            for (int32_t k = 0; k < axis->count[y]; k++) {
                const uint8_t *source = top + k * row_bytes + x;
                int32_t weight = weights[k];
                for (int i = 0; i < RUN; i++) sum[i] += source[i] * weight;
            }
            for (int i = 0; i < RUN; i++) row[x + i] = clip(sum[i]);
        }
        for (; x < row_bytes; x++) {
            int32_t sum = 1 << (BITS - 1);
            for (int32_t k = 0; k < axis->count[y]; k++) sum += top[k * row_bytes + x] * weights[k];
            row[x] = clip(sum);
        }
    }
}

/* Eight words of eight bytes, turned so that byte i of word j becomes byte j of word i (little-endian). */
static inline __attribute__((always_inline)) void turn(uint64_t w[8]) {
    static const uint64_t masks[3] = {0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF};
    for (int stage = 0; stage < 3; stage++) {
        int step = 4 >> stage, bits = 32 >> stage;
        for (int i = 0; i < 8; i++) {
            if (i & step) continue;
            uint64_t swap = ((w[i] >> bits) ^ w[i + step]) & masks[stage];
            w[i + step] ^= swap;
            w[i] ^= swap << bits;
        }
    }
}

/* 16 rows of `bytes` to one row of `bytes` groups of 16; a short group of rows repeats its last one. */
static inline __attribute__((always_inline)) void gather_rows(const uint8_t *rows, int64_t count, int64_t bytes,
                                                              uint8_t *columns) {
    for (int64_t half = 0; half < LANES; half += 8) {
        const uint8_t *row[8];
        for (int64_t i = 0; i < 8; i++) row[i] = rows + (half + i < count ? half + i : count - 1) * bytes;
        int64_t x = 0;
        for (; x + 8 <= bytes; x += 8) {
            uint64_t block[8];
            for (int i = 0; i < 8; i++) memcpy(&block[i], row[i] + x, 8);
            turn(block);
            for (int i = 0; i < 8; i++) memcpy(columns + (x + i) * LANES + half, &block[i], 8);
        }
        for (; x < bytes; x++)
            for (int i = 0; i < 8; i++) columns[x * LANES + half + i] = row[i][x];
    }
}

/* The way back, for the first `count` rows. */
static inline __attribute__((always_inline)) void scatter_rows(const uint8_t *columns, int64_t count, int64_t bytes,
                                                               uint8_t *rows) {
    for (int64_t half = 0; half < count; half += 8) {
        int64_t present = count - half < 8 ? count - half : 8, x = 0;
        for (; x + 8 <= bytes; x += 8) {
            uint64_t block[8];
            for (int i = 0; i < 8; i++) memcpy(&block[i], columns + (x + i) * LANES + half, 8);
            turn(block);
            for (int64_t i = 0; i < present; i++) memcpy(rows + (half + i) * bytes + x, &block[i], 8);
        }
        for (; x < bytes; x++)
            for (int64_t i = 0; i < present; i++) rows[(half + i) * bytes + x] = columns[x * LANES + half + i];
    }
}

/* One group of 16 rows, laid side by side: a tap is `channels` * 16 neighbouring bytes. */
static inline __attribute__((always_inline)) void convolve(const uint8_t *columns, uint8_t *results, int64_t out_width,
                                                           const struct axis *axis, int64_t channels) {
    const int64_t run = channels * LANES;
    for (int64_t x = 0; x < out_width; x++) {
        const int32_t *weights = axis->weights + x * axis->taps;
        const uint8_t *start = columns + axis->first[x] * run;
        int32_t sum[4 * LANES];
        for (int64_t i = 0; i < run; i++) sum[i] = 1 << (BITS - 1);
        for (int32_t k = 0; k < axis->count[x]; k++) {
            const uint8_t *source = start + k * run;
            int32_t weight = weights[k];
            for (int64_t i = 0; i < run; i++) sum[i] += source[i] * weight;
        }
        for (int64_t i = 0; i < run; i++) results[x * run + i] = clip(sum[i]);
    }
}

/* Rows [begin, end) from in_width to out_width pixels of 1 or 3 bytes.
   scratch: (in_width + out_width) * channels * 16 bytes for each caller. */
EXPORT EACH_CPU void svr_horizontal(const uint8_t *in, uint8_t *out, int64_t in_width, int64_t out_width,
                                    int64_t channels, const struct axis *axis, int64_t begin, int64_t end,
                                    uint8_t *scratch) {
    int64_t in_bytes = in_width * channels, out_bytes = out_width * channels;
    uint8_t *columns = scratch, *results = scratch + in_bytes * LANES;
    for (int64_t y = begin; y < end; y += LANES) {
        int64_t rows = end - y < LANES ? end - y : LANES;
        gather_rows(in + y * in_bytes, rows, in_bytes, columns);
        if (channels == 3) convolve(columns, results, out_width, axis, 3);
        else convolve(columns, results, out_width, axis, 1);
        scatter_rows(results, rows, out_bytes, out + y * out_bytes);
    }
}

/* A tile of height x width x channels bytes (rows row_bytes apart) to channels x height x width floats, each byte
   looked up in its channel's table of 256. */
EXPORT EACH_CPU void svr_write(const uint8_t *in, int64_t row_bytes, float *out, int64_t height, int64_t width,
                               int64_t channels, const float *tables) {
    for (int64_t y = 0; y < height; y++) {
        const uint8_t *row = in + y * row_bytes;
        for (int64_t c = 0; c < channels; c++) {
            const float *table = tables + c * 256;
            float *target = out + (c * height + y) * width;
            for (int64_t x = 0; x < width; x++) target[x] = table[row[x * channels + c]];
        }
    }
}
