/* Pillow's separable resize on 8-bit pixels, bit for bit, with the loops turned so that a compiler can vectorise them.

   Weights are integers of 22 fractional bits, as Pillow makes them; a pass multiplies, adds, shifts and clips to 0..255.
   The horizontal pass takes 32 rows at a time and lays them side by side, so that both passes are the same loop: one
   weight times a run of neighbouring bytes. Callers split rows among threads; nothing here allocates or locks.

   C with GCC's and Clang's vectors, without intrinsics. On x86 with GCC every function is compiled for three
   instruction sets and the loader picks one; Clang 14 gives such functions other names, so it compiles one. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define EXPORT __attribute__((visibility("default")))

enum { VECTOR = 32, LANES = VECTOR, RUN = 2 * VECTOR, BITS = 22 };

/* Registers as the compiler has them: two or four for one of these where 32 bytes are too many. */
typedef uint32_t words __attribute__((vector_size(VECTOR)));
typedef int32_t ints __attribute__((vector_size(VECTOR)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));

/* One axis: output i is the sum over k < count[i] of weights[i * taps + k] times input first[i] + k. */
struct axis {
    const int32_t *first, *count, *weights;
    int64_t taps;
};

static inline __attribute__((always_inline)) uint8_t clip(int32_t sum) {
    int32_t value = sum >> BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* sums[j] += weight times byte j of each of eight words: shifts and masks widen bytes without moving them. */
static inline __attribute__((always_inline)) void add_bytes(words sums[4], const uint8_t *from, uint32_t weight) {
    words bytes;
    memcpy(&bytes, from, VECTOR);
    sums[0] += (bytes & 255) * weight;
    sums[1] += (bytes >> 8 & 255) * weight;
    sums[2] += (bytes >> 16 & 255) * weight;
    sums[3] += (bytes >> 24) * weight;
}

static inline __attribute__((always_inline)) void put_bytes(const words sums[4], uint8_t *to) {
    words bytes = {0};
    for (int j = 0; j < 4; j++) {
        ints value = (ints)sums[j] >> BITS; /* -512 ... 511 */
        value &= ~(value >> 31);
        value |= (255 - value) >> 31;
        bytes |= (words)(value & 255) << 8 * j;
    }
    memcpy(to, &bytes, VECTOR);
}

/* Rows [begin, end) of out, each the weighted sum of rows of in; row_bytes is the same for both. */
EXPORT EACH_CPU void svr_vertical(const uint8_t *in, uint8_t *out, int64_t row_bytes, const struct axis *axis,
                                  int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; y++) {
        const int32_t *weights = axis->weights + y * axis->taps;
        const uint8_t *top = in + axis->first[y] * row_bytes;
        uint8_t *row = out + y * row_bytes;
        int64_t x = 0;
        for (; x + RUN <= row_bytes; x += RUN) {
            words sums[2][4];
            for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = (words){0} + (1u << (BITS - 1));
            const uint8_t *from = top + x;
            for (int32_t k = 0; k < axis->count[y]; k++, from += row_bytes)
                for (int i = 0; i < 2; i++) add_bytes(sums[i], from + i * VECTOR, (uint32_t)weights[k]);
            for (int i = 0; i < 2; i++) put_bytes(sums[i], row + x + i * VECTOR);
        }
        for (; x < row_bytes; x++) {
            int32_t sum = 1 << (BITS - 1);
            for (int32_t k = 0; k < axis->count[y]; k++) sum += top[k * row_bytes + x] * weights[k];
            row[x] = clip(sum);
        }
    }
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bytes16){__VA_ARGS__})
#endif

/* Sixteen vectors of sixteen bytes, turned so that byte i of vector j becomes byte j of vector i: interleaving the
   first eight with the last eight moves every byte a quarter of the way. */
static inline __attribute__((always_inline)) void turn(bytes16 v[16]) {
    for (int stage = 0; stage < 4; stage++) {
        bytes16 w[16];
        for (int i = 0; i < 8; i++) {
            w[2 * i] = SHUFFLE(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            w[2 * i + 1] = SHUFFLE(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(v, w, sizeof w);
    }
}

/* LANES rows of `bytes` to one row of `bytes` groups of LANES; a short group of rows repeats its last one. */
static inline __attribute__((always_inline)) void gather_rows(const uint8_t *rows, int64_t count, int64_t bytes,
                                                              uint8_t *columns) {
    for (int64_t part = 0; part < LANES; part += 16) {
        const uint8_t *row[16];
        for (int64_t i = 0; i < 16; i++) row[i] = rows + (part + i < count ? part + i : count - 1) * bytes;
        int64_t x = 0;
        for (; x + 16 <= bytes; x += 16) {
            bytes16 block[16];
            for (int i = 0; i < 16; i++) memcpy(&block[i], row[i] + x, 16);
            turn(block);
            for (int i = 0; i < 16; i++) memcpy(columns + (x + i) * LANES + part, &block[i], 16);
        }
        for (; x < bytes; x++)
            for (int i = 0; i < 16; i++) columns[x * LANES + part + i] = row[i][x];
    }
}

/* The way back, for the first `count` rows. */
static inline __attribute__((always_inline)) void scatter_rows(const uint8_t *columns, int64_t count, int64_t bytes,
                                                               uint8_t *rows) {
    for (int64_t part = 0; part < count; part += 16) {
        int64_t present = count - part < 16 ? count - part : 16, x = 0;
        for (; x + 16 <= bytes; x += 16) {
            bytes16 block[16];
            for (int i = 0; i < 16; i++) memcpy(&block[i], columns + (x + i) * LANES + part, 16);
            turn(block);
            for (int64_t i = 0; i < present; i++) memcpy(rows + (part + i) * bytes + x, &block[i], 16);
        }
        for (; x < bytes; x++)
            for (int64_t i = 0; i < present; i++) rows[(part + i) * bytes + x] = columns[x * LANES + part + i];
    }
}

/* One group of rows, laid side by side: a tap is `channels` * LANES neighbouring bytes. */
static inline __attribute__((always_inline)) void convolve(const uint8_t *columns, uint8_t *results, int64_t out_width,
                                                           const struct axis *axis, int64_t channels) {
    const int64_t run = channels * LANES;
    for (int64_t x = 0; x < out_width; x++) {
        const int32_t *weights = axis->weights + x * axis->taps;
        const uint8_t *source = columns + axis->first[x] * run;
        words sums[3][4];
        for (int i = 0; i < 4 * channels; i++) sums[i / 4][i % 4] = (words){0} + (1u << (BITS - 1));
        for (int32_t k = 0; k < axis->count[x]; k++, source += run)
            for (int c = 0; c < channels; c++) add_bytes(sums[c], source + c * VECTOR, (uint32_t)weights[k]);
        for (int c = 0; c < channels; c++) put_bytes(sums[c], results + x * run + c * VECTOR);
    }
}

/* `count` rows from in_width to out_width pixels of 1 or 3 bytes.
   scratch: (in_width + out_width) * channels * LANES bytes for each caller. */
EXPORT EACH_CPU void svr_horizontal(const uint8_t *in, uint8_t *out, int64_t in_width, int64_t out_width,
                                    int64_t channels, const struct axis *axis, int64_t count, uint8_t *scratch) {
    int64_t in_bytes = in_width * channels, out_bytes = out_width * channels;
    uint8_t *columns = scratch, *results = scratch + in_bytes * LANES;
    for (int64_t y = 0; y < count; y += LANES) {
        int64_t rows = count - y < LANES ? count - y : LANES;
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
