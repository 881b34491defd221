#include "generator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine_c.h"

namespace bitgen {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMostRows = 1 << 16, kMostSamples = 1 << 16;

void require(bool condition, const char* message) {
  if (!condition) throw EngineError(message);
}

const bitgen_generator_options& checked(const Model& model, const bitgen_generator_options& o) {
  const bitgen_engine_config& c = model.config();
  require(c.attention_mode != BITGEN_BIDIRECTIONAL,
          "This model's attention is bidirectional: it reads, but cannot write word after word.");
  require(o.rows >= 1 && o.rows <= kMostRows, "rows must be 1 to 65536.");
  require(o.max_tokens >= 1 && o.max_tokens <= c.max_positions,
          "max_tokens must be at least 1, and at most the model's positions.");
  require(o.eos_id >= 0 && o.eos_id < c.vocab_size, "eos_id is not in the vocabulary.");
  require(o.vocab_size >= 1 && o.vocab_size <= c.vocab_size,
          "vocab_size must be 1 to that of the model.");
  require(o.beam_size >= 1 && o.beam_size <= 1024, "beam_size must be 1 to 1024.");
  require(std::isfinite(o.length_penalty), "length_penalty must be a finite number.");
  require(std::isfinite(o.temperature) && o.temperature >= 0,
          "temperature must be 0 (greedy) or a positive number.");
  require(o.num_samples >= 1 && o.num_samples <= kMostSamples, "num_samples must be 1 to 65536.");
  require(o.num_samples == 1 || o.temperature > 0,
          "Several samples differ by what is drawn: they need a temperature above 0.");
  require(o.top_k >= 0, "top_k must be 0 (all tokens) or positive.");
  require(o.top_p > 0 && o.top_p <= 1, "top_p must be in (0, 1].");
  require(o.beam_size == 1 || o.temperature == 0, "Beam search does not sample.");
  require(o.temperature > 0 || (o.top_k == 0 && o.top_p == 1),
          "top_k and top_p choose among sampled tokens, but temperature 0 does not sample.");
  for (int64_t i = 0; i < o.num_never_ids; ++i) {
    require(o.never_ids[i] >= 0 && o.never_ids[i] < c.vocab_size,
            "A never_id is not in the vocabulary.");
  }
  return o;
}

constexpr size_t kWeightBlock = 128;

// From the seed of a sample to that of the next: odd, and no multiple of SplitMix64's own step.
constexpr uint64_t kNextSeed = 0xd1342543de82ef95u;

// Uniform in [0, 1): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
float next_uniform(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-24f;
}

// Their sum; eight at a time, since each addition waits for the one before it.
double sum_of(const float* weights, size_t count) {
  double sums[8] = {}, total = 0.0;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] += weights[i + j];
  }
  for (; i < count; ++i) total += weights[i];
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

Generator::Generator(Model& model, const bitgen_generator_options& options)
    : model_(model),
      options_(checked(model, options)),
      vocabulary_(model.config().vocab_size),
      store_(model.new_store()) {
  model.require_ready();
  added_.ensure(vocabulary_);
  for (int64_t i = 0; i < vocabulary_; ++i) added_[i] = i < options.vocab_size ? 0.0f : -kInfinity;
  for (int64_t i = 0; i < options.num_never_ids; ++i) added_[options.never_ids[i]] = -kInfinity;
  require(std::any_of(added_.data(), added_.data() + vocabulary_, [](float x) { return x == 0; }),
          "No token may be chosen: never_ids holds them all.");
  weights_.resize(static_cast<size_t>(vocabulary_));
}

