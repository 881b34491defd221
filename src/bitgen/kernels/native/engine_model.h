// The model in C++: weights, and the passes through image encoder and decoder.
//
//     image:  stem -> patch_embedding -> + position -> layers -> projector -> image tokens
//     text:   embedding -> layers -> norm -> head
//
// One pass is one run of the thread pool. Small batches share out the rows of each weight matrix and
// wait for each other between the steps of a layer; large ones share out the tokens, and each thread
// takes its own through whole layers, waiting only for the others' keys and values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "engine_memory.h"
#include "kernels.h"
#include "operators.h"
#include "thread_pool.h"

namespace bitgen {

// Rows for each thread up to which a pass shares out the rows of the weights; behind, the tokens.
constexpr int64_t kSmallBatch = 16;
constexpr int64_t kRowsAtOnce = 32;  // of one thread by itself
// Consecutive logits that one thread makes at a time, and that have LogitStatistics.
constexpr int64_t kLogitBlock = 8 * kTileRows;

struct FeedForward {
  TernaryMatrix gate, up, down;
  const float* sub_norm;
};

struct Layer {
  const float* input_norm;
  TernaryMatrix query, key, value, output;
  const float* attention_norm;
  const float* post_norm;
  const float* router;  // [experts][width], null without a mixture
  std::vector<FeedForward> experts;
};

struct Stack {
  int64_t width, heads, kv_heads, head_dim, intermediate, experts_per_token;
  bool is_rotary;
  std::vector<Layer> layers;
};

struct StemConvolution {
  AlignedArray<float> panels, bias;  // batch norm is folded in
  int64_t in_channels, out_channels, out_width, stride;

  // A stride of 1 keeps the picture's size, and the input is added to what comes out.
  bool is_residual() const { return stride == 1; }
  int64_t padded_width() const { return stride * out_width + 2; }  // of the input
};

// Tokens of one sequence among the rows of a pass.
struct Sequence {
  int64_t first_row, rows, past, prefix;
  const int32_t* slots;

  // Keys that the token at this position sees: always the first so many.
  int32_t visible(int64_t position) const {
    return static_cast<int32_t>(position < prefix ? prefix : position + 1);
  }
};

// What is computed on the way, for up to `rows` tokens.
struct Scratch {
  int64_t rows = 0;
  AlignedArray<int8_t> quantized, pair_quantized;
  AlignedArray<float> scales, pair_scales;
  AlignedArray<int32_t> sums, pair_sums;
  AlignedArray<float> keys, values, gate, up, product, normed;
  AlignedArray<float> key_panels, value_panels, scores;
  AlignedArray<int32_t> experts, pair_rows, pair_places;
  AlignedArray<float> router_scores, expert_weights;
  std::vector<int64_t> group_starts;
  std::vector<AlignedArray<float>> pictures;  // inputs of the stem's convolutions
};

// The threads that work on the same rows, and their memory.
struct Team {
  int index, count;
  Worker* worker;    // null for one thread by itself
  Scratch* scratch;  // of the team
  Scratch* own;      // of this thread; the same for one thread by itself

  void barrier() {
    if (count > 1) worker->barrier();
  }
  std::pair<int64_t, int64_t> share(int64_t total) const {
    return {total * index / count, total * (index + 1) / count};
  }
};

// A stack's pass over some rows.
struct Pass {
  const Stack* stack;
  float* x;                       // [rows][width], in and out
  float* queries;                 // [rows][heads * head_dim]
  int64_t rows;
  const Sequence* sequences;
  int64_t num_sequences;
  const int32_t* row_sequences;   // [rows]
  const int32_t* visible;         // [rows]
  const KeyValueStore* store;
  int64_t stored_layers;          // layer l keeps its keys in layer l % stored_layers of the store
  bool by_rows;
};

// Of some consecutive logits of one row.
struct LogitStatistics {
  float largest, sum;   // sum of exp(logit - largest)
  float best;           // the largest among those that may be chosen
  int64_t best_index;   // the first that has it, among all logits
};

struct ForwardOutputs {
  bool all_rows = false;              // logits of every new token, not of each sequence's last
  float* logits = nullptr;
  float* states = nullptr;
  float* pooled = nullptr;
  const float* added = nullptr;       // [vocab_size], 0 or -inf: what may be chosen
  LogitStatistics* statistics = nullptr;  // [rows of logits][logit_blocks()], for `added`
};

class Model {
 public:
  explicit Model(const bitgen_engine_config& config);

