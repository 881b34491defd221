// What a model is made of: its tensors, found by name and checked.
#include "engine_model.h"

#include <algorithm>
#include <cmath>

namespace bitgen {
namespace {

constexpr int64_t kMostOfAnything = int64_t{1} << 24;  // keeps products of sizes within int64

void require_size(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw EngineError(std::string(name) + " is " + std::to_string(value) + "; expected " +
                      std::to_string(least) + " to " + std::to_string(most) + ".");
  }
}

void check_config(const bitgen_engine_config& c) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"num_layers", c.num_layers},
      {"num_heads", c.num_heads},
      {"num_kv_heads", c.num_kv_heads},
      {"head_dim", c.head_dim},
      {"intermediate_size", c.intermediate_size},
      {"num_experts", c.num_experts},
      {"max_positions", c.max_positions},
  };
  for (const auto& [name, value] : sizes) require_size(name, value, 1, kMostOfAnything);
  require_size("experts_per_token", c.experts_per_token, 1, c.num_experts);
  require_size("attention_mode", c.attention_mode, BITGEN_PREFIX, BITGEN_BIDIRECTIONAL);
  require_size("image_size", c.image_size, 0, 1 << 16);
  require_size("num_robots", c.num_robots, 0, kMostOfAnything);
  if (c.num_heads % c.num_kv_heads != 0 || c.head_dim % 2 != 0) {
    throw EngineError("num_heads must be a multiple of num_kv_heads, and head_dim even.");
  }
  if (c.image_size == 0) return;
  require_size("patch_size", c.patch_size, 2, c.image_size);
  require_size("stem_residual_convolutions", c.stem_residual_convolutions, 0, 64);
  require_size("encoder_hidden_size", c.encoder_hidden_size, 1, kMostOfAnything);
  require_size("encoder_layers", c.encoder_layers, 1, kMostOfAnything);
  require_size("encoder_heads", c.encoder_heads, 1, c.encoder_hidden_size);
  require_size("encoder_intermediate_size", c.encoder_intermediate_size, 1, kMostOfAnything);
  if ((c.patch_size & (c.patch_size - 1)) != 0 || c.image_size % c.patch_size != 0 ||
      c.encoder_hidden_size % c.encoder_heads != 0) {
    throw EngineError(
        "patch_size must be a power of two that divides image_size, and encoder_hidden_size a"
        " multiple of encoder_heads.");
  }
}

int64_t count_of(int64_t a, int64_t b) { return a * b; }

}  // namespace

Model::Model(const bitgen_engine_config& config)
    : config_((check_config(config), config)),
      kernels_(kernels()),
      operators_(bitgen::operators()),
      decoder_passing_(2, config.num_kv_heads, config.head_dim),
      encoder_passing_(2, config.encoder_heads,
                       config.image_size == 0 ? 1
                                              : config.encoder_hidden_size / config.encoder_heads) {}

void Model::set_float(const std::string& name, const float* data, int64_t count) {
  std::lock_guard<std::mutex> guard(lock_);
  floats_[name] = {data, count};
  is_ready_ = false;
}

void Model::set_ternary(const std::string& name, const uint8_t* tiles, int64_t bytes,
                        float scale) {
  std::lock_guard<std::mutex> guard(lock_);
  ternaries_[name] = {tiles, bytes, scale};
  is_ready_ = false;
}

void Model::set_int8(const std::string& name, const int8_t* tiles, int64_t bytes,
                     const float* row_scales, int64_t rows) {
  std::lock_guard<std::mutex> guard(lock_);
  int8s_[name] = {tiles, bytes, row_scales, rows};
  is_ready_ = false;
}

const float* Model::float_tensor(const std::string& name, int64_t count) const {
  const auto found = floats_.find(name);
  if (found == floats_.end()) throw EngineError("The float tensor " + name + " is missing.");
  if (found->second.count != count) {
    throw EngineError(name + " has " + std::to_string(found->second.count) +
                      " numbers; the config asks for " + std::to_string(count) + ".");
  }
  return found->second.data;
}

TernaryMatrix Model::ternary_tensor(const std::string& name, int64_t rows,
                                    int64_t columns) const {
  const auto found = ternaries_.find(name);
  if (found == ternaries_.end()) throw EngineError("The ternary weights " + name + " are missing.");
  const int64_t bytes =
      tiles_of(rows) * (round_up(columns, kChunkInputs) / kChunkInputs) * kChunkBytes;
  if (found->second.bytes != bytes) {
    throw EngineError(name + " has " + std::to_string(found->second.bytes) +
                      " bytes of tiles; a matrix of " + std::to_string(rows) + " by " +
                      std::to_string(columns) + " takes " + std::to_string(bytes) + ".");
  }
  return {found->second.tiles, rows, columns, found->second.scale};
}

