// A pass through a stack of layers, on each thread.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine_model.h"

namespace bitgen {
namespace {

constexpr int64_t kPrivateRows = 2;     // so few are normalised by every thread for itself
constexpr int64_t kBlockQueries = 4;    // a sequence of so many new tokens attends in blocks
constexpr int64_t kUpFloats = 16384;    // of the up projection that are made at a time

TernaryMatrix tiles_from(const TernaryMatrix& matrix, int64_t first_tile) {
  const int64_t bytes = round_up(matrix.columns, kChunkInputs) / kChunkInputs * kChunkBytes;
  return {matrix.tiles + first_tile * bytes, matrix.rows - first_tile * kTileRows, matrix.columns,
          matrix.scale};
}

}  // namespace

void Model::prepare_scratch(Scratch& s, int64_t rows, int64_t keys) const {
  const int64_t pairs = rows * most_pairs_, stride = preferred_stride(widest_input_);
  s.rows = rows;
  s.quantized.ensure(rows * stride);
  s.scales.ensure(rows);
  s.sums.ensure(rows);
  s.keys.ensure(rows * widest_kv_);
  s.values.ensure(rows * widest_kv_);
  s.gate.ensure(pairs * widest_gate_);
  s.up.ensure(std::max(kUpFloats, pairs * kTileRows));
  s.product.ensure(pairs * widest_output_);
  if (config_.num_experts > 1) {
    s.pair_quantized.ensure(pairs * stride);
    s.pair_scales.ensure(pairs);
    s.pair_sums.ensure(pairs);
    s.normed.ensure(rows * config_.hidden_size);
    s.experts.ensure(pairs);
    s.pair_rows.ensure(pairs);
    s.pair_places.ensure(pairs);
    s.router_scores.ensure(rows * config_.num_experts);
    s.expert_weights.ensure(pairs);
    s.group_starts.resize(static_cast<size_t>(config_.num_experts + 1));
  }
  const int64_t panel = operators_.panel_width, padded_keys = round_up(keys, panel);
  s.key_panels.ensure(padded_keys * widest_head_);
  s.value_panels.ensure(keys * round_up(widest_head_, panel));
  s.scores.ensure(padded_keys * operators_.row_block + 16);
}

int64_t Model::prepare_threads(int64_t rows, int64_t keys) {
  const int64_t threads = ThreadPool::instance().threads();
  while (static_cast<int64_t>(own_.size()) < threads) own_.push_back(std::make_unique<Scratch>());
  // Each thread's own also holds what it groups of all rows.
  for (auto& own : own_) prepare_scratch(*own, kRowsAtOnce, keys);
  const int64_t most = std::min(rows, kSmallBatch * threads);
  prepare_scratch(shared_, most, keys);
  if (config_.num_experts > 1) {
    for (auto& own : own_) {
      own->pair_rows.ensure(most * most_pairs_);
      own->pair_places.ensure(most * most_pairs_);
      own->up.ensure(most * most_pairs_ * kTileRows);
    }
  } else {
    for (auto& own : own_) own->up.ensure(most * kTileRows);
  }
  return threads;
}

Team Model::whole_team(Worker& worker) {
  return {worker.index, worker.count, &worker, &shared_,
          own_[static_cast<size_t>(worker.index)].get()};
}

Team Model::single_team(Worker& worker) {
  Scratch* own = own_[static_cast<size_t>(worker.index)].get();
  return {0, 1, nullptr, own, own};
}

QuantizedRows Model::quantized_view(Scratch& s, int64_t rows, int64_t columns) const {
  return {s.quantized.data(), s.scales.data(), s.sums.data(), rows, columns,
          preferred_stride(columns)};
}

QuantizedRows Model::pair_view(Scratch& s, int64_t rows, int64_t columns) const {
  return {s.pair_quantized.data(), s.pair_scales.data(), s.pair_sums.data(), rows, columns,
          preferred_stride(columns)};
}

bool Model::is_private(const Team& team, int64_t rows) const {
  return team.count > 1 && rows <= kPrivateRows;
}

QuantizedRows Model::norm_quantize(Team& team, const float* x, int64_t rows, int64_t columns,
                                   const float* weight) {
  const bool by_itself = is_private(team, rows);
  QuantizedRows q = quantized_view(by_itself ? *team.own : *team.scratch, rows, columns);
  const auto [first, last] = by_itself ? std::pair<int64_t, int64_t>{0, rows} : team.share(rows);
  for (int64_t r = first; r < last; ++r) {
    operators_.rms_norm_quantize(x + r * columns, weight, config_.rms_norm_eps, columns, q.stride,
                                 q.values + r * q.stride, q.scales + r, q.sums + r);
  }
  if (!by_itself) team.barrier();
  return q;
}

void Model::project(Team& team, const Pass& pass, const Layer& layer, int64_t first,
                    int64_t count) {
  const Stack& stack = *pass.stack;
  const int64_t query_width = stack.heads * stack.head_dim;
  const int64_t kv_width = stack.kv_heads * stack.head_dim;
  const QuantizedRows q = norm_quantize(team, pass.x + first * stack.width, count, stack.width,
                                        layer.input_norm);
  const struct {
    const TernaryMatrix* matrix;
    float* out;
    int64_t stride;
  } products[] = {
      {&layer.query, pass.queries + first * query_width, query_width},
      {&layer.key, team.scratch->keys.data(), kv_width},
      {&layer.value, team.scratch->values.data(), kv_width},
  };
  int64_t total = 0;
  for (const auto& product : products) total += tiles_of(product.matrix->rows);
  const auto [begin, end] = team.share(total);
  int64_t offset = 0;
  for (const auto& product : products) {
    const int64_t tiles = tiles_of(product.matrix->rows);
    const int64_t from = std::max(begin - offset, int64_t{0}), to = std::min(end - offset, tiles);
    if (from < to) {
      kernels_.ternary_product(&q, product.matrix, from, to, product.out, product.stride);
    }
    offset += tiles;
  }
  team.barrier();
}

void Model::keep_keys(const Pass& pass, int64_t layer, int64_t head, const Scratch& scratch,
                      int64_t scratch_row, int64_t first, int64_t count) {
  const Stack& stack = *pass.stack;
  const int64_t dim = stack.head_dim, half = dim / 2, group = stack.heads / stack.kv_heads;
  const int64_t kv_width = stack.kv_heads * dim, query_width = stack.heads * dim;
  float* keys = pass.store->keys(layer % pass.stored_layers, head);
  float* values = pass.store->values(layer % pass.stored_layers, head);
  const size_t bytes = static_cast<size_t>(dim) * sizeof(float);
  for (int64_t r = 0; r < count; ++r) {
    const Sequence& sequence = pass.sequences[pass.row_sequences[first + r]];
    const int64_t position = sequence.past + first + r - sequence.first_row;
    const int64_t slot = sequence.slots[position];
    const int64_t place = (scratch_row + r) * kv_width + head * dim;
    std::memcpy(values + slot * dim, scratch.values.data() + place, bytes);
    if (!stack.is_rotary) {
      std::memcpy(keys + slot * dim, scratch.keys.data() + place, bytes);
      continue;
    }
    const float *cosines = cosines_.data() + position * half, *sines = sines_.data() + position * half;
    operators_.rotate(scratch.keys.data() + place, cosines, sines, dim, keys + slot * dim);
    float* queries = pass.queries + (first + r) * query_width + head * group * dim;
    for (int64_t g = 0; g < group; ++g, queries += dim) {
      operators_.rotate(queries, cosines, sines, dim, queries);
    }
  }
}

void Model::attend(const Pass& pass, int64_t layer, int64_t head, const Sequence& sequence,
                   int64_t first, int64_t last, Scratch& own) {
  const Stack& stack = *pass.stack;
  const int64_t dim = stack.head_dim, group = stack.heads / stack.kv_heads;
  const int64_t query_width = stack.heads * dim;
  const float* keys = pass.store->keys(layer % pass.stored_layers, head);
  const float* values = pass.store->values(layer % pass.stored_layers, head);
  float* queries = pass.queries + first * query_width + head * group * dim;
  const int32_t* visible = pass.visible + first;
  if (sequence.rows < kBlockQueries) {
    for (int64_t r = 0; r < last - first; ++r) {
      for (int64_t g = 0; g < group; ++g) {
        float* query = queries + r * query_width + g * dim;
        operators_.attend(query, keys, values, sequence.slots, visible[r], dim, own.scores.data(),
                          query);
      }
    }
    return;
  }
  const int64_t num_keys = visible[last - first - 1];  // the last row sees most
  operators_.pack_keys(keys, sequence.slots, num_keys, dim, own.key_panels.data());
  operators_.pack_values(values, sequence.slots, num_keys, dim, own.value_panels.data());
  for (int64_t g = 0; g < group; ++g) {
    operators_.attend_block({queries + g * dim, query_width, last - first, visible,
                             own.key_panels.data(), own.value_panels.data(), num_keys, dim,
                             own.scores.data(), queries + g * dim, query_width});
  }
}

void Model::add_product(Team& team, const QuantizedRows& q, const TernaryMatrix& matrix, float* x,
                        int64_t rows) {
  float* product = team.scratch->product.data();
  const auto [first, last] = team.share(tiles_of(matrix.rows));
  const int64_t begin = first * kTileRows, end = std::min(last * kTileRows, matrix.rows);
  if (begin >= end) return;
  kernels_.ternary_product(&q, &matrix, first, last, product, matrix.rows);
  for (int64_t r = 0; r < rows; ++r) {
    operators_.add(x + r * matrix.rows + begin, product + r * matrix.rows + begin, end - begin);
  }
}

// Weights and experts of each row, the likeliest first.
void Model::choose_experts(Team& team, const Stack& stack, const Layer& layer, const float* x,
                           int64_t rows) {
  const bool by_itself = is_private(team, rows);
  Scratch& s = by_itself ? *team.own : *team.scratch;
  const int64_t chosen = stack.experts_per_token, width = stack.width;
  const auto num_experts = static_cast<int64_t>(layer.experts.size());
  const auto [first, last] = by_itself ? std::pair<int64_t, int64_t>{0, rows} : team.share(rows);
  for (int64_t r = first; r < last; ++r) {
    float* normed = s.normed.data() + r * width;
    float* scores = s.router_scores.data() + r * num_experts;
    float* weights = s.expert_weights.data() + r * chosen;
    int32_t* experts = s.experts.data() + r * chosen;
    operators_.rms_norm(x + r * width, layer.post_norm, config_.rms_norm_eps, width, normed);
    operators_.linear(normed, width, 1, layer.router, width, 0, num_experts, scores, num_experts);
    const float largest = *std::max_element(scores, scores + num_experts);
    float total = 0.0f;
    for (int64_t e = 0; e < num_experts; ++e) total += std::exp(scores[e] - largest);
    for (int64_t k = 0; k < chosen; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < num_experts; ++e) {
        if (std::find(experts, experts + k, static_cast<int32_t>(e)) != experts + k) continue;
        if (best < 0 || scores[e] > scores[best]) best = e;
      }
      experts[k] = static_cast<int32_t>(best);
    }
    // Several share a weight of 1; one alone weighs as much as it is likely.
    if (chosen > 1) {
      total = 0.0f;
      for (int64_t k = 0; k < chosen; ++k) total += std::exp(scores[experts[k]] - largest);
    }
    for (int64_t k = 0; k < chosen; ++k) weights[k] = std::exp(scores[experts[k]] - largest) / total;
  }
}