  void set_float(const std::string& name, const float* data, int64_t count);
  void set_ternary(const std::string& name, const uint8_t* tiles, int64_t bytes, float scale);
  void set_int8(const std::string& name, const int8_t* tiles, int64_t bytes,
                const float* row_scales, int64_t rows);
  // Takes what was set for its own weights. Throws EngineError for what is missing or does not fit.
  void make_ready();
  void require_ready() const;

  const bitgen_engine_config& config() const { return config_; }
  const Operators& operators() const { return operators_; }
  int64_t num_patches() const { return num_patches_; }
  int64_t logit_blocks() const { return (config_.vocab_size + kLogitBlock - 1) / kLogitBlock; }
  std::unique_ptr<KeyValueStore> new_store() const;

  // Checks what is given; throws EngineError.
  void forward(KeyValueStore* store, const bitgen_sequence* sequences, int64_t count,
               const ForwardOutputs& outputs);
  void encode_images(const uint8_t* pixels, int64_t count, float* tokens);
  void score_robots(const float* tasks, int64_t num_tasks, const float* robots,
                    int64_t num_robots, const int32_t* biases, float* logits);

 private:
  struct Floats {
    const float* data;
    int64_t count;
  };
  struct Ternary {
    const uint8_t* tiles;
    int64_t bytes;
    float scale;
  };
  struct Int8 {
    const int8_t* tiles;
    int64_t bytes;
    const float* row_scales;
    int64_t rows;
  };

  const float* float_tensor(const std::string& name, int64_t count) const;
  TernaryMatrix ternary_tensor(const std::string& name, int64_t rows, int64_t columns) const;
  void make_stack(Stack& stack, const std::string& name, int64_t num_layers, int64_t num_experts);
  void make_embedding();
  void make_stem();

  void check_sequences(const KeyValueStore* store, const bitgen_sequence* sequences,
                       int64_t count) const;
  void prepare_scratch(Scratch& scratch, int64_t rows, int64_t keys) const;
  // Memory for a pass over so many rows by the threads that there are now; how many these are.
  int64_t prepare_threads(int64_t rows, int64_t keys);
  void prepare_pictures(Scratch& scratch) const;
  // Runs function(Worker&, by_rows) on all threads, with memory for so many rows and keys, and for
  // the stem.
  template <typename Function>
  void run(int64_t rows, int64_t keys, bool has_pictures, Function&& function);
  // Calls function(Team&, first, count) for this thread's rows, or for all rows with all threads.
  template <typename Function>
  void for_rows(Worker& worker, bool by_rows, int64_t rows, Function&& function);
  Team whole_team(Worker& worker);
  Team single_team(Worker& worker);

  // One pass, on each thread.
  void run_layers(const Pass& pass, Worker& worker);
  void project(Team& team, const Pass& pass, const Layer& layer, int64_t first, int64_t count);
  void keep_keys(const Pass& pass, int64_t layer, int64_t head, const Scratch& scratch,
                 int64_t scratch_row, int64_t first, int64_t count);
  void attend(const Pass& pass, int64_t layer, int64_t head, const Sequence& sequence,
              int64_t first, int64_t last, Scratch& own);
  void finish_layer(Team& team, const Pass& pass, const Layer& layer, int64_t first,
                    int64_t count);
  void feed_forward(Team& team, const Stack& stack, const Layer& layer, float* x, int64_t rows);
  QuantizedRows quantized_view(Scratch& scratch, int64_t rows, int64_t columns) const;
  QuantizedRows pair_view(Scratch& scratch, int64_t rows, int64_t columns) const;
  bool is_private(const Team& team, int64_t rows) const;
  QuantizedRows norm_quantize(Team& team, const float* x, int64_t rows, int64_t columns,
                              const float* weight);
  void choose_experts(Team& team, const Stack& stack, const Layer& layer, const float* x,
                      int64_t rows);
  void group_pairs(const Scratch& chosen, Scratch& own, int64_t rows, const Stack& stack,
                   int64_t num_experts);
  QuantizedRows gather_pairs(Team& team, const QuantizedRows& x, int64_t pairs);
  // x += product, by each thread for its own columns.
  void add_product(Team& team, const QuantizedRows& q, const TernaryMatrix& matrix, float* x,
                   int64_t rows);
  void embed(int32_t id, float* out) const;
  void read_logits(Worker& worker, int64_t rows, const ForwardOutputs& outputs);
  void run_stem(Worker& worker, const uint8_t* pixels, int64_t count);
  void run_stem_of(Team& team, const uint8_t* pixels, float* out);
  void run_projector(Team& team, const float* x, int64_t rows, float* tokens);

