// llama.cpp behind the benchmark's protocol: JSON lines come in ({"do": "prefill", "tokens": 1128}), seconds go out.
//
//   llamacpp_worker TEXT.gguf VISION.gguf THREADS PICTURE SETTINGS
//
// SETTINGS is a JSON object that names the best setting of each kind of work as benchmarks/peers/tune_llamacpp.py found
// them: {"prefill": {"flash": true, "ubatch": 512}, "decode_short": …, "tower": {"flash": true}}.
// Only the public interfaces of libllama and libmtmd are used, in the way llama-bench, llama-batched-bench and
// llama-mtmd-cli use them: generation is timed without sampling, so nothing is charged to llama.cpp but its decoding.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"
#include "nlohmann/json.hpp"

using json = nlohmann::json;

namespace {

constexpr int kVocabulary = 400;    // the benchmark checkpoint's tokenizer has no more tokens
constexpr int kTiles = 17;          // of a 2048 by 2048 picture: 4 x 4 and the overview
constexpr int kContextStep = 256;   // llama.cpp pads its cache to this

void check(bool good, const std::string & what) {
    if (!good) throw std::runtime_error(what);
}

// Seconds, of the wall's clock or with BENCHMARK_CLOCK=cpu of the processor's, as engine_workers.py counts them.
double now() {
    const char * clock = std::getenv("BENCHMARK_CLOCK");
    timespec at{};
    clock_gettime(clock && std::string(clock) == "cpu" ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &at);
    return at.tv_sec + 1e-9 * at.tv_nsec;
}

double timed(const std::function<void()> & work) {
    const double started = now();
    work();
    return now() - started;
}

llama_flash_attn_type flash(const json & setting) {
    return setting.value("flash", true) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
}

// A batch of tokens with positions and sequences of their own.
class Batch {
  public:
    explicit Batch(int room) : batch_(llama_batch_init(room, 0, 1)) {}
    ~Batch() { llama_batch_free(batch_); }
    Batch(const Batch &) = delete;
    Batch & operator=(const Batch &) = delete;

    void clear() { batch_.n_tokens = 0; }
    void add(llama_token token, llama_pos position, llama_seq_id sequence, bool wanted) {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = sequence;
        batch_.logits[i] = wanted;
    }
    void decode(llama_context * context) {
        check(llama_decode(context, batch_) == 0, "llama_decode failed");
        llama_synchronize(context);
    }

  private:
    llama_batch batch_;
};

class Peer {
  public:
    Peer(const char * text, const char * vision, int threads, const char * picture, json settings)
        : vision_path_(vision), picture_(picture), threads_(threads), settings_(std::move(settings)) {
        llama_backend_init();
        model_ = llama_model_load_from_file(text, llama_model_default_params());
        check(model_ != nullptr, std::string("cannot load ") + text);
    }

    double prefill(const json & how) {
        const int tokens = how.value("tokens", 1128);
        llama_context * context = context_for(setting(how, "prefill"), 1, tokens);
        Batch batch(tokens);
        for (int i = 0; i < tokens; i++) batch.add(token(), i, 0, i == tokens - 1);
        return timed([&] { batch.decode(context); });
    }

    double decode(const json & how) {
        const int begun = how.at("context"), steps = how.at("steps"), sequences = how.value("batch", 1);
        const char * kind = sequences > 1 ? "decode_batch" : begun > 512 ? "decode_long" : "decode_short";
        llama_context * context = context_for(setting(how, kind), sequences, begun + steps);
        Batch batch(begun + sequences);
        for (int s = 0; s < sequences; s++) {
            batch.clear();
            for (int i = 0; i < begun; i++) batch.add(token(), i, s, i == begun - 1);
            batch.decode(context);
        }
        return timed([&] {
            for (int step = 0; step < steps; step++) {
                batch.clear();
                for (int s = 0; s < sequences; s++) batch.add(token(), begun + step, s, true);
                batch.decode(context);
            }
        });
    }