// Pairs of row and expert, sorted by expert.
void Model::group_pairs(const Scratch& chosen, Scratch& own, int64_t rows, const Stack& stack,
                        int64_t num_experts) {
  const int64_t per_row = stack.experts_per_token, pairs = rows * per_row;
  int64_t* starts = own.group_starts.data();
  std::fill(starts, starts + num_experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++starts[chosen.experts[p] + 1];
  for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t place = starts[chosen.experts[p]]++;
    own.pair_rows[place] = static_cast<int32_t>(p / per_row);
    own.pair_places[p] = static_cast<int32_t>(place);
  }
  for (int64_t e = num_experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}

QuantizedRows Model::gather_pairs(Team& team, const QuantizedRows& x, int64_t pairs) {
  const bool by_itself = is_private(team, x.rows);
  QuantizedRows q = pair_view(by_itself ? *team.own : *team.scratch, pairs, x.columns);
  const auto [first, last] = by_itself ? std::pair<int64_t, int64_t>{0, pairs} : team.share(pairs);
  for (int64_t p = first; p < last; ++p) {
    const int64_t row = team.own->pair_rows[p];
    std::memcpy(q.values + p * q.stride, x.values + row * x.stride, static_cast<size_t>(q.stride));
    q.scales[p] = x.scales[row];
    q.sums[p] = x.sums[row];
  }
  if (!by_itself) team.barrier();
  return q;
}

void Model::feed_forward(Team& team, const Stack& stack, const Layer& layer, float* x,
                         int64_t rows) {
  const auto num_experts = static_cast<int64_t>(layer.experts.size());
  const bool is_mixture = num_experts > 1;
  const bool by_itself = is_private(team, rows);
  const int64_t width = stack.width, inner = stack.intermediate;
  if (is_mixture) choose_experts(team, stack, layer, x, rows);
  QuantizedRows q = norm_quantize(team, x, rows, width, layer.post_norm);
  const int64_t pairs = is_mixture ? rows * stack.experts_per_token : rows;
  const Scratch& chosen = by_itself ? *team.own : *team.scratch;
  if (is_mixture) {
    group_pairs(chosen, *team.own, rows, stack, num_experts);
    q = gather_pairs(team, q, pairs);
  }
  const auto group = [&](const QuantizedRows& all, int64_t expert) {
    const int64_t first = is_mixture ? team.own->group_starts[expert] : 0;
    const int64_t last = is_mixture ? team.own->group_starts[expert + 1] : pairs;
    QuantizedRows part = all;
    part.values += first * all.stride;
    part.scales += first;
    part.sums += first;
    part.rows = last - first;
    return std::pair<int64_t, QuantizedRows>{first, part};
  };

  // gate = relu(gate)^2 * up, each thread for its own columns.
  float* gate = team.scratch->gate.data();
  float* up = team.own->up.data();
  const auto [first_tile, last_tile] = team.share(tiles_of(inner));
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const auto [first, part] = group(q, expert);
    if (part.rows == 0) continue;
    const FeedForward& weights = layer.experts[static_cast<size_t>(expert)];
    const int64_t at_once = std::max<int64_t>(1, kUpFloats / (part.rows * kTileRows));
    for (int64_t tile = first_tile; tile < last_tile; tile += at_once) {
      const int64_t tiles = std::min(at_once, last_tile - tile), begin = tile * kTileRows;
      const int64_t columns = std::min(tiles * kTileRows, inner - begin);
      float* own_gate = gate + first * inner;
      kernels_.ternary_product(&part, &weights.gate, tile, tile + tiles, own_gate, inner);
      const TernaryMatrix up_tiles = tiles_from(weights.up, tile);
      kernels_.ternary_product(&part, &up_tiles, 0, tiles, up, columns);
      for (int64_t r = 0; r < part.rows; ++r) {
        operators_.squared_relu_gate(own_gate + r * inner + begin, up + r * columns, columns);
      }
    }
  }
  team.barrier();

  if (!is_mixture) {
    q = norm_quantize(team, gate, rows, inner, layer.experts[0].sub_norm);
    add_product(team, q, layer.experts[0].down, x, rows);
    team.barrier();
    return;
  }
  q = pair_view(by_itself ? *team.own : *team.scratch, pairs, inner);
  const auto [from, to] = by_itself ? std::pair<int64_t, int64_t>{0, pairs} : team.share(pairs);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t begin = std::max(from, team.own->group_starts[expert]);
    const int64_t end = std::min(to, team.own->group_starts[expert + 1]);
    for (int64_t p = begin; p < end; ++p) {
      operators_.rms_norm_quantize(gate + p * inner,
                                   layer.experts[static_cast<size_t>(expert)].sub_norm,
                                   config_.rms_norm_eps, inner, q.stride, q.values + p * q.stride,
                                   q.scales + p, q.sums + p);
    }
  }
  if (!by_itself) team.barrier();
  float* product = team.scratch->product.data();
  const auto [first_out, last_out] = team.share(tiles_of(width));
  const int64_t begin = first_out * kTileRows;
  const int64_t columns = std::min(last_out * kTileRows, width) - begin;
  for (int64_t expert = 0; expert < num_experts && columns > 0; ++expert) {
    const auto [first, part] = group(q, expert);
    if (part.rows == 0) continue;
    kernels_.ternary_product(&part, &layer.experts[static_cast<size_t>(expert)].down, first_out,
                             last_out, product + first * width, width);
  }
  for (int64_t r = 0; r < rows && columns > 0; ++r) {
    const int32_t* places = team.own->pair_places.data() + r * stack.experts_per_token;
    const float* weights = chosen.expert_weights.data() + r * stack.experts_per_token;
    float* sum = product + places[0] * width + begin;
    operators_.scale(sum, weights[0], columns);
    for (int64_t k = 1; k < stack.experts_per_token; ++k) {
      operators_.add_scaled(sum, product + places[k] * width + begin, weights[k], columns);
    }
    operators_.add(x + r * width + begin, sum, columns);
  }
  team.barrier();
}

