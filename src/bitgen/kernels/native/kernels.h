// Integer products of int8 activations with ternary or int8 weights: one table of functions for each
// instruction set, chosen when the program runs. docs/kernels.md explains the layouts.
#pragma once

#include <cstdint>

namespace bitgen {

constexpr int64_t kTileRows = 32;     // rows of a weight matrix that lie in one tile
constexpr int64_t kChunkInputs = 16;  // inputs in one chunk of a ternary tile
constexpr int64_t kChunkBytes = 128;  // 32 rows x 16 inputs x 2 bits
constexpr int64_t kInt8Inputs = 4;    // inputs in one chunk of an int8 tile, of 128 bytes too
constexpr int64_t kRowAlignment = 64;  // the stride of quantized rows is a multiple of it

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// A stride for quantized rows: an odd multiple of 64, so that the same place of several rows does
// not fall into the same set of a cache, as it would with rows of 4,096.
inline int64_t preferred_stride(int64_t columns) {
  return round_up(columns, kRowAlignment) | kRowAlignment;
}

// W = scale * (code - 1). tiles: [ceil(rows / 32)][ceil(columns / 16)][128]; byte 4r + b of a chunk
// holds in its bits 2f, 2f + 1 the code of row r, input 4f + b. Padding has code 1.
struct TernaryMatrix {
  const uint8_t* tiles;
  int64_t rows, columns;
  float scale;
};

// W = W8 * row_scales[row], W8 in [-127, 127]. tiles: [ceil(rows / 32)][ceil(columns / 4)][32][4],
// padding is 0.
struct Int8Matrix {
  const int8_t* tiles;
  const float* row_scales;
  int64_t rows, columns;
};

// Activations x ~ values / scales[row]; sums: of the values of a row. stride: bytes from one row to
// the next, a multiple of 64; what lies behind the columns is 0.
struct QuantizedRows {
  int8_t* values;
  float* scales;
  int32_t* sums;
  int64_t rows, columns, stride;
};

// A call computes the tiles [first_tile, last_tile) for all rows of x. out is [x.rows][out_stride];
// only columns below the matrix's rows are written. Ternary sums are exact up to half a million
// columns (four times 4^3 * 2 * 128 a column must fit int32), int8 sums as long as they fit int32.
struct Kernels {
  const char* name;
  // Rows [first_row, last_row) of x, whose rows are x_stride floats apart: scale = 1 / max(|x|,
  // 1e-5) * 127, values = x * scale rounded half to even. Fills values, padding, scales and sums.
  void (*quantize)(const float* x, int64_t x_stride, int64_t first_row, int64_t last_row,
                   QuantizedRows* out);
  void (*ternary_sums)(const QuantizedRows* x, const TernaryMatrix* matrix, int64_t first_tile,
                       int64_t last_tile, int32_t* out, int64_t out_stride);
  // float(sum) * (matrix.scale / x.scale)
  void (*ternary_product)(const QuantizedRows* x, const TernaryMatrix* matrix, int64_t first_tile,
                          int64_t last_tile, float* out, int64_t out_stride);
  void (*int8_sums)(const QuantizedRows* x, const Int8Matrix* matrix, int64_t first_tile,
                    int64_t last_tile, int32_t* out, int64_t out_stride);
  // float(sum) * (matrix.row_scale / x.scale)
  void (*int8_product)(const QuantizedRows* x, const Int8Matrix* matrix, int64_t first_tile,
                       int64_t last_tile, float* out, int64_t out_stride);
  // For measurements: reads memory, and multiplies registers as often as it says.
  int64_t (*read_bytes)(const uint8_t* data, int64_t bytes);
  int64_t (*multiply_registers)(const uint8_t* operands, int64_t iterations, int32_t* result);
};

// The fastest table that this processor and this build have, unless the environment variable
// BITGEN_KERNELS or bitgen_select_kernels names another.
const Kernels& kernels();

}  // namespace bitgen