int64_t Generator::add(const int32_t* ids, int64_t num_ids, const float* embeddings,
                       int64_t num_embeddings, uint64_t seed) {
  const bitgen_engine_config& c = model_.config();
  require(num_ids >= 1, "Each prompt needs at least one token.");
  require(num_embeddings >= 0 && (num_embeddings == 0 || embeddings != nullptr),
          "The prompt has no embeddings.");
  // The last generated token is never read, so it takes no position.
  if (num_ids > c.max_positions || num_embeddings > c.max_positions ||
      num_embeddings + num_ids + options_.max_tokens - 1 > c.max_positions) {
    throw EngineError("max_tokens is " + std::to_string(options_.max_tokens) + ", but beside " +
                      std::to_string(num_embeddings) + " image tokens and " +
                      std::to_string(num_ids) + " prompt tokens the model has room for " +
                      std::to_string(c.max_positions - num_embeddings - num_ids + 1) + " of its " +
                      std::to_string(c.max_positions) + " positions.");
  }
  Request request;
  for (int64_t i = 0; i < num_embeddings; ++i) {
    request.tokens.push_back(static_cast<int32_t>(-1 - i));
  }
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= c.vocab_size) {
      throw EngineError("A prompt holds the id " + std::to_string(ids[i]) + "; there are " +
                        std::to_string(c.vocab_size) + ".");
    }
    request.tokens.push_back(ids[i]);
  }
  request.embeddings.assign(embeddings, embeddings + num_embeddings * c.hidden_size);
  request.seed = seed;
  std::lock_guard<std::mutex> guard(queue_lock_);
  request.number = num_added_;
  waiting_.push_back(std::move(request));
  return num_added_++;
}

int64_t Generator::run(int64_t steps, int64_t* unfinished) {
  std::lock_guard<std::mutex> guard(running_);
  for (int64_t s = 0; s < steps; ++s) {
    admit();
    if (active_.empty()) break;
    step();
    std::lock_guard<std::mutex> queue_guard(queue_lock_);
    if (!ended_.empty()) break;
  }
  std::lock_guard<std::mutex> queue_guard(queue_lock_);
  *unfinished = num_added_ - num_ended_;
  return static_cast<int64_t>(ended_.size());
}

bool Generator::take(Generated* generated) {
  std::lock_guard<std::mutex> guard(queue_lock_);
  if (ended_.empty()) return false;
  *generated = std::move(ended_.front());
  ended_.pop_front();
  return true;
}

void Generator::admit() {
  std::lock_guard<std::mutex> guard(queue_lock_);
  while (static_cast<int64_t>(active_.size()) < options_.rows && !waiting_.empty()) {
    std::unique_ptr<Active> active;
    if (spare_.empty()) {
      active = std::make_unique<Active>();
    } else {
      active = std::move(spare_.back());
      spare_.pop_back();
    }
    active->request = std::move(waiting_.front());
    waiting_.pop_front();
    active->hypotheses.resize(1);
    active->hypotheses[0].slots.clear();
    active->hypotheses[0].tokens.clear();
    active->hypotheses[0].sum = 0.0f;
    active->hypotheses[0].samples.resize(static_cast<size_t>(options_.num_samples));
    std::iota(active->hypotheses[0].samples.begin(), active->hypotheses[0].samples.end(), 0);
    uint64_t shift_state = active->request.seed;
    const double shift = next_uniform(shift_state), count = static_cast<double>(options_.num_samples);
    active->samples.clear();
    for (int64_t i = 0; i < options_.num_samples; ++i) {
      active->samples.push_back({active->request.seed + static_cast<uint64_t>(i) * kNextSeed,
                                 (static_cast<double>(i) + shift) / count,
                                 options_.num_samples > 1 ? 1.0 : 0.0});
    }
    active->results.resize(static_cast<size_t>(options_.num_samples));
    active->used_slots.clear();
    active->is_started = active->is_done = false;
    active->best.tokens.clear();
    active->best.sum = -kInfinity;
    active->best_score = -kInfinity;
    active->num_ended = 0;
    active_.push_back(std::move(active));
  }
}

