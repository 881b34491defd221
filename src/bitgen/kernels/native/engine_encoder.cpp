// Pictures to image tokens: the stem's convolutions, the vision transformer and the projector.
#include <algorithm>

#include "engine_model.h"

namespace bitgen {
namespace {

constexpr int64_t kPicturesAtOnce = 16;  // bounds the memory of a pass

}  // namespace

// The inputs of the convolutions, with a border of zeros that nothing writes to.
void Model::prepare_pictures(Scratch& scratch) const {
  if (!scratch.pictures.empty()) return;
  for (const StemConvolution& c : stem_) {
    const int64_t side = c.padded_width(), size = side * side * c.in_channels;
    AlignedArray<float> input;
    std::fill_n(input.ensure(size), size, 0.0f);
    scratch.pictures.push_back(std::move(input));
  }
}

// One picture uint8 [3][side][side] through the convolutions, to [patches][channels].
void Model::run_stem_of(Team& team, const uint8_t* pixels, float* out) {
  const int64_t side = config_.image_size, padded = side + 2;
  std::vector<AlignedArray<float>>& inputs = team.scratch->pictures;
  const auto [first_row, last_row] = team.share(side);
  for (int64_t channel = 0; channel < 3; ++channel) {
    float levels[256];
    for (int level = 0; level < 256; ++level) {
      levels[level] = (static_cast<float>(level) / 255.0f - config_.image_mean[channel]) /
                      config_.image_std[channel];
    }
    for (int64_t y = first_row; y < last_row; ++y) {
      const uint8_t* row = pixels + (channel * side + y) * side;
      float* to = inputs[0].data() + ((y + 1) * padded + 1) * 3 + channel;
      for (int64_t x = 0; x < side; ++x) to[3 * x] = levels[row[x]];
    }
  }
  for (size_t index = 0; index < stem_.size(); ++index) {
    team.barrier();
    const StemConvolution& c = stem_[index];
    const bool is_last = index + 1 == stem_.size();
    const int64_t in_row = c.padded_width() * c.in_channels;
    const int64_t border = is_last ? 0 : 1, out_row = (c.out_width + 2 * border) * c.out_channels;
    float* to = is_last ? out : inputs[index + 1].data();
    const Convolution convolution{inputs[index].data(),
                                  in_row,
                                  c.in_channels,
                                  c.panels.data(),
                                  c.bias.data(),
                                  c.out_channels,
                                  c.out_width,
                                  to + border * (out_row + c.out_channels),
                                  out_row,
                                  c.stride,
                                  c.is_residual()};
    const auto [first, last] = team.share(c.out_width * c.out_width);
    operators_.convolve(convolution, first, last);
  }
  team.barrier();
}

// As many whole pictures for each thread as can be shared evenly, the rest by all of them.
void Model::run_stem(Worker& worker, const uint8_t* pixels, int64_t count) {
  const int64_t bytes = 3 * config_.image_size * config_.image_size;
  const int64_t floats = num_patches_ * stem_.back().out_channels;
  const int64_t each = count / worker.count;
  Team single = single_team(worker);
  for (int64_t i = each * worker.index; i < each * (worker.index + 1); ++i) {
    run_stem_of(single, pixels + i * bytes, stem_out_.data() + i * floats);
  }
  Team whole = whole_team(worker);
  for (int64_t i = each * worker.count; i < count; ++i) {
    run_stem_of(whole, pixels + i * bytes, stem_out_.data() + i * floats);
  }
  worker.barrier();
}

void Model::run_projector(Team& team, const float* x, int64_t rows, float* tokens) {
  const int64_t width = config_.hidden_size;
  QuantizedRows q =
      norm_quantize(team, x, rows, config_.encoder_hidden_size, projector_input_norm_);
  float* hidden = team.scratch->gate.data();
  const auto [first, last] = team.share(tiles_of(width));
  const int64_t begin = first * kTileRows, columns = std::min(last * kTileRows, width) - begin;
  kernels_.ternary_product(&q, &projector_up_, first, last, hidden, width);
  for (int64_t r = 0; r < rows && columns > 0; ++r) {
    operators_.squared_relu(hidden + r * width + begin, columns);
  }
  team.barrier();
  q = norm_quantize(team, hidden, rows, width, projector_sub_norm_);
  kernels_.ternary_product(&q, &projector_down_, first, last, tokens, width);
  team.barrier();
}

void Model::encode_images(const uint8_t* pixels, int64_t count, float* tokens) {
  std::lock_guard<std::mutex> guard(lock_);
  require_ready();
  if (config_.image_size == 0) throw EngineError("This engine has no image encoder.");
  const int64_t width = encoder_.width, stem_width = stem_.back().out_channels;
  const int64_t patches = num_patches_;
  for (int64_t start = 0; start < count; start += kPicturesAtOnce) {
    const int64_t now = std::min(kPicturesAtOnce, count - start), rows = now * patches;
    x_.ensure(rows * width);
    queries_.ensure(rows * width);
    stem_out_.ensure(rows * stem_width);
    encoder_passing_.grow(rows);
    row_sequences_.ensure(rows);
    visible_.ensure(rows);
    plain_slots_.ensure(rows);
    sequences_.clear();
    for (int64_t i = 0; i < now; ++i) {
      sequences_.push_back({i * patches, patches, 0, patches, plain_slots_.data() + i * patches});
    }
    for (int64_t r = 0; r < rows; ++r) {
      row_sequences_[r] = static_cast<int32_t>(r / patches);
      visible_[r] = static_cast<int32_t>(patches);
      plain_slots_[r] = static_cast<int32_t>(r);
    }
    const uint8_t* first_pixel = pixels + start * 3 * config_.image_size * config_.image_size;
    float* out = tokens + start * patches * config_.hidden_size;
    run(rows, patches, true, [&](Worker& worker, bool by_rows) {
      run_stem(worker, first_pixel, now);
      for_rows(worker, by_rows, rows, [&](Team& team, int64_t first, int64_t rows_now) {
        const QuantizedRows q = norm_quantize(team, stem_out_.data() + first * stem_width, rows_now,
                                              stem_width, patch_norm_);
        const auto [begin, end] = team.share(tiles_of(width));
        const int64_t columns = std::min(end * kTileRows, width) - begin * kTileRows;
        kernels_.ternary_product(&q, &patch_embedding_, begin, end, x_.data() + first * width,
                                 width);
        for (int64_t r = first; r < first + rows_now && columns > 0; ++r) {
          const int64_t place = begin * kTileRows;
          operators_.add(x_.data() + r * width + place,
                         position_embedding_ + r % patches * width + place, columns);
        }
        team.barrier();
      });
      const Pass pass{&encoder_,         x_.data(), queries_.data(),       rows,
                      sequences_.data(), now,       row_sequences_.data(), visible_.data(),
                      &encoder_passing_, 2,         by_rows};
      run_layers(pass, worker);
      for_rows(worker, by_rows, rows, [&](Team& team, int64_t first, int64_t rows_now) {
        run_projector(team, x_.data() + first * width, rows_now,
                      out + first * config_.hidden_size);
      });
    });
  }
}

}  // namespace bitgen
