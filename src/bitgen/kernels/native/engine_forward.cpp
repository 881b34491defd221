// Passes of the decoder: what is given is checked, laid out as rows, and run.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine_model.h"

namespace bitgen {

void Model::check_sequences(const KeyValueStore* store, const bitgen_sequence* sequences,
                            int64_t count) const {
  const auto fail = [](int64_t row, const std::string& what) {
    throw EngineError("Sequence " + std::to_string(row) + ": " + what);
  };
  for (int64_t s = 0; s < count; ++s) {
    const bitgen_sequence& q = sequences[s];
    if (q.num_new < 1 || q.past < 0 || q.num_embeddings < 0 || q.prefix < 0) {
      fail(s, "it has no new tokens, or a length below zero.");
    }
    if (q.num_new > config_.max_positions || q.past > config_.max_positions - q.num_new) {
      fail(s, std::to_string(q.past) + " tokens and " + std::to_string(q.num_new) +
                  " new ones; the model reads " + std::to_string(config_.max_positions) +
                  " positions.");
    }
    if (q.past > 0 && q.prefix > q.past) {
      fail(s, "its prefix reaches over new tokens; a prefix is given in one pass.");
    }
    if (q.ids == nullptr || (q.num_embeddings > 0 && q.embeddings == nullptr)) {
      fail(s, "it has no ids, or no embeddings.");
    }
    for (int64_t i = 0; i < q.num_new; ++i) {
      const int64_t id = q.ids[i];
      if (id >= config_.vocab_size || -1 - id >= q.num_embeddings) {
        fail(s, "token " + std::to_string(i) + " is " + std::to_string(id) + "; there are " +
                    std::to_string(config_.vocab_size) + " ids and " +
                    std::to_string(q.num_embeddings) + " embeddings.");
      }
    }
    if (store == nullptr) {
      if (q.past > 0) fail(s, "it has a past, but there is no cache.");
      continue;
    }
    if (q.slots == nullptr) fail(s, "it names no slots of the cache.");
    for (int64_t i = 0; i < q.past + q.num_new; ++i) {
      if (q.slots[i] < 0 || q.slots[i] >= store->slots()) {
        fail(s, "slot " + std::to_string(q.slots[i]) + " of a cache with " +
                    std::to_string(store->slots()) + " slots.");
      }
    }
  }
}

void Model::embed(int32_t id, float* out) const {
  const int64_t width = config_.hidden_size;
  if (embedding_ != nullptr) {
    std::memcpy(out, embedding_ + id * width, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  const int64_t chunks = round_up(width, kInt8Inputs) / kInt8Inputs;
  const int8_t* row = int8_embedding_.tiles + id / kTileRows * chunks * kChunkBytes +
                      id % kTileRows * kInt8Inputs;
  const float scale = int8_embedding_.row_scales[id];
  for (int64_t i = 0; i < width; ++i) {
    out[i] = static_cast<float>(row[i / kInt8Inputs * kChunkBytes + i % kInt8Inputs]) * scale;
  }
}

void Model::forward(KeyValueStore* store, const bitgen_sequence* sequences, int64_t count,
                    const ForwardOutputs& outputs) {
  std::lock_guard<std::mutex> guard(lock_);
  require_ready();
  check_sequences(store, sequences, count);
  if (count == 0) return;
  const int64_t width = config_.hidden_size;
  int64_t rows = 0, keys = 1;
  for (int64_t s = 0; s < count; ++s) {
    rows += sequences[s].num_new;
    keys = std::max(keys, sequences[s].past + sequences[s].num_new);
  }
  x_.ensure(rows * width);
  queries_.ensure(rows * config_.num_heads * config_.head_dim);
  row_sequences_.ensure(rows);
  visible_.ensure(rows);
  sequences_.clear();
  const KeyValueStore* kept = store;
  if (store == nullptr) {
    decoder_passing_.grow(rows);
    plain_slots_.ensure(rows);
    for (int64_t r = 0; r < rows; ++r) plain_slots_[r] = static_cast<int32_t>(r);
    kept = &decoder_passing_;
  }
  int64_t row = 0;
  for (int64_t s = 0; s < count; ++s) {
    const bitgen_sequence& q = sequences[s];
    const int64_t prefix = std::min(q.prefix, q.past + q.num_new);
    const int32_t* slots = store == nullptr ? plain_slots_.data() + row : q.slots;
    sequences_.push_back({row, q.num_new, q.past, prefix, slots});
    for (int64_t i = 0; i < q.num_new; ++i) {
      row_sequences_[row] = static_cast<int32_t>(s);
      visible_[row++] = sequences_.back().visible(q.past + i);
    }
  }
  const int64_t num_logits = outputs.all_rows ? rows : count;
  float* logits = outputs.logits;
  if (logits != nullptr) {
    head_rows_.ensure(num_logits * width);
    if (embedding_ == nullptr) {
      head_quantized_.ensure(num_logits * preferred_stride(width));
      head_scales_.ensure(num_logits);
      head_sums_.ensure(num_logits);
    }
  }
  run(rows, keys, false, [&](Worker& worker, bool by_rows) {
    const auto [first, last] = worker.share(rows);
    for (int64_t r = first; r < last; ++r) {
      const Sequence& sequence = sequences_[static_cast<size_t>(row_sequences_[r])];
      const bitgen_sequence& given = sequences[row_sequences_[r]];
      const int32_t id = given.ids[r - sequence.first_row];
      float* x = x_.data() + r * width;
      if (id >= 0) embed(id, x);
      else std::copy_n(given.embeddings + (-1 - int64_t{id}) * width, width, x);
    }
    worker.barrier();
    const Pass pass{&decoder_,       x_.data(),     queries_.data(), rows,
                    sequences_.data(), count,       row_sequences_.data(), visible_.data(),
                    kept,            store == nullptr ? 2 : config_.num_layers, by_rows};
    run_layers(pass, worker);
    if (by_rows) worker.barrier();
    for (int64_t r = first; r < last && outputs.states != nullptr; ++r) {
      operators_.rms_norm(x_.data() + r * width, final_norm_, config_.rms_norm_eps, width,
                          outputs.states + r * width);
    }
    if (outputs.pooled != nullptr) {
      float* state = own_[static_cast<size_t>(worker.index)]->product.data();
      const auto [first_sequence, last_sequence] = worker.share(count);
      for (int64_t s = first_sequence; s < last_sequence; ++s) {
        const Sequence& sequence = sequences_[static_cast<size_t>(s)];
        float* pooled = outputs.pooled + s * width;
        std::fill(pooled, pooled + width, 0.0f);
        int64_t words = 0;
        for (int64_t i = 0; i < sequence.rows; ++i) {
          if (sequences[s].ids[i] < 0) continue;
          operators_.rms_norm(x_.data() + (sequence.first_row + i) * width, final_norm_,
                              config_.rms_norm_eps, width, state);
          operators_.add(pooled, state, width);
          ++words;
        }
        operators_.scale(pooled, 1.0f / static_cast<float>(std::max<int64_t>(words, 1)), width);
      }
    }
    if (logits != nullptr) read_logits(worker, num_logits, outputs);
  });
}

void Model::read_logits(Worker& worker, int64_t rows, const ForwardOutputs& outputs) {
  const int64_t width = config_.hidden_size, vocabulary = config_.vocab_size;
  QuantizedRows q{head_quantized_.data(), head_scales_.data(), head_sums_.data(), rows, width,
                  preferred_stride(width)};
  const auto [first, last] = worker.share(rows);
  for (int64_t r = first; r < last; ++r) {
    int64_t row = r;
    if (!outputs.all_rows) {
      const Sequence& sequence = sequences_[static_cast<size_t>(r)];
      row = sequence.first_row + sequence.rows - 1;
    }
    const float* x = x_.data() + row * width;
    if (embedding_ != nullptr) {
      operators_.rms_norm(x, final_norm_, config_.rms_norm_eps, width, head_rows_.data() + r * width);
    } else {
      operators_.rms_norm_quantize(x, final_norm_, config_.rms_norm_eps, width, q.stride,
                                   q.values + r * q.stride, q.scales + r, q.sums + r);
    }
  }
  worker.barrier();
  const int64_t blocks = logit_blocks();
  const auto [first_block, last_block] = worker.share(blocks);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kLogitBlock, end = std::min(begin + kLogitBlock, vocabulary);
    if (embedding_ != nullptr) {
      operators_.linear(head_rows_.data(), width, rows, embedding_, width, begin, end,
                        outputs.logits, vocabulary);
    } else {
      kernels_.int8_product(&q, &int8_embedding_, begin / kTileRows, tiles_of(end), outputs.logits,
                            vocabulary);
    }
    for (int64_t r = 0; r < rows && outputs.statistics != nullptr; ++r) {
      LogitStatistics& found = outputs.statistics[r * blocks + block];
      const float* logits = outputs.logits + r * vocabulary + begin;
      operators_.exp_sum(logits, end - begin, &found.largest, &found.sum);
      operators_.argmax(logits, outputs.added + begin, end - begin, &found.best, &found.best_index);
      found.best_index += begin;
    }
  }
}

void Model::score_robots(const float* tasks, int64_t num_tasks, const float* robots,
                         int64_t num_robots, const int32_t* biases, float* logits) {
  std::lock_guard<std::mutex> guard(lock_);
  require_ready();
  for (int64_t r = 0; r < num_robots; ++r) {
    if (biases[r] < -1 || biases[r] >= config_.num_robots) {
      throw EngineError("Robot " + std::to_string(r) + " has the bias " +
                        std::to_string(biases[r]) + "; the model has " +
                        std::to_string(config_.num_robots) + ".");
    }
  }
  if (num_tasks == 0 || num_robots == 0) return;
  const int64_t width = config_.hidden_size;
  robot_queries_.ensure(num_tasks * width);
  robot_keys_.ensure(num_robots * width);
  const auto project_all = [&](Worker& worker, bool by_rows, const float* x, int64_t rows,
                               const float* norm, const TernaryMatrix& matrix, float* out) {
    for_rows(worker, by_rows, rows, [&](Team& team, int64_t first, int64_t count) {
      const QuantizedRows q = norm_quantize(team, x + first * width, count, width, norm);
      const auto [begin, end] = team.share(tiles_of(width));
      kernels_.ternary_product(&q, &matrix, begin, end, out + first * width, width);
      team.barrier();
    });
  };
  run(std::max(num_tasks, num_robots), 1, false, [&](Worker& worker, bool by_rows) {
    project_all(worker, by_rows, tasks, num_tasks, task_norm_, task_projection_,
                robot_queries_.data());
    project_all(worker, by_rows, robots, num_robots, robot_norm_, robot_projection_,
                robot_keys_.data());
    worker.barrier();
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    const auto [first, last] = worker.share(num_tasks);
    operators_.linear(robot_queries_.data() + first * width, width, last - first,
                      robot_keys_.data(), width, 0, num_robots, logits + first * num_robots,
                      num_robots);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t r = 0; r < num_robots; ++r) {
        float& logit = logits[i * num_robots + r];
        logit = logit * scale + shared_bias_;
        if (biases[r] >= 0) logit += robot_bias_[biases[r]];
      }
    }
  });
}

}  // namespace bitgen