void Model::finish_layer(Team& team, const Pass& pass, const Layer& layer, int64_t first,
                         int64_t count) {
  const Stack& stack = *pass.stack;
  const int64_t query_width = stack.heads * stack.head_dim;
  float* x = pass.x + first * stack.width;
  const QuantizedRows q = norm_quantize(team, pass.queries + first * query_width, count,
                                        query_width, layer.attention_norm);
  add_product(team, q, layer.output, x, count);
  team.barrier();
  feed_forward(team, stack, layer, x, count);
}

void Model::run_layers(const Pass& pass, Worker& worker) {
  const Stack& stack = *pass.stack;
  const auto num_layers = static_cast<int64_t>(stack.layers.size());
  if (!pass.by_rows) {
    Team team = whole_team(worker);
    const auto [first_unit, last_unit] = team.share(pass.num_sequences * stack.kv_heads);
    for (int64_t l = 0; l < num_layers; ++l) {
      const Layer& layer = stack.layers[static_cast<size_t>(l)];
      project(team, pass, layer, 0, pass.rows);
      for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const Sequence& sequence = pass.sequences[unit / stack.kv_heads];
        const int64_t head = unit % stack.kv_heads, first = sequence.first_row;
        keep_keys(pass, l, head, *team.scratch, first, first, sequence.rows);
        attend(pass, l, head, sequence, first, first + sequence.rows, *team.own);
      }
      team.barrier();
      finish_layer(team, pass, layer, 0, pass.rows);
    }
    return;
  }
  Team team = single_team(worker);
  const auto [first, last] = worker.share(pass.rows);
  for (int64_t l = 0; l < num_layers; ++l) {
    const Layer& layer = stack.layers[static_cast<size_t>(l)];
    for (int64_t start = first; start < last; start += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, last - start);
      project(team, pass, layer, start, count);
      for (int64_t head = 0; head < stack.kv_heads; ++head) {
        keep_keys(pass, l, head, *team.scratch, 0, start, count);
      }
    }
    worker.barrier();
    if (first == last) continue;
    for (int64_t s = pass.row_sequences[first]; s <= pass.row_sequences[last - 1]; ++s) {
      const Sequence& sequence = pass.sequences[s];
      const int64_t begin = std::max(first, sequence.first_row);
      const int64_t end = std::min(last, sequence.first_row + sequence.rows);
      for (int64_t head = 0; head < stack.kv_heads; ++head) {
        attend(pass, l, head, sequence, begin, end, *team.own);
      }
    }
    for (int64_t start = first; start < last; start += kRowsAtOnce) {
      finish_layer(team, pass, layer, start, std::min(kRowsAtOnce, last - start));
    }
  }
}

}  // namespace bitgen