    // One tile through tower and connector; preprocessing is done before the clock starts.
    double tower(const json & how) {
        mtmd_context * vision = vision_for(setting(how, "tower"));
        const mtmd::input_chunks_ptr chunks = chunks_of(vision, "x");
        const mtmd_input_chunk * tile = nullptr;
        for (size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); i++) {
            const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks.get(), i);
            if (!is_text(chunk)) tile = chunk;
        }
        check(tile != nullptr, "llama.cpp found no picture in the prompt");
        return timed([&] { check(mtmd_encode_chunk(vision, tile) == 0, "mtmd_encode_chunk failed"); });
    }

    // From the picture's file to the first token: reading, cutting, encoding, prefill, the likeliest token.
    double ttft(const json & how) {
        mtmd_context * vision = vision_for(setting(how, "tower"));
        llama_context * context = context_for(setting(how, "prefill"), 1, 2048 - kContextStep);
        return timed([&] {
            const mtmd::input_chunks_ptr chunks = chunks_of(vision, "What is in the picture?");
            int tiles = 0;
            for (size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); i++) {
                tiles += !is_text(mtmd_input_chunks_get(chunks.get(), i));
            }
            check(tiles == kTiles, "llama.cpp cut the picture into " + std::to_string(tiles) + " tiles");
            llama_pos past = 0;
            check(mtmd_helper_eval_chunks(vision, context, chunks.get(), 0, 0, 2048, true, &past) == 0,
                  "mtmd_helper_eval_chunks failed");
            const float * logits = llama_get_logits_ith(context, -1);
            const int words = llama_vocab_n_tokens(llama_model_get_vocab(model_));
            int best = 0;
            for (int i = 1; i < words; i++) best = logits[i] > logits[best] ? i : best;
            last_ = best;
        });
    }

    json about() const {
        char text[256];
        llama_model_desc(model_, text, sizeof text);
        return {{"llama.cpp", llama_print_system_info()}, {"model", text}, {"settings", settings_}};
    }

  private:
    json setting(const json & how, const char * kind) const {
        if (how.contains("setting")) return how.at("setting");
        return settings_.value(kind, json::object());
    }

    llama_token token() { return std::uniform_int_distribution<int>(20, kVocabulary - 1)(random_); }

    // A context with room for so many tokens in each of its sequences, emptied.
    llama_context * context_for(const json & set, int sequences, int tokens) {
        const int room = (tokens / kContextStep + 1) * kContextStep, ubatch = set.value("ubatch", 512);
        const auto key = std::make_tuple(set.value("flash", true), ubatch, sequences, room);
        llama_context *& context = contexts_[key];
        if (!context) {
            llama_context_params params = llama_context_default_params();
            params.n_ctx = room * sequences;
            params.n_seq_max = sequences;
            params.n_batch = std::max(2048, ubatch);
            params.n_ubatch = ubatch;
            params.n_threads = params.n_threads_batch = threads_;
            params.flash_attn_type = flash(set);
            params.no_perf = true;
            context = llama_init_from_model(model_, params);
            check(context != nullptr, "llama_init_from_model failed");
        }
        llama_memory_clear(llama_get_memory(context), true);
        return context;
    }

    mtmd_context * vision_for(const json & set) {
        const bool flashing = set.value("flash", true);
        mtmd_context *& vision = visions_[flashing];
        if (!vision) {
            mtmd_context_params params = mtmd_context_params_default();
            params.use_gpu = false;
            params.print_timings = false;
            params.n_threads = threads_;
            params.flash_attn_type = flash(set);
            vision = mtmd_init_from_file(vision_path_.c_str(), model_, params);
            check(vision != nullptr, "cannot load " + vision_path_);
        }
        return vision;
    }

    mtmd::input_chunks_ptr chunks_of(mtmd_context * vision, const std::string & question) {
        const auto file =
            mtmd_helper_bitmap_init_from_file(vision, picture_.c_str(), false, mtmd_helper_init_opt_default());
        mtmd::bitmap bitmap(file.bitmap);
        check(file.bitmap != nullptr, "cannot read " + picture_);
        const std::string text =
            std::string("<|im_start|>User:") + mtmd_default_marker() + question + "<end_of_utterance>\nAssistant:";
        const mtmd_input_text input{text.c_str(), text.size(), false, true};
        const mtmd_bitmap * bitmaps[] = {file.bitmap};
        mtmd::input_chunks_ptr chunks(mtmd_input_chunks_init());
        check(mtmd_tokenize(vision, chunks.get(), &input, bitmaps, 1) == 0, "mtmd_tokenize failed");
        return chunks;
    }

    static bool is_text(const mtmd_input_chunk * chunk) {
        return mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT;
    }

    std::string vision_path_, picture_;
    int threads_;
    json settings_;
    llama_model * model_ = nullptr;
    std::map<std::tuple<bool, int, int, int>, llama_context *> contexts_;
    std::map<bool, mtmd_context *> visions_;
    std::mt19937 random_{0};
    volatile int last_ = 0;
};

long peak_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) return std::stol(line.substr(6)) * 1024;
    }
    return 0;
}

json answer(Peer & peer, const json & command) {
    const std::string what = command.at("do");
    if (what == "about") return peer.about();
    if (what == "peak") return peak_bytes();
    if (what == "prefill") return peer.prefill(command);
    if (what == "decode") return peer.decode(command);
    if (what == "tower") return peer.tower(command);
    if (what == "ttft") return peer.ttft(command);
    throw std::runtime_error("unknown command " + what);
}

void quiet(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

int main(int count, char ** words) {
    if (count != 6) {
        std::fprintf(stderr, "usage: %s TEXT.gguf VISION.gguf THREADS PICTURE SETTINGS\n", words[0]);
        return 2;
    }
    llama_log_set(quiet, nullptr);
    mtmd_helper_log_set(quiet, nullptr);
    try {
        Peer peer(words[1], words[2], std::stoi(words[3]), words[4], json::parse(words[5]));
        for (std::string line; std::getline(std::cin, line);) {
            std::cout << answer(peer, json::parse(line)).dump() << std::endl;
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "llamacpp_worker: %s\n", error.what());
        return 1;
    }
}