void Model::make_stack(Stack& stack, const std::string& name, int64_t num_layers,
                       int64_t num_experts) {
  const int64_t width = stack.width, query_width = stack.heads * stack.head_dim;
  const int64_t kv_width = stack.kv_heads * stack.head_dim;
  stack.layers.clear();
  for (int64_t index = 0; index < num_layers; ++index) {
    const std::string prefix = name + ".layers." + std::to_string(index) + ".";
    const std::string attention = prefix + "self_attn.";
    Layer layer{};
    layer.input_norm = float_tensor(prefix + "input_layernorm.weight", width);
    layer.query = ternary_tensor(attention + "q_proj", query_width, width);
    layer.key = ternary_tensor(attention + "k_proj", kv_width, width);
    layer.value = ternary_tensor(attention + "v_proj", kv_width, width);
    layer.attention_norm = float_tensor(attention + "attn_sub_norm.weight", query_width);
    layer.output = ternary_tensor(attention + "o_proj", width, query_width);
    layer.post_norm = float_tensor(prefix + "post_attention_layernorm.weight", width);
    if (num_experts > 1) {
      layer.router = float_tensor(prefix + "mlp.router.weight", count_of(num_experts, width));
    }
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      std::string mlp = prefix + "mlp.";
      if (num_experts > 1) mlp += "experts." + std::to_string(expert) + ".";
      layer.experts.push_back({
          ternary_tensor(mlp + "gate_proj", stack.intermediate, width),
          ternary_tensor(mlp + "up_proj", stack.intermediate, width),
          ternary_tensor(mlp + "down_proj", width, stack.intermediate),
          float_tensor(mlp + "ffn_sub_norm.weight", stack.intermediate),
      });
    }
    stack.layers.push_back(std::move(layer));
  }
  widest_input_ = std::max({widest_input_, width, query_width, stack.intermediate});
  widest_gate_ = std::max(widest_gate_, stack.intermediate);
  widest_output_ = std::max(widest_output_, width);
  widest_kv_ = std::max(widest_kv_, kv_width);
  widest_head_ = std::max(widest_head_, stack.head_dim);
  if (num_experts > 1) most_pairs_ = std::max(most_pairs_, stack.experts_per_token);
}

void Model::make_embedding() {
  const std::string name = "text_decoder.embed_tokens";
  const int64_t rows = config_.vocab_size, columns = config_.hidden_size;
  embedding_ = nullptr;
  const auto found = int8s_.find(name);
  if (found == int8s_.end()) {
    embedding_ = float_tensor(name + ".weight", count_of(rows, columns));
    return;
  }
  const int64_t chunks = round_up(columns, kInt8Inputs) / kInt8Inputs;
  const int64_t bytes = tiles_of(rows) * chunks * kChunkBytes;
  if (found->second.bytes != bytes || found->second.rows != rows) {
    throw EngineError(name + " has " + std::to_string(found->second.bytes) + " bytes of tiles and " +
                      std::to_string(found->second.rows) + " row scales; expected " +
                      std::to_string(bytes) + " and " + std::to_string(rows) + ".");
  }
  int8_embedding_ = {found->second.tiles, found->second.row_scales, rows, columns};
}