int32_t Generator::new_slot(Active& active) {
  if (free_slots_.empty()) {
    const int64_t held = store_->slots(), slots = std::max<int64_t>(256, held + held / 2);
    require(slots <= INT32_MAX, "There are too many tokens in the cache.");
    store_->grow(slots);
    for (int64_t slot = slots; slot-- > held;) free_slots_.push_back(static_cast<int32_t>(slot));
  }
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  active.used_slots.push_back(slot);
  return slot;
}

void Generator::step() {
  const bitgen_engine_config& c = model_.config();
  sequences_.clear();
  for (auto& active : active_) {
    active->first_row = static_cast<int64_t>(sequences_.size());
    if (!active->is_started) {
      const Request& request = active->request;
      const auto length = static_cast<int64_t>(request.tokens.size());
      std::vector<int32_t>& slots = active->hypotheses[0].slots;
      while (static_cast<int64_t>(slots.size()) < length) slots.push_back(new_slot(*active));
      sequences_.push_back({slots.data(), 0, length, request.tokens.data(),
                            request.embeddings.data(),
                            static_cast<int64_t>(request.embeddings.size()) / c.hidden_size,
                            c.attention_mode == BITGEN_PREFIX ? length : 0});
      continue;
    }
    for (Hypothesis& hypothesis : active->hypotheses) {
      const auto past = static_cast<int64_t>(hypothesis.slots.size());
      hypothesis.slots.push_back(new_slot(*active));
      sequences_.push_back(
          {hypothesis.slots.data(), past, 1, &hypothesis.tokens.back(), nullptr, 0, 0});
    }
  }
  const auto rows = static_cast<int64_t>(sequences_.size());
  ForwardOutputs outputs;
  outputs.logits = logits_.ensure(rows * vocabulary_);
  outputs.added = added_.data();
  outputs.statistics = statistics_.ensure(rows * model_.logit_blocks());
  model_.forward(store_.get(), sequences_.data(), rows, outputs);
  weighed_row_ = -1;
  for (auto& active : active_) {
    active->is_started = true;
    if (options_.beam_size > 1) advance_beams(*active);
    else advance_samples(*active);
  }
  for (size_t i = 0; i < active_.size();) {
    if (!active_[i]->is_done) {
      ++i;
      continue;
    }
    spare_.push_back(std::move(active_[i]));
    active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void Generator::finish(Active& active) {
  free_slots_.insert(free_slots_.end(), active.used_slots.begin(), active.used_slots.end());
  active.is_done = true;
  std::lock_guard<std::mutex> guard(queue_lock_);
  for (Generated& result : active.results) {
    result.request = active.request.number;
    ended_.push_back(std::move(result));
  }
  ++num_ended_;
}

// The logarithm of the sum of exp(logit - largest) over a row's vocabulary.
float Generator::log_sum(int64_t row, float* largest) const {
  const int64_t blocks = model_.logit_blocks();
  const LogitStatistics* statistics = statistics_.data() + row * blocks;
  *largest = statistics[0].largest;
  for (int64_t b = 1; b < blocks; ++b) *largest = std::max(*largest, statistics[b].largest);
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    sum += statistics[b].sum * std::exp(static_cast<double>(statistics[b].largest - *largest));
  }
  return static_cast<float>(std::log(sum));
}

int32_t Generator::likeliest(int64_t row) const {
  const int64_t blocks = model_.logit_blocks();
  const LogitStatistics* best = statistics_.data() + row * blocks;
  for (int64_t b = 1; b < blocks; ++b) {
    const LogitStatistics* other = statistics_.data() + row * blocks + b;
    if (other->best > best->best) best = other;
  }
  return static_cast<int32_t>(best->best_index);
}

// One step of greedy choice or sampling. Samples that choose the same token stay together.
void Generator::advance_samples(Active& active) {
  active.next.clear();
  for (size_t h = 0; h < active.hypotheses.size(); ++h) {
    const Hypothesis& hypothesis = active.hypotheses[h];
    const int64_t row = active.first_row + static_cast<int64_t>(h);
    float largest;
    const float normaliser = log_sum(row, &largest);
    drawn_.clear();
    for (const int32_t sample : hypothesis.samples) {
      Sample& drawing = active.samples[static_cast<size_t>(sample)];
      drawn_.emplace_back(options_.temperature > 0 ? draw(row, drawing) : likeliest(row), sample);
    }
    std::sort(drawn_.begin(), drawn_.end());
    for (size_t first = 0, end; first < drawn_.size(); first = end) {
      const int32_t token = drawn_[first].first;
      for (end = first; end < drawn_.size() && drawn_[end].first == token;) ++end;
      const float sum =
          hypothesis.sum + ((logits_[row * vocabulary_ + token] - largest) - normaliser);
      const bool is_end = token == options_.eos_id;
      std::vector<int32_t> tokens = hypothesis.tokens;
      if (!is_end) tokens.push_back(token);
      if (is_end || static_cast<int64_t>(tokens.size()) == options_.max_tokens) {
        for (size_t i = first; i < end; ++i) {
          active.results[static_cast<size_t>(drawn_[i].second)] = {0, tokens, sum, is_end};
        }
        continue;
      }
      Hypothesis& next = active.next.emplace_back();
      next.slots = hypothesis.slots;
      next.tokens = std::move(tokens);
      next.sum = sum;
      for (size_t i = first; i < end; ++i) next.samples.push_back(drawn_[i].second);
    }
  }
  std::swap(active.hypotheses, active.next);
  if (active.hypotheses.empty()) finish(active);
}

// top_ = the `count` likeliest tokens that may be chosen, the likeliest first.
void Generator::top_tokens(int64_t row, int64_t count) {
  constexpr int64_t kFew = 64;
  const float* logits = logits_.data() + row * vocabulary_;
  const auto before = [&](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  top_.clear();
  if (count > kFew) {
    for (int64_t i = 0; i < vocabulary_; ++i) {
      if (added_[i] == 0.0f) top_.push_back(static_cast<int32_t>(i));
    }
    const auto kept = std::min(count, static_cast<int64_t>(top_.size()));
    std::partial_sort(top_.begin(), top_.begin() + kept, top_.end(), before);
    top_.resize(static_cast<size_t>(kept));
    return;
  }
  const int64_t blocks = model_.logit_blocks();
  for (int64_t b = 0; b < blocks; ++b) {
    const float best = statistics_[row * blocks + b].best;
    const bool is_full = static_cast<int64_t>(top_.size()) == count;
    if (best == -kInfinity || (is_full && best <= logits[top_.back()])) continue;
    const int64_t end = std::min((b + 1) * kLogitBlock, vocabulary_);
    for (int64_t i = b * kLogitBlock; i < end; ++i) {
      if (added_[i] != 0.0f) continue;
      const auto token = static_cast<int32_t>(i);
      if (static_cast<int64_t>(top_.size()) == count) {
        if (logits[i] <= logits[top_.back()]) continue;
        top_.pop_back();
      }
      top_.insert(std::upper_bound(top_.begin(), top_.end(), token, before), token);
    }
  }
}

// cumulative_ = running sums of exp(logit / temperature) of the tokens that may be drawn of a row:
// after each of top_, or, where all may be drawn, after each kWeightBlock of the vocabulary.
void Generator::weigh(int64_t row) {
  const float* logits = logits_.data() + row * vocabulary_;
  const float largest = logits[likeliest(row)];
  const auto temperature = static_cast<float>(options_.temperature);
  const bool is_cut = has_top_k();
  weighed_row_ = row;
  cumulative_.clear();
  double total = 0.0;
  if (!is_cut) {
    // The whole vocabulary in its own order; what may not be chosen weighs nothing.
    model_.operators().exp_shifted(logits, largest, temperature, vocabulary_, weights_.data());
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (added_[static_cast<int64_t>(i)] != 0.0f) weights_[i] = 0.0f;
    }
    for (size_t i = 0; i < weights_.size(); i += kWeightBlock) {
      total += sum_of(&weights_[i], std::min(kWeightBlock, weights_.size() - i));
      cumulative_.push_back(total);
    }
    if (draws_from_all()) return;
  }
  // The likeliest first: so many of them that they hold top_p of all (or of the top_k).
  const auto weight_of = [&](int32_t token) {
    return std::exp((static_cast<double>(logits[token]) - largest) / options_.temperature);
  };
  for (int64_t count = is_cut ? options_.top_k : 64;; count *= 8) {
    top_tokens(row, count);
    if (is_cut) {
      total = 0.0;
      for (const int32_t token : top_) total += weight_of(token);
    }
    cumulative_.clear();
    double kept = 0.0;
    while (cumulative_.size() < top_.size() && kept < options_.top_p * total) {
      kept += weight_of(top_[cumulative_.size()]);
      cumulative_.push_back(kept);
    }
    const bool is_all = is_cut || static_cast<int64_t>(top_.size()) < count;
    if (kept >= options_.top_p * total || is_all) return;
  }
}

int32_t Generator::draw(int64_t row, Sample& sample) {
  if (row != weighed_row_) weigh(row);
  // In a narrower interval a sample is alone: there is nothing left to share out.
  if (sample.width * static_cast<double>(options_.num_samples) < 1) {
    sample.code = next_uniform(sample.random_state);
  }
  const double total = cumulative_.empty() ? 0.0 : cumulative_.back();
  if (!(total > 0)) return likeliest(row);  // logits that are not numbers
  const double drawn = sample.code * total;
  auto found = std::upper_bound(cumulative_.begin(), cumulative_.end(), drawn);
  if (found == cumulative_.end()) {  // by rounding: the last that weighs anything
    found = std::lower_bound(cumulative_.begin(), cumulative_.end(), total);
  }
  auto index = static_cast<size_t>(found - cumulative_.begin());
  double low = index == 0 ? 0.0 : cumulative_[index - 1], high = *found;
  if (draws_from_all()) {  // which token of the block
    const size_t begin = index * kWeightBlock;
    const size_t end = std::min(begin + kWeightBlock, weights_.size());
    high = low;
    for (size_t i = begin; i < end && high <= drawn; ++i) {
      if (weights_[i] == 0.0f) continue;
      index = i;
      low = high;
      high += weights_[i];
    }
  }
  sample.code = std::min((drawn - low) / (high - low), 1.0);
  sample.width *= (high - low) / total;
  return draws_from_all() ? static_cast<int32_t>(index) : top_[index];
}

void Generator::offer(Active& active, int64_t count, float log_probability,
                      const Hypothesis& hypothesis, int64_t length) {
  const auto divisor =
      static_cast<float>(std::pow(static_cast<double>(length), options_.length_penalty));
  const float score = log_probability / divisor;
  if (score > active.best_score) {
    active.best_score = score;
    active.best.sum = log_probability;
    active.best.tokens = hypothesis.tokens;
  }
  active.num_ended += count;
}

// One step of beam search; see generate.py for its rules.
void Generator::advance_beams(Active& active) {
  const int64_t beams = options_.beam_size;
  const auto step = static_cast<int64_t>(active.hypotheses[0].tokens.size());
  candidates_.clear();
  for (size_t h = 0; h < active.hypotheses.size(); ++h) {
    const int64_t row = active.first_row + static_cast<int64_t>(h);
    float largest;
    const float normaliser = log_sum(row, &largest);
    // One ending each at most: among twice as many there are always enough that go on.
    top_tokens(row, 2 * beams);
    for (const int32_t token : top_) {
      const float log_probability = (logits_[row * vocabulary_ + token] - largest) - normaliser;
      candidates_.push_back({log_probability + active.hypotheses[h].sum, static_cast<int32_t>(h),
                             token});
    }
  }
  const auto before = [](const Candidate& a, const Candidate& b) {
    if (a.value != b.value) return a.value > b.value;
    return a.parent != b.parent ? a.parent < b.parent : a.token < b.token;
  };
  const size_t count = std::min(candidates_.size(), static_cast<size_t>(2 * beams));
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count),
                    candidates_.end(), before);

  int64_t num_ending = 0;
  const Candidate* first_ending = nullptr;
  size_t num_next = 0;
  active.next.resize(static_cast<size_t>(beams));
  for (size_t i = 0; i < count; ++i) {
    const Candidate& candidate = candidates_[i];
    const Hypothesis& parent = active.hypotheses[static_cast<size_t>(candidate.parent)];
    if (candidate.token == options_.eos_id) {
      if (static_cast<int64_t>(i) >= beams) continue;
      ++num_ending;
      if (first_ending == nullptr) first_ending = &candidate;
    } else if (static_cast<int64_t>(num_next) < beams) {
      Hypothesis& next = active.next[num_next++];
      next.slots = parent.slots;
      next.tokens = parent.tokens;
      next.tokens.push_back(candidate.token);
      next.sum = candidate.value;
    }
  }
  active.next.resize(num_next);
  if (first_ending != nullptr) {
    offer(active, num_ending, first_ending->value,
          active.hypotheses[static_cast<size_t>(first_ending->parent)], step + 1);
  }
  std::swap(active.hypotheses, active.next);
  const bool is_last = step + 1 == options_.max_tokens;
  if (is_last && num_next > 0) {
    offer(active, 1, active.hypotheses[0].sum, active.hypotheses[0], options_.max_tokens);
  }
  bool is_done = is_last || num_next == 0 || active.num_ended >= beams;
  if (!is_done && active.num_ended > 0) {
    // Sums only fall, so no running one can score above its sum at the kindest length.
    const float running = active.hypotheses[0].sum;
    const auto score_at = [&](int64_t length) {
      return running / static_cast<float>(
                           std::pow(static_cast<double>(length), options_.length_penalty));
    };
    is_done = active.best_score >= std::max(score_at(step + 2), score_at(options_.max_tokens));
  }
  if (is_done) {
    const auto length = static_cast<int64_t>(active.best.tokens.size());
    active.results[0] = {0, active.best.tokens, active.best.sum, length < options_.max_tokens};
    finish(active);
  }
}

}  // namespace bitgen

