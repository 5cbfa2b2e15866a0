// Every instruction set that this machine can run against the portable kernels: the same calls of the exported
// functions, at sizes that fill no vector, tile, panel or group. Answers 1 where one differs by more than its bound, or
// where there is nothing to compare. scripts/neon-kernels builds and runs it.
//
// Bounds are shares of the answers' standard deviation s; a bf16 answer may be one bf16 step off besides, because the
// least difference decides how a value between two steps is rounded.
//   linears     Both sides add the same exact products in another order: k roundings of 2^-24 (2^-23 where BFDOT rounds
//               to odd) of partial sums that are at most some s, with random signs: sqrt(k) 2^-23 s and, for the worst
//               of thousands of answers, four times that. Activations add 2^-20: quotients are exact to 2^-22.
//   norms       fp32 and no long sums: 2^-20.
//   attention   Weights are rounded to bf16, either way: 2^-9 of the answer for one that dominates.
//   models      Intermediates are rounded to bf16, any of them one step off, which is 2^-7 of itself: 2^-5 for the few
//               that come together. A tower of 8-bit weights rounds to 2^-7 of a row's largest value, some 3 s, and on
//               AVX-512 its attention is another algorithm, a hundredth off (docs/performance.md): 2^-4.
// Products below 2^-126 are zeros in BFDOT and in AVX-512's vdpbf16ps: rows of denormals may miss k of those.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "svk.h"

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using std::string;
using std::vector;

long ceil_div(long a, long b) { return (a + b - 1) / b; }

