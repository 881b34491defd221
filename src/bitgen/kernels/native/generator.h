// Continues prompts, several at a time: greedy, by sampling, or by beam search, with the rules of
// bitgen/inference/generate.py.
//
// Each pass reads one new token of every hypothesis, and the whole prompt of each request that has
// just found room. Hypotheses of a request share the cache slots of what they have in common, and
// samples that have said the same so far are one hypothesis.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "engine_model.h"

namespace bitgen {

struct Generated {
  int64_t request;
  std::vector<int32_t> tokens;
  double log_probability;
  bool finished;
};

class Generator {
 public:
  // Throws EngineError for options that the model cannot have.
  Generator(Model& model, const bitgen_generator_options& options);

  int64_t add(const int32_t* ids, int64_t num_ids, const float* embeddings, int64_t num_embeddings,
              uint64_t seed);
  // Passes until a request has ended, or so many; how many results wait. Sets how many requests have
  // not ended.
  int64_t run(int64_t steps, int64_t* unfinished);
  bool take(Generated* generated);

 private:
  struct Request {
    int64_t number = 0;
    std::vector<int32_t> tokens;  // -1 - i for row i of the embeddings, then the prompt
    std::vector<float> embeddings;
    uint64_t seed = 0;
  };

  // A text that is drawn. The samples of a request share out the unit interval: each has a number
  // in it, its code, and where one says a token, the token's part of the interval is stretched to
  // the whole. So tokens come as often as their probabilities say, not by luck, and each sample is
  // still drawn from the model: arithmetic sampling (arXiv 2210.15458). Where a sample is alone, it
  // goes on by random numbers.
  struct Sample {
    uint64_t random_state;
    double code, width;  // of the interval that was left of the first one
  };

  struct Hypothesis {
    std::vector<int32_t> slots;   // of all tokens that were read or are about to be
    std::vector<int32_t> tokens;  // generated
    float sum = 0.0f;             // of their log-probabilities
    std::vector<int32_t> samples;  // which of the request's say this; none in beam search
  };

  struct Candidate {
    float value;
    int32_t parent, token;
  };

  // A request that is worked on.
  struct Active {
    Request request;
    std::vector<Hypothesis> hypotheses, next;
    std::vector<int32_t> used_slots;
    int64_t first_row = 0;  // of its logits
    bool is_started = false, is_done = false;
    std::vector<Sample> samples;
    std::vector<Generated> results;  // of each sample; one in beam search
    // Beam search: the best hypothesis that has ended, and how many have.
    Hypothesis best;
    float best_score = 0.0f;
    int64_t num_ended = 0;
  };

  void admit();
  void step();
  int32_t new_slot(Active& active);
  float log_sum(int64_t row, float* largest) const;
  void advance_samples(Active& active);
  int32_t likeliest(int64_t row) const;
  bool has_top_k() const { return options_.top_k > 0 && options_.top_k < vocabulary_; }
  bool draws_from_all() const { return !has_top_k() && options_.top_p == 1; }
  void weigh(int64_t row);
  int32_t draw(int64_t row, Sample& sample);
  void top_tokens(int64_t row, int64_t count);
  void advance_beams(Active& active);
  void offer(Active& active, int64_t count, float log_probability, const Hypothesis& hypothesis,
             int64_t length);
  void finish(Active& active);

  Model& model_;
  const bitgen_generator_options options_;
  const int64_t vocabulary_;
  AlignedArray<float> added_;  // [vocabulary], 0 or -inf
  std::unique_ptr<KeyValueStore> store_;
  std::vector<int32_t> free_slots_;
  std::vector<std::unique_ptr<Active>> active_, spare_;

  // Of one pass.
  std::vector<bitgen_sequence> sequences_;
  AlignedArray<float> logits_;
  AlignedArray<LogitStatistics> statistics_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> top_;
  // Of the row that tokens were last drawn from: running sums of the weights of the tokens that may
  // be drawn, which are those of top_, or the whole vocabulary, a block of it at a time.
  int64_t weighed_row_ = -1;
  std::vector<double> cumulative_;
  std::vector<float> weights_;
  std::vector<std::pair<int32_t, int32_t>> drawn_;  // token, sample

  std::mutex running_;
  std::mutex queue_lock_;  // of what follows
  std::deque<Request> waiting_;
  std::deque<Generated> ended_;
  int64_t num_added_ = 0;
  int64_t num_ended_ = 0;
};

}  // namespace bitgen
