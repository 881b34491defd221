// Products in plain C++, for processors without a path of their own. The loops are written so that a
// compiler turns them into the vector instructions that every processor of the architecture has.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "products.h"

namespace bitgen {
namespace portable {
namespace {

#include "products_common.inc"

constexpr int64_t kTokens = 8;  // share the unpacking of a chunk

template <typename Output>
void ternary_tiles(const QuantizedRows& x, const TernaryMatrix& matrix, int64_t first_tile,
                   int64_t last_tile, const Output& output) {
  const int64_t chunks = round_up(matrix.columns, kChunkInputs) / kChunkInputs;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const uint8_t* packed = matrix.tiles + tile * chunks * kChunkBytes;
    const int64_t row = tile * kTileRows;
    for (int64_t first = 0; first < x.rows; first += kTokens) {
      const int64_t tokens = smaller(kTokens, x.rows - first);
      int32_t sums[kTokens][kTileRows] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int16_t weights[kChunkInputs][kTileRows];
        for (int64_t f = 0; f < 4; ++f) {
          for (int64_t b = 0; b < 4; ++b) {
            for (int64_t r = 0; r < kTileRows; ++r) {
              const int code = packed[chunk * kChunkBytes + 4 * r + b] >> (2 * f) & 3;
              weights[4 * f + b][r] = static_cast<int16_t>(code - 1);
            }
          }
        }
        for (int64_t t = 0; t < tokens; ++t) {
          const int8_t* values = x.values + (first + t) * x.stride + chunk * kChunkInputs;
          int16_t partial[kTileRows] = {};  // at most 16 * 128
          for (int64_t k = 0; k < kChunkInputs; ++k) {
            const int16_t value = values[k];
            for (int64_t r = 0; r < kTileRows; ++r) {
              partial[r] = static_cast<int16_t>(partial[r] + value * weights[k][r]);
            }
          }
          for (int64_t r = 0; r < kTileRows; ++r) sums[t][r] += partial[r];
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        output.store(sums[t], first + t, row, smaller(kTileRows, matrix.rows - row));
      }
    }
  }
}

template <typename Output>
void int8_tiles(const QuantizedRows& x, const Int8Matrix& matrix, int64_t first_tile,
                int64_t last_tile, const Output& output) {
  const int64_t chunks = round_up(matrix.columns, kInt8Inputs) / kInt8Inputs;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int8_t* weights = matrix.tiles + tile * chunks * kChunkBytes;
    const int64_t row = tile * kTileRows;
    for (int64_t t = 0; t < x.rows; ++t) {
      const int8_t* values = x.values + t * x.stride;
      int32_t sums[kTileRows] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t r = 0; r < kTileRows; ++r) {
          for (int64_t b = 0; b < kInt8Inputs; ++b) {
            sums[r] += values[chunk * kInt8Inputs + b] * weights[chunk * kChunkBytes + 4 * r + b];
          }
        }
      }
      output.store(sums, t, row, smaller(kTileRows, matrix.rows - row));
    }
  }
}

int64_t read_bytes(const uint8_t* data, int64_t bytes) {
  uint64_t combined[4] = {};
  for (int64_t i = 0; i + 32 <= bytes; i += 32) {
    uint64_t words[4];
    memcpy(words, data + i, sizeof words);
    for (int w = 0; w < 4; ++w) combined[w] ^= words[w];
  }
  return static_cast<int64_t>(combined[0] ^ combined[1] ^ combined[2] ^ combined[3]);
}

// There is no instruction whose peak would be a yardstick.
int64_t multiply_registers(const uint8_t*, int64_t, int32_t*) { return 0; }

#include "products_table.inc"

}  // namespace
}  // namespace portable

const Kernels portable_kernels = portable::make_table("portable");

}  // namespace bitgen