float widen(u16 h) {
  const u32 bits = (u32)h << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

u16 narrow(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return (u16)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::mt19937 generator;

float normal() { return std::normal_distribution<float>()(generator); }

vector<float> normals(long count, float mean, float deviation) {
  vector<float> all((size_t)count);
  for (float& x : all) x = mean + deviation * normal();
  return all;
}

vector<u16> bf16_normals(long count) {
  vector<u16> all((size_t)count);
  for (u16& x : all) x = narrow(normal());
  return all;
}

vector<uint8_t> random_mask(long count) {
  vector<uint8_t> mask((size_t)count);
  for (uint8_t& m : mask) m = generator() % 4 != 0;
  return mask;
}

void require(bool fine, const string& what) {
  if (fine) return;
  printf("%s failed\n", what.c_str());
  exit(1);
}

// --- Comparing

struct Answer {
  vector<float> fp32;
  vector<u16> bf16;
};

struct Bound {
  double share;         // of the standard deviation
  double absolute = 0;
  long row = 0;         // values that have a standard deviation of their own; 0: all together
};

string isa;
long failures = 0;
std::map<string, double> worst;  // the largest share of a bound that was used, for each group of checks

double deviation(const float* x, long count) {
  double sum = 0, squares = 0;
  long finite = 0;
  for (long i = 0; i < count; i++)
    if (isfinite(x[i])) sum += x[i], squares += (double)x[i] * x[i], finite++;
  return finite ? sqrt(fmax(0, squares / finite - sum / finite * (sum / finite))) : 0;
}

// The distance to the next bf16 number.
double bf16_step(double x) { return ldexp(1, std::max(-126, x == 0 ? -126 : ilogb(x)) - 7); }

void compare(const string& group, const string& what, const vector<float>& want, const vector<float>& got, bool bf16,
             const Bound& bound) {
  const long row = bound.row ? bound.row : (long)want.size();
  double largest = 0, s = 0;
  for (long i = 0; i < (long)want.size(); i++) {
    if (i % row == 0) s = deviation(&want[i], row);
    const bool finite = isfinite(want[i]) && isfinite(got[i]);
    const double apart = finite ? fabs((double)want[i] - got[i]) : 0;
    double allowed = bound.share * s + bound.absolute;
    if (bf16 && finite) allowed += bf16_step(fmax(fabs(want[i]), fabs(got[i])));
    const bool same = finite ? apart <= allowed : want[i] == got[i] || (isnan(want[i]) && isnan(got[i]));
    if (apart > 0) largest = fmax(largest, apart / allowed);
    if (same) continue;
    if (failures++ < 40)
      printf("%s, %s: value %ld is %g instead of %g: %g apart, the bound is %g (standard deviation %g)\n", isa.c_str(),
             what.c_str(), i, got[i], want[i], apart, allowed, s);
    break;
  }
  double& before = worst[group + (bf16 ? ", bf16" : ", fp32")];
  before = fmax(before, largest);
}

template <class Call> void check(const string& group, const string& what, const Bound& bound, Call&& call) {
  require(svk_set_isa("portable") == SVK_OK, "portable");
  const Answer want = call();
  require(svk_set_isa(isa.c_str()) == SVK_OK, isa);
  const Answer got = call();
  auto wide = [](const vector<u16>& all) {
    vector<float> x;
    for (u16 h : all) x.push_back(widen(h));
    return x;
  };
  if (!want.fp32.empty()) compare(group, group + " " + what, want.fp32, got.fp32, false, bound);
  if (!want.bf16.empty()) compare(group, group + " " + what, wide(want.bf16), wide(got.bf16), true, bound);
}

// --- Linears

const vector<string> KINDS = {"bf16", "int8_channel", "int8", "int4", "bf16_compact"};
const vector<string> ACTIVATIONS = {"none", "gelu_tanh", "swiglu", "quick_gelu"};

vector<u16> bf16_matrix(long n, long k) {
  vector<u16> matrix;
  for (float x : normals(n * k, 0, 1 / sqrtf((float)k)))  // some far outside the compact form's codes
    matrix.push_back(narrow(generator() % 3000 ? x : x * 1e-20f));
  return matrix;
}

struct Weights {
  long kind, n, k, panels;
  vector<u32> packed, scales;
  vector<float> bias;

  Weights(long kind_, long n_, long inputs, bool biased) : kind(kind_), n(n_) {
    const long multiple[] = {2, 4, 32, 32, 2};
    k = ceil_div(inputs, multiple[kind]) * multiple[kind], panels = ceil_div(n, 64);
    if (biased) bias = normals(panels * 64, 0, 0.5f);
    if (kind == SVK_BF16 || kind == SVK_BF16_COMPACT) pack(bf16_matrix(n, k));
    else draw();
  }

  void draw() {  // values of all sizes, and scales that make the answers' deviation one
    const bool four = kind == SVK_INT4_GROUPS;
    packed.resize((size_t)(panels * 64 * k / (four ? 8 : 4)));
    for (u32& word : packed) word = (u32)generator();
    const long per_panel = kind == SVK_INT8_CHANNEL ? 64 : k / 32 * 64;
    for (long i = 0; i < panels * per_panel; i++) {  // uniform values have a deviation of 74 and of 4.6
      const float spread = 0.75f + 0.5f * (float)(generator() % 1000) / 1000;
      const float scale = spread / ((four ? 4.6f : 74.0f) * sqrtf((float)k));
      u32 bits;
      memcpy(&bits, &scale, 4);
      if (kind == SVK_INT8_CHANNEL) scales.push_back(bits);
      else if (i % 2 == 0) scales.push_back(narrow(scale));
      else scales.back() |= (u32)narrow(scale) << 16;
    }
  }

  void pack(const vector<u16>& matrix) {
    vector<const u16*> rows((size_t)(panels * 64), nullptr);
    for (long i = 0; i < n; i++) rows[i] = &matrix[i * k];
    if (kind == SVK_BF16) {
      packed.resize((size_t)(panels * 32 * k));
      return require(svk_pack_bf16(rows.data(), panels * 64, k, packed.data(), 1) == SVK_OK, "svk_pack_bf16");
    }
    packed.resize((size_t)(panels * 24 * k)), scales.resize((size_t)(2 * panels + 1 + 2 * panels * (k / 4 + 1)));
    char* panel = (char*)packed.data();
    const long used = svk_pack_bf16_compact(rows.data(), panels * 64, k, panel, (int32_t*)scales.data(), 1);
    require(used > 0, "svk_pack_bf16_compact");
    scales.resize((size_t)used);
  }

  svk_weights view() const {
    return {kind, n, k, packed.data(), scales.empty() ? nullptr : scales.data(), bias.empty() ? nullptr : bias.data()};
  }
};

struct LinearCall {
  long rows, activation;
  float scale = 1;
  bool residual = false, fp32 = false;
  long x_padding = 0, out_padding = 0;
};

Answer run_linear(const Weights& w, const LinearCall& c, const vector<u16>& x, const vector<u16>& residual) {
  const long outputs = c.activation == SVK_SWIGLU ? w.n / 2 : w.n, stride = outputs + c.out_padding;
  const size_t size = (size_t)(c.rows * stride);
  Answer answer;  // ones stay where nothing belongs
  if (c.fp32) answer.fp32.assign(size, 1.0f);
  else answer.bf16.assign(size, narrow(1.0f));
  const svk_weights weights = w.view();
  const svk_linear_args args = {x.data(), c.rows, w.k + c.x_padding, c.activation, c.scale,
                                c.residual ? residual.data() : nullptr, c.fp32 ? nullptr : answer.bf16.data(),
                                c.fp32 ? answer.fp32.data() : nullptr, stride, 0};
  require(svk_linear(&weights, &args) == SVK_OK, "svk_linear");
  return answer;
}

double linear_share(long k) { return 4 * sqrt((double)k) * ldexp(1, -23) + ldexp(1, -20); }

void check_linears() {
  for (long kind = SVK_BF16; kind <= SVK_BF16_COMPACT; kind++)
    for (auto [n, inputs] : {std::pair<long, long>{64, 64}, {130, 70}, {34, 33}, {322, 192}})
      for (long activation = SVK_NONE; activation <= SVK_QUICK_GELU; activation++) {
        const Weights plain(kind, n, inputs, false), biased(kind, n, inputs, true);
        for (long rows = 1; rows <= 100; rows += rows < 33 ? n > 300 ? 3 : 1 : 67)
          for (bool fp32 : {false, true}) {
            LinearCall c = {rows, activation, rows & 1 ? 1.0f : 0.5f, (rows & 2) != 0, fp32, 3, 5};
            const Weights& w = rows & 4 ? plain : biased;
            const vector<u16> x = bf16_normals(rows * (w.k + 3)), residual = bf16_normals(rows * (n + 5));
            check("svk_linear " + KINDS[kind],
                  std::to_string(n) + " x " + std::to_string(w.k) + ", " + std::to_string(rows) + " rows, " +
                      ACTIVATIONS[activation] + (w.bias.empty() ? "" : ", bias") + (c.residual ? ", residual" : ""),
                  {linear_share(w.k)}, [&] { return run_linear(w, c, x, residual); });
          }
      }
}

// Rows of a width: infinity and NaN in one place, denormals, negative zeros, and ordinary ones between.
vector<u16> extreme_rows(long rows, long width) {
  vector<u16> x = bf16_normals(rows * width);
  for (long i = 0; i < width; i++) x[3 * width + i] = narrow(1e-40f * normal()), x[4 * width + i] = 0x8000;
  x[width + 3] = narrow(INFINITY), x[2 * width + 5] = narrow(NAN), x[6 * width + 1] = narrow(-INFINITY);
  return x;
}

void check_extreme_values() {
  constexpr double least = 1.1754944e-38;  // 2^-126
  for (long kind = SVK_BF16; kind <= SVK_BF16_COMPACT; kind++)
    for (long activation = SVK_NONE; activation <= SVK_QUICK_GELU; activation++)
      for (long rows : {7, 14, 40})
        for (bool fp32 : {false, true}) {
          const Weights w(kind, 70, 64, false);
          const vector<u16> x = extreme_rows(rows, w.k);
          const long outputs = activation == SVK_SWIGLU ? 35 : 70;
          const string what = std::to_string(rows) + " rows, " + ACTIVATIONS[activation];
          const Bound bound = {linear_share(w.k), (double)w.k * least, outputs};
          check("svk_linear " + KINDS[kind] + " with extreme values", what, bound,
                [&] { return run_linear(w, {rows, activation, 1, false, fp32}, x, {}); });
        }
  for (bool subtract_mean : {false, true}) {
    const vector<float> weight = normals(70, 1, 0.2f);
    const vector<u16> x = extreme_rows(9, 70);
    check("svk_norm with extreme values", subtract_mean ? "LayerNorm" : "RMSNorm", {ldexp(1, -20), least, 70}, [&] {
      Answer answer = {{}, vector<u16>(9 * 70)};
      const svk_norm_args args = {x.data(), weight.data(), nullptr,       answer.bf16.data(), 9, 70,
                                  70,       subtract_mean, 1e-5f,         0};
      require(svk_norm(&args) == SVK_OK, "svk_norm");
      return answer;
    });
  }
  const long d = 24, row = 3 * 2 * d;  // tokens of two heads; a NaN in the first one's values
  for (int place : {0, 1, 2}) {
    vector<u16> qkv = bf16_normals(40 * row);
    for (long i = 0; i < row; i++) qkv[3 * row + i] = 0x8000, qkv[4 * row + i] = narrow(1e-40f);
    qkv[7 * row + place * 2 * d] = narrow(NAN);
    const Bound bound = {ldexp(1, -9), least, d};
    check("svk_vision_attention with extreme values", "NaN in place " + std::to_string(place), bound, [&] {
      Answer answer = {{}, vector<u16>((size_t)(40 * 2 * d))};
      const svk_vision_attention_args args = {qkv.data(), nullptr, answer.bf16.data(), 1, 40, 2, d, 0.2f, 0};
      require(svk_vision_attention(&args) == SVK_OK, "svk_vision_attention");
      return answer;
    });
  }
}

void check_packing() {  // not a bit may differ
  for (long k : {2, 34, 192}) {
    const vector<u16> matrix = bf16_matrix(130, k);
    check("svk_pack_bf16_compact", std::to_string(k), {0}, [&] {
      Weights w(SVK_BF16_COMPACT, 130, k, false);
      w.pack(matrix);
      Answer answer;
      for (const vector<u32>* words : {&w.packed, &w.scales})
        for (u32 word : *words)
          answer.fp32.push_back((float)(word & 0xffff)), answer.fp32.push_back((float)(word >> 16));
      vector<u16> rows((size_t)(3 * k));
      const int64_t ids[] = {0, 77, 129};
      const svk_weights view = w.view();
      require(svk_rows(&view, ids, 3, rows.data()) == SVK_OK, "svk_rows");
      for (u16 value : rows) answer.fp32.push_back(value);
      return answer;
    });
  }
}

// --- Norms and attention

void check_norms() {
  for (long width : {28, 33, 70, 571})
    for (long rows : {1, 5, 18})
      for (int variant = 0; variant < 4; variant++) {
        const vector<u16> x = bf16_normals(rows * (width + 5));
        const vector<float> weight = normals(width, 1, 0.2f), bias = normals(width, 0, 1);
        check("svk_norm", std::to_string(rows) + " x " + std::to_string(width), {ldexp(1, -20)}, [&] {
          Answer answer = {{}, vector<u16>((size_t)(rows * width))};
          const svk_norm_args args = {x.data(), weight.data(), variant & 1 ? bias.data() : nullptr,
                                      answer.bf16.data(), rows, width, width + 5, variant >> 1, 1e-5f, 0};
          require(svk_norm(&args) == SVK_OK, "svk_norm");
          return answer;
        });
      }
}

void check_vision_attention() {
  struct Case { long batch, tokens, heads, d; };
  const Case cases[] = {{1, 1, 1, 16},   {2, 63, 3, 48}, {1, 64, 2, 72},
                        {1, 131, 3, 64}, {3, 16, 1, 22}, {1, 33, 2, 128}};
  for (const Case& c : cases)
    for (int masked : {0, 1, 2}) {
      const vector<u16> qkv = bf16_normals(c.batch * c.tokens * 3 * c.heads * c.d);
      vector<uint8_t> mask = random_mask(c.batch * c.tokens);
      if (masked == 2) std::fill_n(mask.begin(), c.tokens, 0);  // nothing is left of the first picture
      const string what = std::to_string(c.batch) + " x " + std::to_string(c.tokens) + ", head of " +
                          std::to_string(c.d) + (masked ? ", masked" : "");
      check("svk_vision_attention", what, {ldexp(1, -9)}, [&] {
        Answer answer = {{}, vector<u16>((size_t)(c.batch * c.tokens * c.heads * c.d), 1)};
        const svk_vision_attention_args args = {qkv.data(), masked ? mask.data() : nullptr, answer.bf16.data(), c.batch,
                                                c.tokens, c.heads, c.d, 1 / sqrtf((float)c.d), 0};
        require(svk_vision_attention(&args) == SVK_OK, "svk_vision_attention");
        return answer;
      });
    }
}

// Angles of every position, and a cache full of NaN: what was not written must not be read.
struct Past {
  vector<float> cos, sin;
  vector<u32> keys, values;
  svk_rope rope;
  svk_cache cache;

  Past(long layers, long kv_heads, long d, long tokens, long positions, bool interleaved) {
    for (long p = 0; p < positions; p++)
      for (long i = 0; i < d / 2; i++) {
        const double angle = (double)p * pow(100, -2.0 * (double)i / (double)d);
        cos.push_back((float)::cos(angle)), sin.push_back((float)::sin(angle));
      }
    const long key_head = tokens * (d / 2), value_head = tokens / 2 * (ceil_div(d, 16) * 16);
    keys.assign((size_t)(layers * kv_heads * key_head), 0x7fc07fc0);
    values.assign((size_t)(layers * kv_heads * value_head), 0x7fc07fc0);
    rope = {cos.data(), sin.data(), interleaved};
    cache = {keys.data(), values.data(), kv_heads * key_head, key_head, kv_heads * value_head, value_head, tokens};
  }
  Past(const Past&) = delete;
};

void check_causal_attention() {
  struct Case { long heads, kv_heads, d; bool interleaved; };
  for (const Case& c : {Case{6, 2, 16, true}, {2, 2, 72, false}, {3, 1, 64, true}, {2, 1, 22, false}}) {
    const long row = (c.heads + 2 * c.kv_heads) * c.d, tokens = 150;
    const vector<u16> qkv = bf16_normals(tokens * row);
    check("svk_causal_attention", std::to_string(c.heads) + " heads of " + std::to_string(c.d), {ldexp(1, -9)}, [&] {
      Past past(2, c.kv_heads, c.d, 256, tokens, c.interleaved);
      Answer answer = {{}, vector<u16>((size_t)(tokens * c.heads * c.d))};
      long at = 0;
      for (long rows : {1, 6, 60, 3, 80}) {
        const svk_causal_attention_args args = {&qkv[at * row], &answer.bf16[at * c.heads * c.d], rows, c.heads * c.d,
                                                c.heads, c.kv_heads, c.d, 1, 64, at, 1 / sqrtf((float)c.d), 0};
        require(svk_causal_attention(&past.cache, &past.rope, &args) == SVK_OK, "svk_causal_attention");
        at += rows;
      }
      for (const vector<u32>* words : {&past.keys, &past.values})
        for (u32 word : *words) answer.bf16.push_back((u16)word), answer.bf16.push_back((u16)(word >> 16));
      return answer;
    });
  }
}

// --- Models

struct Shape {
  long width, heads, kv_heads, d, ff;
  bool interleaved;
  float attention_scale, embedding_scale, residual_scale, logits_scale;
};

constexpr long LAYERS = 2, VOCABULARY = 150;

struct Text {
  Shape shape;
  vector<Weights> linears;
  vector<vector<float>> norms;
  vector<svk_layer> layers;
  svk_text_model model;

  Text(const Shape& s, long kind) : shape(s) {
    const long attended = s.heads * s.d;
    for (long l = 0; l < LAYERS; l++) {
      linears.emplace_back(kind, attended + 2 * s.kv_heads * s.d, s.width, true);
      linears.emplace_back(kind, s.width, attended, false);
      linears.emplace_back(kind, 2 * s.ff, s.width, false);
      linears.emplace_back(kind, s.width, s.ff, false);
    }
    const long head_kind = kind == SVK_INT4_GROUPS ? (long)SVK_INT8_GROUPS : kind;
    linears.emplace_back(head_kind, VOCABULARY, s.width, true);
    linears.back().bias[70] = NAN;  // which is never the likeliest
    for (long i = 0; i <= 2 * LAYERS; i++) norms.push_back(normals(s.width, 1, 0.2f));
    for (long l = 0; l < LAYERS; l++)
      layers.push_back({linears[4 * l].view(), linears[4 * l + 1].view(), linears[4 * l + 2].view(),
                        linears[4 * l + 3].view(), norms[2 * l].data(), norms[2 * l + 1].data()});
    model = {LAYERS, s.width, s.heads, s.kv_heads, s.d, s.ff, layers.data(), norms.back().data(), nullptr,
             linears.back().view(), {}, 1e-5f, s.attention_scale, s.embedding_scale, s.residual_scale, s.logits_scale};
  }
  Text(const Text&) = delete;
};

// The first of the largest logits is the answer, and banned ones are none.
void check_best(const float* logits, int64_t best, const vector<int64_t>& banned) {
  for (int64_t id : banned) require(logits[id] == -INFINITY, isa + ": banning a token");
  require(best == std::max_element(logits, logits + VOCABULARY) - logits, isa + ": finding the likeliest token");
}

// Sequences of these lengths, each prefilled in pieces, then a step for all from embeddings and one from tokens.
Answer run_text(const Text& text, const vector<long>& lengths, const vector<u16>& hidden) {
  const long width = text.shape.width, longest = *std::max_element(lengths.begin(), lengths.end());
  const long each = ceil_div(longest + 2, 64) * 64, rows = (long)lengths.size();
  Past past(LAYERS, text.shape.kv_heads, text.shape.d, each * rows, longest + 2, text.shape.interleaved);
  svk_text_model model = text.model;
  model.rope = past.rope;
  Answer answer;
  vector<float> logits((size_t)(rows * VOCABULARY));
  vector<u16> normed((size_t)(longest * width));
  auto keep = [&](long logit_rows, long normed_rows) {
    answer.fp32.insert(answer.fp32.end(), logits.begin(), logits.begin() + logit_rows * VOCABULARY);
    answer.bf16.insert(answer.bf16.end(), normed.begin(), normed.begin() + normed_rows * width);
  };
  vector<int64_t> positions, starts, ids, best((size_t)rows);
  for (long r = 0; r < rows; r++) {
    const int64_t start = r * each;
    int64_t at = 0;
    for (long piece : {1l, 6l, 60l, 3l, longest}) {
      const long count = std::min(piece, lengths[r] - (long)at);
      if (count <= 0) break;
      const bool states = piece != 60;  // without them the last layer is run for the last row alone
      const svk_step_args args = {&hidden[at * width], &at, &start, logits.data(), states ? normed.data() : nullptr,
                                  count, 0, nullptr, nullptr, 0, nullptr};
      require(svk_prefill(&model, &past.cache, &args) == SVK_OK, "svk_prefill");
      keep(1, states ? count : 0), at += count;
    }
    positions.push_back(at), starts.push_back(start), ids.push_back(17 * r % VOCABULARY);
  }
  svk_step_args args = {hidden.data(), positions.data(), starts.data(), logits.data(), normed.data(), rows, 0, nullptr,
                        nullptr, 0, nullptr};
  require(svk_decode(&model, &past.cache, &args) == SVK_OK, "svk_decode");
  keep(rows, rows);
  const vector<int64_t> banned = {0, 63, 64, VOCABULARY - 1};
  for (int64_t& position : positions) position++;
  args.hidden = nullptr, args.ids = ids.data(), args.banned = banned.data(), args.banned_count = (int64_t)banned.size();
  args.best = best.data();
  require(svk_decode(&model, &past.cache, &args) == SVK_OK, "svk_decode");
  keep(rows, rows);
  for (long r = 0; r < rows; r++) check_best(&logits[r * VOCABULARY], best[r], banned);
  return answer;
}

void check_text() {
  const Shape shapes[] = {{96, 6, 2, 16, 160, true, 0.25f, 1, 1, 1},
                          {64, 2, 2, 72, 90, false, 0.12f, 1, 1, 1},
                          {70, 8, 1, 64, 100, true, 0.05f, 12, 0.22f, 0.5f}};
  for (const Shape& shape : shapes)
    for (long kind : {SVK_BF16, SVK_INT8_GROUPS, SVK_INT4_GROUPS, SVK_BF16_COMPACT}) {
      const Text text(shape, kind);
      const vector<u16> hidden = bf16_normals(300 * shape.width);
      for (const vector<long>& lengths : {vector<long>{64}, {300, 5}, {1, 63, 64, 70, 7, 2, 90, 8, 33}})
        check("svk_prefill and svk_decode " + KINDS[kind],
              "width " + std::to_string(shape.width) + ", " + std::to_string(lengths.size()) + " sequences",
              {ldexp(1, -5)}, [&] { return run_text(text, lengths, hidden); });
    }
}

void check_tower() {
  constexpr long width = 62, heads = 3, d = 22, ff = 90;
  for (long kind : {SVK_BF16, SVK_INT8_CHANNEL})
    for (long activation : {SVK_GELU_TANH, SVK_QUICK_GELU}) {
      vector<Weights> linears;
      vector<vector<float>> norms;
      for (long l = 0; l < LAYERS; l++) {
        linears.emplace_back(kind, 3 * heads * d, width, true), linears.emplace_back(kind, width, heads * d, true);
        linears.emplace_back(kind, ff, width, true), linears.emplace_back(kind, width, ff, true);
        for (int i = 0; i < 4; i++) norms.push_back(normals(width, i % 2 ? 0 : 1, 0.2f));
      }
      vector<svk_tower_layer> layers;
      for (long l = 0; l < LAYERS; l++) {
        const Weights* w = &linears[4 * l];
        const vector<float>* n = &norms[4 * l];
        layers.push_back({w[0].view(), w[1].view(), w[2].view(), w[3].view(), n[0].data(), n[1].data(), n[2].data(),
                          n[3].data()});
      }
      const svk_tower tower = {LAYERS, width, heads, d, ff, activation, layers.data(), 1e-6f, 0.2f};
      for (long tokens : {1, 7, 65, 131})
        for (bool masked : {false, true}) {
          const vector<u16> hidden = bf16_normals(tokens * width);
          vector<uint8_t> mask = random_mask(tokens);
          mask[0] = 1;
          const double share = ldexp(1, kind == SVK_BF16 ? -5 : -4);
          const string what = std::to_string(tokens) + " tokens" + (masked ? ", masked" : "");
          check("svk_tower_blocks " + KINDS[kind], what, {share}, [&] {
            Answer answer = {{}, vector<u16>((size_t)(2 * tokens * width))};
            svk_tower_args args = {hidden.data(), answer.bf16.data(), masked ? mask.data() : nullptr, tokens, 0,
                                   LAYERS, 0};
            require(svk_tower_blocks(&tower, &args) == SVK_OK, "svk_tower_blocks");
            args.out += tokens * width, args.first = 1;
            require(svk_tower_blocks(&tower, &args) == SVK_OK, "svk_tower_blocks");
            return answer;
          });
        }
    }
}

}  // namespace

int main() {
  int compared = 0;
  for (const char* name : {"avx512", "avx2", "neon"}) {
    if (svk_set_isa(name) != SVK_OK) continue;
    isa = name, compared++, generator.seed(1), worst.clear();
    require(svk_set_isa("portable") == SVK_OK, "portable");
    check_packing(), check_linears(), check_extreme_values(), check_norms(), check_vision_attention();
    check_causal_attention(), check_text(), check_tower();
    for (const auto& [group, share] : worst) printf("%s, %s: at most %.3f of the bound\n", name, group.c_str(), share);
  }
  if (!compared) printf("this machine runs the portable kernels only: there is nothing to compare\n");
  printf("%d instruction sets compared with portable, %ld answers out of bounds\n", compared, failures);
  return failures || !compared;
}
