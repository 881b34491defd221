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

// 16-bit sums of a code times an activation for each byte of a chunk, four products a chunk and none
// below -2 * 128: after 32 chunks they are added to 32-bit sums.
constexpr int64_t kChunksOfBlock = 32;

// partial [128] += field f of 128 bytes * the four activations, one for each byte of a row.
template <int f>
inline void add_field(const uint8_t* packed, const int8_t* x, int16_t* partial) {
  const int16_t inputs[8] = {x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]};
  for (int64_t i = 0; i < kChunkBytes; i += 8) {
    for (int64_t b = 0; b < 8; ++b) {
      const int16_t code = packed[i + b] >> (2 * f) & 3;
      partial[i + b] = static_cast<int16_t>(partial[i + b] + code * inputs[b]);
    }
  }
}

template <typename Output>
void ternary_tiles(const QuantizedRows& x, const TernaryMatrix& matrix, int64_t first_tile,
                   int64_t last_tile, const Output& output) {
  const int64_t chunks = round_up(matrix.columns, kChunkInputs) / kChunkInputs;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const uint8_t* packed = matrix.tiles + tile * chunks * kChunkBytes;
    const int64_t row = tile * kTileRows;
    for (int64_t t = 0; t < x.rows; ++t) {
      const int8_t* values = x.values + t * x.stride;
      int32_t sums[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) sums[r] = -x.sums[t];
      for (int64_t first = 0; first < chunks; first += kChunksOfBlock) {
        int16_t partial[kChunkBytes] = {};
        for (int64_t chunk = first; chunk < smaller(first + kChunksOfBlock, chunks); ++chunk) {
          const uint8_t* bytes = packed + chunk * kChunkBytes;
          const int8_t* inputs = values + chunk * kChunkInputs;
          add_field<0>(bytes, inputs, partial);
          add_field<1>(bytes, inputs + 4, partial);
          add_field<2>(bytes, inputs + 8, partial);
          add_field<3>(bytes, inputs + 12, partial);
        }
        for (int64_t i = 0; i < kChunkBytes; ++i) sums[i / 4] += partial[i];
      }
      output.store(sums, t, row, smaller(kTileRows, matrix.rows - row));
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
