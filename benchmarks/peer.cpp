// Times one GGUF model through llama.cpp's C interface, as llama.cpp and its forks declare it.
//
//     peer MODEL.gguf VOCABULARY LONGEST [repack]
//
// Reads requests from stdin, one a line, and answers each with one line on stdout:
//
//     threads N            -> ok
//     prompt N             -> seconds for N new tokens in one call, logits of the last one
//     decode P N           -> seconds for N greedy tokens, one a call, after a prompt of P tokens
//     logits N FILE        -> float32 [N, VOCABULARY] to FILE, then ok
//
// benchmarks/peers.py compiles it against each program's headers and says which tokens are fed:
// token i of a prompt is (7919 * i + 13) % VOCABULARY.

#include "llama.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The forks split off at different times, and names have changed since. A function that one of
// them lacks is only looked up in the overload chosen for it.

template <class Params>
auto load_model(const char* path, Params params, int)
    -> decltype(llama_model_load_from_file(path, params)) {
    return llama_model_load_from_file(path, params);
}

template <class Params>
auto load_model(const char* path, Params params, long)
    -> decltype(llama_load_model_from_file(path, params)) {
    return llama_load_model_from_file(path, params);
}

template <class Model, class Params>
auto make_context(Model* model, Params params, int)
    -> decltype(llama_init_from_model(model, params)) {
    return llama_init_from_model(model, params);
}

template <class Model, class Params>
auto make_context(Model* model, Params params, long)
    -> decltype(llama_new_context_with_model(model, params)) {
    return llama_new_context_with_model(model, params);
}

template <class Context>
auto forget(Context* context, int) -> decltype(llama_memory_clear(llama_get_memory(context), true)) {
    llama_memory_clear(llama_get_memory(context), true);
}

template <class Context>
auto forget(Context* context, long) -> decltype(llama_kv_cache_clear(context)) {
    llama_kv_cache_clear(context);
}

template <class Params>
auto repack(Params& params, int) -> decltype(void(params.repack_tensors)) {
    params.repack_tensors = true;
}

template <class Params>
void repack(Params&, long) {
    throw std::runtime_error("this program does not repack weights at load time");
}

class Model {
public:
    Model(const char* path, int vocabulary, int longest, bool repacks)
        : vocabulary_(vocabulary), batch_(llama_batch_init(longest, 0, 1)) {
        llama_model_params model_params = llama_model_default_params();
        if (repacks) repack(model_params, 0);
        model_ = load_model(path, model_params, 0);
        if (model_ == nullptr) throw std::runtime_error(std::string("cannot load ") + path);
        llama_context_params params = llama_context_default_params();
        params.n_ctx = params.n_batch = params.n_ubatch = longest;
        context_ = make_context(model_, params, 0);
        if (context_ == nullptr) throw std::runtime_error("cannot make a context");
    }

    void set_threads(int count) { llama_set_n_threads(context_, count, count); }

    // New tokens from position 0 on; logits of the last one, or of all.
    void prompt(int count, bool all_logits) {
        forget(context_, 0);
        batch_.n_tokens = 0;
        for (int i = 0; i < count; ++i) {
            add(static_cast<llama_token>((7919LL * i + 13) % vocabulary_), i,
                all_logits || i == count - 1);
        }
        run();
    }

    void decode(int past, int count) {
        for (int i = 0; i < count; ++i) {
            const float* logits = llama_get_logits_ith(context_, batch_.n_tokens - 1);
            const auto token =
                static_cast<llama_token>(std::max_element(logits, logits + vocabulary_) - logits);
            batch_.n_tokens = 0;
            add(token, past + i, true);
            run();
        }
        // Some programs answer before they are done: reading the result waits for it.
        llama_get_logits_ith(context_, 0);
    }

    const float* logits(int index) { return llama_get_logits_ith(context_, index); }

private:
    void add(llama_token token, int position, bool wants_logits) {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = 0;
        batch_.logits[i] = wants_logits;
    }

    void run() {
        if (llama_decode(context_, batch_) != 0) throw std::runtime_error("llama_decode failed");
    }

    int vocabulary_;
    llama_batch batch_;
    llama_model* model_ = nullptr;
    llama_context* context_ = nullptr;
};

// bitnet.cpp keeps the results of a product on the stack: 8 MB for 512 tokens of the largest model.
void allow_a_large_stack() {
#if defined(__unix__) || defined(__APPLE__)
    rlimit limit{};
    if (getrlimit(RLIMIT_STACK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
    limit.rlim_cur = std::max<rlim_t>(limit.rlim_cur, std::min<rlim_t>(limit.rlim_max, 64 << 20));
    setrlimit(RLIMIT_STACK, &limit);
#endif
}

template <class Function>
double seconds_of(Function function) {
    const auto started = std::chrono::steady_clock::now();
    function();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

void answer(Model& model, int vocabulary, const std::string& line) {
    std::istringstream words(line);
    std::string request, file;
    int count = 0, steps = 0;
    words >> request >> count;
    if (request == "threads" && count > 0) {
        model.set_threads(count);
        std::cout << "ok" << std::endl;
    } else if (request == "prompt" && count > 0) {
        const double seconds = seconds_of([&] {
            model.prompt(count, false);
            model.logits(count - 1);
        });
        std::cout << seconds << std::endl;
    } else if (request == "decode" && count > 0 && words >> steps) {
        model.prompt(count, false);
        model.logits(count - 1);
        std::cout << seconds_of([&] { model.decode(count, steps); }) << std::endl;
    } else if (request == "logits" && count > 0 && words >> file) {
        model.prompt(count, true);
        std::ofstream out(file, std::ios::binary);
        for (int i = 0; i < count; ++i) {
            out.write(reinterpret_cast<const char*>(model.logits(i)),
                      static_cast<std::streamsize>(vocabulary * sizeof(float)));
        }
        out.close();
        if (!out) throw std::runtime_error("cannot write " + file);
        std::cout << "ok" << std::endl;
    } else {
        throw std::runtime_error("unknown request: " + line);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::cerr << "usage: peer MODEL.gguf VOCABULARY LONGEST [repack]\n";
        return 2;
    }
    try {
        allow_a_large_stack();
        llama_log_set([](ggml_log_level level, const char* text, void*) {
            if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        }, nullptr);
        llama_backend_init();
        const int vocabulary = std::stoi(argv[2]);
        Model model(argv[1], vocabulary, std::stoi(argv[3]), argc > 4);
        std::cout.precision(9);
        std::cout << "ready" << std::endl;
        for (std::string line; std::getline(std::cin, line);) answer(model, vocabulary, line);
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