using namespace bitgen;

struct bitgen_generator {
  Generator generator;
};

BITGEN_API bitgen_generator* bitgen_generator_new(bitgen_engine* engine,
                                                  const bitgen_generator_options* options) {
  return caught<bitgen_generator*>(
      nullptr, [&] { return new bitgen_generator{{engine->model, *options}}; });
}

BITGEN_API void bitgen_generator_free(bitgen_generator* generator) { delete generator; }

BITGEN_API int64_t bitgen_generator_add(bitgen_generator* generator, const int32_t* ids,
                                        int64_t num_ids, const float* embeddings,
                                        int64_t num_embeddings, uint64_t seed) {
  return caught(int64_t{-1}, [&] {
    return generator->generator.add(ids, num_ids, embeddings, num_embeddings, seed);
  });
}

BITGEN_API int64_t bitgen_generator_run(bitgen_generator* generator, int64_t steps,
                                        int64_t* unfinished) {
  return caught(int64_t{-1}, [&] { return generator->generator.run(steps, unfinished); });
}

BITGEN_API int bitgen_generator_take(bitgen_generator* generator, bitgen_generation* generation,
                                     int32_t* tokens) {
  return caught(0, [&] {
    Generated found;
    if (!generator->generator.take(&found)) return 0;
    generation->request = found.request;
    generation->num_tokens = static_cast<int64_t>(found.tokens.size());
    generation->log_probability = found.log_probability;
    generation->finished = found.finished ? 1 : 0;
    std::copy(found.tokens.begin(), found.tokens.end(), tokens);
    return 1;
  });
}
