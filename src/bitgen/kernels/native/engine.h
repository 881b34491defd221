// The engine's C functions: a whole model without Python. bitgen/inference/engine.py calls them.
//
// Functions that can fail return 0 or null then, and bitgen_last_error() says why (of the calling
// thread, until its next failure). Arrays are dense, the last index fastest. An engine may be called
// from several threads: calls come one after the other.
#pragma once

#include <stdint.h>

#include "api.h"

enum { BITGEN_PREFIX = 0, BITGEN_CAUSAL = 1, BITGEN_BIDIRECTIONAL = 2 };

// The fields of BitGenConfig that matter here. image_size 0: no image encoder and no projector.
struct bitgen_engine_config {
  int64_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim;
  int64_t intermediate_size, num_experts, experts_per_token, max_positions, attention_mode;
  int64_t image_size, patch_size, stem_residual_convolutions;
  int64_t encoder_hidden_size, encoder_layers, encoder_heads, encoder_intermediate_size;
  int64_t num_robots;
  double rope_theta;
  float rms_norm_eps;
  float image_mean[3], image_std[3];
};

struct bitgen_engine;
struct bitgen_cache;
struct bitgen_generator;

// One row of a forward pass: `num_new` tokens behind `past` tokens that the cache holds.
struct bitgen_sequence {
  // Slot in the cache of each of the past + num_new tokens, all different. Rows may share slots of
  // past tokens. Null without a cache.
  const int32_t* slots;
  int64_t past, num_new;
  const int32_t* ids;       // [num_new]: a token's id, or -1 - i for row i of the embeddings
  const float* embeddings;  // [num_embeddings][hidden_size]
  int64_t num_embeddings;
  int64_t prefix;           // tokens at the start that see each other; the others see back only
};

enum { BITGEN_LOGITS_LAST = 0, BITGEN_LOGITS_ALL = 1 };

BITGEN_API const char* bitgen_last_error();

// An engine without tensors, computing by the instruction set that is chosen now. What is set stays
// the caller's, and must live as long as the engine. Names are those of an exported file; those that
// the engine does not need are ignored. Sizes are checked by bitgen_engine_ready.
BITGEN_API bitgen_engine* bitgen_engine_new(const bitgen_engine_config* config);
BITGEN_API void bitgen_engine_free(bitgen_engine* engine);
BITGEN_API int bitgen_engine_set_float(bitgen_engine* engine, const char* name, const float* data,
                                       int64_t count);
BITGEN_API int bitgen_engine_set_ternary(bitgen_engine* engine, const char* name,
                                         const uint8_t* tiles, int64_t bytes, float scale);
BITGEN_API int bitgen_engine_set_int8(bitgen_engine* engine, const char* name, const int8_t* tiles,
                                      int64_t bytes, const float* row_scales, int64_t rows);
BITGEN_API int bitgen_engine_ready(bitgen_engine* engine);

// pixels uint8 [count][3][image_size][image_size] -> tokens float32 [count][patches][hidden_size].
BITGEN_API int bitgen_engine_encode_images(bitgen_engine* engine, const uint8_t* pixels,
                                           int64_t count, float* tokens);

// Room for the keys and values of so many tokens.
BITGEN_API bitgen_cache* bitgen_cache_new(bitgen_engine* engine, int64_t slots);
BITGEN_API void bitgen_cache_free(bitgen_cache* cache);

// One pass of the decoder. cache may be null where no sequence has a past. Outputs may be null:
// logits [count or all new tokens][vocab_size], by `which`; states [all new tokens][hidden_size],
// normalised; pooled [count][hidden_size], the mean of each sequence's states of text tokens.
BITGEN_API int bitgen_engine_forward(bitgen_engine* engine, bitgen_cache* cache,
                                     const bitgen_sequence* sequences, int64_t count, int which,
                                     float* logits, float* states, float* pooled);

// logits [num_tasks][num_robots] of pooled states. biases [num_robots]: which of the model's
// num_robots learned biases each robot has, or -1.
BITGEN_API int bitgen_engine_score_robots(bitgen_engine* engine, const float* tasks,
                                          int64_t num_tasks, const float* robots,
                                          int64_t num_robots, const int32_t* biases, float* logits);

struct bitgen_generator_options {
  int64_t rows;            // requests that are worked on at a time
  int64_t max_tokens;      // most tokens generated a request, the end of text included
  int64_t eos_id;
  int64_t vocab_size;      // ids from here on are never chosen
  const int32_t* never_ids;
  int64_t num_never_ids;
  int64_t beam_size;       // 1: greedy, or sampling where temperature is above 0
  double length_penalty;
  double temperature;
  int64_t top_k;           // 0: all
  double top_p;            // 1: all
  int64_t num_samples;     // drawn of each request; above 1 only where temperature is above 0
};

struct bitgen_generation {
  int64_t request;         // what bitgen_generator_add returned
  int64_t num_tokens;      // without the end of text
  double log_probability;
  int32_t finished;        // whether the end of text was generated
};

// Continues prompts, several at a time: where one ends, the next waiting one takes its place.
BITGEN_API bitgen_generator* bitgen_generator_new(bitgen_engine* engine,
                                                  const bitgen_generator_options* options);
BITGEN_API void bitgen_generator_free(bitgen_generator* generator);
// A prompt of num_ids token ids behind num_embeddings image tokens [num_embeddings][hidden_size]
// (copied). seed: of the row's draws. Returns the request's number, counted from 0, or -1.
BITGEN_API int64_t bitgen_generator_add(bitgen_generator* generator, const int32_t* ids,
                                        int64_t num_ids, const float* embeddings,
                                        int64_t num_embeddings, uint64_t seed);
// Works until a request ends, no request is left, or `steps` passes were made. Returns how many
// results wait to be taken (num_samples of each request that has ended), -1 for a failure. *unfinished: requests that are waiting or worked on.
BITGEN_API int64_t bitgen_generator_run(bitgen_generator* generator, int64_t steps,
                                        int64_t* unfinished);
// The oldest result; tokens has room for max_tokens. Returns 0 if none waits.
BITGEN_API int bitgen_generator_take(bitgen_generator* generator, bitgen_generation* generation,
                                     int32_t* tokens);
