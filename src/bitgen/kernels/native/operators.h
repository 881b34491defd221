// Everything of the model that is computed in float: one table of functions for each instruction
// set. What a function computes for one row does not depend on the rows beside it, bit for bit.
#pragma once

#include <cstdint>

namespace bitgen {

// Attention of several query rows of one head to the keys and values of one sequence.
struct AttentionBlock {
  const float* queries;      // row r at queries + r * query_stride; out may be the same memory
  int64_t query_stride;
  int64_t rows;
  const int32_t* visible;    // row r sees the keys [0, visible[r]), at least one
  const float* keys;         // of pack_keys
  const float* values;       // of pack_values
  int64_t num_keys;          // in keys and values; at least every visible[r]
  int64_t head_dim;
  float* scores;             // room for row_block * round_up(num_keys, panel_width)
  float* out;
  int64_t out_stride;
};

// A 3x3 convolution with stride 2 over a picture with a border of one zero pixel, channels last;
// bias and ReLU follow.
struct Convolution {
  const float* input;        // [height + 2][width + 2][in_channels], with a border of zeros
  int64_t input_row;         // floats from one row of the input to the next
  int64_t in_channels;
  const float* panels;       // [ceil(out_channels / panel_width)][9 * in_channels][panel_width]
  const float* bias;         // [round_up(out_channels, panel_width)]
  int64_t out_channels;
  int64_t out_width;
  float* out;                // pixel (y, x) at out + y * out_row + x * out_channels
  int64_t out_row;
  int64_t stride;            // 1 or 2
  bool is_residual;          // add the input, which has as many channels: stride 1 alone
};

struct Operators {
  const char* name;
  int64_t panel_width;       // floats of a panel's row
  int64_t row_block;         // rows that are computed together

  // out = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // rms_norm, then quantized as Kernels::quantize does it; values behind n are 0 up to stride.
  void (*rms_norm_quantize)(const float* x, const float* weight, float eps, int64_t n,
                            int64_t stride, int8_t* values, float* scale, int32_t* sum);
  void (*add)(float* x, const float* y, int64_t n);                        // x += y
  void (*add_scaled)(float* x, const float* y, float factor, int64_t n);   // x += factor * y
  void (*scale)(float* x, float factor, int64_t n);                        // x *= factor
  void (*squared_relu)(float* x, int64_t n);                               // x = relu(x)^2
  void (*squared_relu_gate)(float* gate, const float* up, int64_t n);      // gate = relu(gate)^2 * up
  // Turns each pair (x[i], x[i + n / 2]) by its angle; cos and sin have n / 2 numbers.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t n, float* out);
  // out[r][j] = x[r] . weights[j] for j in [first, last); weights [.., n], rows one after the other.
  void (*linear)(const float* x, int64_t x_stride, int64_t rows, const float* weights, int64_t n,
                 int64_t first, int64_t last, float* out, int64_t out_stride);
  // One query row of a head over keys and values [slot][head_dim]; key i lies in slot slots[i].
  // scores: room for 16 numbers more than there are keys. out may be the query.
  void (*attend)(const float* query, const float* keys, const float* values, const int32_t* slots,
                 int64_t num_keys, int64_t head_dim, float* scores, float* out);
  // Keys as [ceil(num_keys / panel_width)][head_dim][panel_width], values as
  // [ceil(head_dim / panel_width)][num_keys][panel_width], with zeros where there is none.
  void (*pack_keys)(const float* keys, const int32_t* slots, int64_t num_keys, int64_t head_dim,
                    float* out);
  void (*pack_values)(const float* values, const int32_t* slots, int64_t num_keys,
                      int64_t head_dim, float* out);
  void (*attend_block)(const AttentionBlock& block);
  // The output pixels [first_pixel, last_pixel), counted row by row.
  void (*convolve)(const Convolution& convolution, int64_t first_pixel, int64_t last_pixel);
  // The largest of x, and the sum of exp(x - largest); n at least 1.
  void (*exp_sum)(const float* x, int64_t n, float* largest, float* sum);
  // The largest x[i] + added[i], and the first i that has it; n at least 1.
  void (*argmax)(const float* x, const float* added, int64_t n, float* largest, int64_t* index);
  // out = exp((x - shift) / temperature) for x up to shift; exactly 0 for -inf.
  void (*exp_shifted)(const float* x, float shift, float temperature, int64_t n, float* out);
};

// Those of the instruction set that kernels() has chosen.
const Operators& operators();

}  // namespace bitgen