void Model::make_stem() {
  constexpr int64_t kFirstWidth = 32, kLastWidth = 256;
  constexpr double kVarianceFloor = 1e-3;
  const int64_t panel = operators_.panel_width;
  stem_.clear();
  int64_t in_channels = 3, width = kFirstWidth, side = config_.image_size, residual = 0;
  while (side > config_.image_size / config_.patch_size || residual > 0) {
    const bool is_halving = residual == 0;
    const int64_t out_channels = is_halving ? std::min(width, kLastWidth) : in_channels;
    if (is_halving) {
      residual = width == kFirstWidth ? 0 : config_.stem_residual_convolutions;
      width *= 2;
      side /= 2;
    } else {
      --residual;
    }
    const std::string stem = "image_encoder.stem.", number = std::to_string(stem_.size());
    const std::string norm = stem + "norms." + number + ".";
    const float* weight = float_tensor(stem + "convolutions." + number + ".weight",
                                       count_of(out_channels * in_channels, 9));
    const float* gain = float_tensor(norm + "weight", out_channels);
    const float* bias = float_tensor(norm + "bias", out_channels);
    const float* mean = float_tensor(norm + "running_mean", out_channels);
    const float* variance = float_tensor(norm + "running_var", out_channels);
    StemConvolution made{{}, {}, in_channels, out_channels, side, is_halving ? 2 : 1};
    const int64_t padded = round_up(out_channels, panel), inputs = 9 * in_channels;
    made.panels.ensure(padded * inputs);
    made.bias.ensure(padded);
    for (int64_t n = 0; n < padded; ++n) {
      const bool is_channel = n < out_channels;
      const double factor =
          is_channel ? gain[n] / std::sqrt(static_cast<double>(variance[n]) + kVarianceFloor) : 0.0;
      made.bias[n] = is_channel ? static_cast<float>(bias[n] - mean[n] * factor) : 0.0f;
      float* column = made.panels.data() + n / panel * panel * inputs + n % panel;
      for (int64_t place = 0; place < 9; ++place) {  // 3y + x
        for (int64_t c = 0; c < in_channels; ++c) {
          column[(place * in_channels + c) * panel] =
              is_channel
                  ? static_cast<float>(weight[(n * in_channels + c) * 9 + place] * factor)
                  : 0.0f;
        }
      }
    }
    stem_.push_back(std::move(made));
    in_channels = out_channels;
  }
  patch_norm_ = float_tensor("image_encoder.patch_norm.weight", in_channels);
  patch_embedding_ =
      ternary_tensor("image_encoder.patch_embedding", config_.encoder_hidden_size, in_channels);
  widest_input_ = std::max(widest_input_, in_channels);
}

void Model::make_ready() {
  std::lock_guard<std::mutex> guard(lock_);
  const bitgen_engine_config& c = config_;
  widest_input_ = widest_gate_ = widest_output_ = widest_kv_ = widest_head_ = 0;
  most_pairs_ = 1;
  decoder_ = {c.hidden_size,       c.num_heads,         c.num_kv_heads, c.head_dim,
              c.intermediate_size, c.experts_per_token, true,           {}};
  make_stack(decoder_, "text_decoder", c.num_layers, c.num_experts);
  final_norm_ = float_tensor("text_decoder.norm.weight", c.hidden_size);
  make_embedding();

  const int64_t half = c.head_dim / 2;
  cosines_.ensure(c.max_positions * half);
  sines_.ensure(c.max_positions * half);
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(c.head_dim);
    const double frequency = 1.0 / std::pow(c.rope_theta, exponent);
    for (int64_t position = 0; position < c.max_positions; ++position) {
      const double angle = static_cast<double>(position) * frequency;
      cosines_[position * half + i] = static_cast<float>(std::cos(angle));
      sines_[position * half + i] = static_cast<float>(std::sin(angle));
    }
  }

  task_norm_ = float_tensor("robot_selector.task_norm.weight", c.hidden_size);
  robot_norm_ = float_tensor("robot_selector.robot_norm.weight", c.hidden_size);
  task_projection_ = ternary_tensor("robot_selector.task_proj", c.hidden_size, c.hidden_size);
  robot_projection_ = ternary_tensor("robot_selector.robot_proj", c.hidden_size, c.hidden_size);
  shared_bias_ = *float_tensor("robot_selector.shared_bias", 1);
  robot_bias_ =
      c.num_robots > 0 ? float_tensor("robot_selector.robot_bias", c.num_robots) : nullptr;

  if (c.image_size > 0) {
    const int64_t width = c.encoder_hidden_size, side = c.image_size / c.patch_size;
    num_patches_ = side * side;
    encoder_ = {width, c.encoder_heads, c.encoder_heads, width / c.encoder_heads,
                c.encoder_intermediate_size, 1, false, {}};
    make_stem();
    make_stack(encoder_, "image_encoder", c.encoder_layers, 1);
    position_embedding_ =
        float_tensor("image_encoder.position_embedding", count_of(num_patches_, width));
    projector_input_norm_ = float_tensor("projector.input_norm.weight", width);
    projector_up_ = ternary_tensor("projector.up_proj", c.hidden_size, width);
    projector_sub_norm_ = float_tensor("projector.sub_norm.weight", c.hidden_size);
    projector_down_ = ternary_tensor("projector.down_proj", c.hidden_size, c.hidden_size);
    widest_gate_ = std::max(widest_gate_, c.hidden_size);
  }
  is_ready_ = true;
}

void Model::require_ready() const {
  if (!is_ready_) throw EngineError("The engine's tensors are not all set: call ready first.");
}

std::unique_ptr<KeyValueStore> Model::new_store() const {
  return std::make_unique<KeyValueStore>(config_.num_layers, config_.num_kv_heads,
                                         config_.head_dim);
}

}  // namespace bitgen
