// The engine's C functions: nothing that goes wrong behind them leaves as a C++ exception.
#include "engine.h"

#include "engine_c.h"

using namespace bitgen;

struct bitgen_cache {
  std::unique_ptr<KeyValueStore> store;
  const Model* model;
};

namespace bitgen {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

}  // namespace bitgen

BITGEN_API const char* bitgen_last_error() { return last_error().c_str(); }

BITGEN_API bitgen_engine* bitgen_engine_new(const bitgen_engine_config* config) {
  return caught<bitgen_engine*>(nullptr, [&] { return new bitgen_engine(*config); });
}

BITGEN_API void bitgen_engine_free(bitgen_engine* engine) { delete engine; }

BITGEN_API int bitgen_engine_set_float(bitgen_engine* engine, const char* name, const float* data,
                                       int64_t count) {
  return caught(0, [&] {
    engine->model.set_float(name, data, count);
    return 1;
  });
}

BITGEN_API int bitgen_engine_set_ternary(bitgen_engine* engine, const char* name,
                                         const uint8_t* tiles, int64_t bytes, float scale) {
  return caught(0, [&] {
    engine->model.set_ternary(name, tiles, bytes, scale);
    return 1;
  });
}

BITGEN_API int bitgen_engine_set_int8(bitgen_engine* engine, const char* name, const int8_t* tiles,
                                      int64_t bytes, const float* row_scales, int64_t rows) {
  return caught(0, [&] {
    engine->model.set_int8(name, tiles, bytes, row_scales, rows);
    return 1;
  });
}

BITGEN_API int bitgen_engine_ready(bitgen_engine* engine) {
  return caught(0, [&] {
    engine->model.make_ready();
    return 1;
  });
}

BITGEN_API int bitgen_engine_encode_images(bitgen_engine* engine, const uint8_t* pixels,
                                           int64_t count, float* tokens) {
  return caught(0, [&] {
    engine->model.encode_images(pixels, count, tokens);
    return 1;
  });
}

BITGEN_API bitgen_cache* bitgen_cache_new(bitgen_engine* engine, int64_t slots) {
  return caught<bitgen_cache*>(nullptr, [&] {
    if (slots < 0 || slots > INT32_MAX) {
      throw EngineError("A cache of " + std::to_string(slots) + " slots cannot be made.");
    }
    auto cache = std::make_unique<bitgen_cache>();
    cache->store = engine->model.new_store();
    cache->store->grow(slots);
    cache->model = &engine->model;
    return cache.release();
  });
}

BITGEN_API void bitgen_cache_free(bitgen_cache* cache) { delete cache; }

BITGEN_API int bitgen_engine_forward(bitgen_engine* engine, bitgen_cache* cache,
                                     const bitgen_sequence* sequences, int64_t count, int which,
                                     float* logits, float* states, float* pooled) {
  return caught(0, [&] {
    if (cache != nullptr && cache->model != &engine->model) {
      throw EngineError("The cache belongs to another engine.");
    }
    ForwardOutputs outputs;
    outputs.all_rows = which == BITGEN_LOGITS_ALL;
    outputs.logits = logits;
    outputs.states = states;
    outputs.pooled = pooled;
    KeyValueStore* store = cache == nullptr ? nullptr : cache->store.get();
    engine->model.forward(store, sequences, count, outputs);
    return 1;
  });
}

BITGEN_API int bitgen_engine_score_robots(bitgen_engine* engine, const float* tasks,
                                          int64_t num_tasks, const float* robots,
                                          int64_t num_robots, const int32_t* biases,
                                          float* logits) {
  return caught(0, [&] {
    engine->model.score_robots(tasks, num_tasks, robots, num_robots, biases, logits);
    return 1;
  });
}