  bitgen_engine_config config_;
  const Kernels& kernels_;
  const Operators& operators_;
  std::unordered_map<std::string, Floats> floats_;
  std::unordered_map<std::string, Ternary> ternaries_;
  std::unordered_map<std::string, Int8> int8s_;
  bool is_ready_ = false;

  Stack decoder_{}, encoder_{};
  const float* embedding_ = nullptr;  // float32 [vocab_size][hidden_size], or null:
  Int8Matrix int8_embedding_{};
  const float* final_norm_ = nullptr;
  AlignedArray<float> cosines_, sines_;  // [max_positions][head_dim / 2]
  int64_t num_patches_ = 0;
  std::vector<StemConvolution> stem_;
  const float* patch_norm_ = nullptr;
  TernaryMatrix patch_embedding_{};
  const float* position_embedding_ = nullptr;
  const float *projector_input_norm_ = nullptr, *projector_sub_norm_ = nullptr;
  TernaryMatrix projector_up_{}, projector_down_{};
  const float *task_norm_ = nullptr, *robot_norm_ = nullptr;
  TernaryMatrix task_projection_{}, robot_projection_{};
  float shared_bias_ = 0.0f;
  const float* robot_bias_ = nullptr;
  int64_t widest_input_ = 0, widest_gate_ = 0, widest_output_ = 0, widest_kv_ = 0;
  int64_t widest_head_ = 0, most_pairs_ = 1;

  // Working memory, under the lock.
  std::mutex lock_;
  Scratch shared_;
  std::vector<std::unique_ptr<Scratch>> own_;
  AlignedArray<float> x_, queries_, head_rows_, logits_, stem_out_, robot_queries_, robot_keys_;
  AlignedArray<int8_t> head_quantized_;
  AlignedArray<float> head_scales_;
  AlignedArray<int32_t> head_sums_, row_sequences_, visible_, plain_slots_, row_ids_, logit_rows_;
  std::vector<Sequence> sequences_;
  KeyValueStore decoder_passing_, encoder_passing_;  // where nothing is kept
};

template <typename Function>
void Model::run(int64_t rows, int64_t keys, bool has_pictures, Function&& function) {
  for (;;) {
    const int64_t threads = prepare_threads(rows, keys);
    if (has_pictures) {
      prepare_pictures(shared_);
      for (auto& own : own_) prepare_pictures(*own);
    }
    bool was_prepared = true;
    ThreadPool::instance().run([&](Worker& worker) {
      // The number of threads may have been raised since.
      if (worker.count > threads) {
        if (worker.index == 0) was_prepared = false;
        return;
      }
      function(worker, rows > kSmallBatch * worker.count);
    });
    if (was_prepared) return;
  }
}

template <typename Function>
void Model::for_rows(Worker& worker, bool by_rows, int64_t rows, Function&& function) {
  if (!by_rows) {
    Team team = whole_team(worker);
    function(team, 0, rows);
    return;
  }
  Team team = single_team(worker);
  const auto [first, last] = worker.share(rows);
  for (int64_t start = first; start < last; start += kRowsAtOnce) {
    function(team, start, std::min(kRowsAtOnce, last - start));
  }
}

}  // namespace bitgen
