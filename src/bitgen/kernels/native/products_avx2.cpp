// Products by AVX2: 8 rows a vector, 16 registers. vpmaddubsw adds two products to a 16-bit lane and
// would saturate; the blocks are so short that 16 bits always hold the sums.
#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "kernels.h"
#include "products.h"
#include "x86_vectors.h"

namespace bitgen {
namespace avx2 {
namespace {

#include "products_common.inc"
#include "vectors_256.inc"

constexpr int kTokens = 4;
constexpr int kVectors = 2;
constexpr int kInPlace = 1;
constexpr int64_t kDirect = 4;

#if defined(__GNUC__)
typedef int16_t PairSums __attribute__((vector_size(32)));
#else
using PairSums = __m256i;
#endif

BITGEN_INLINE PairSums add_pairs(PairSums a, PairSums b) {
#if defined(__GNUC__)
  return a + b;
#else
  return _mm256_add_epi16(a, b);
#endif
}
BITGEN_INLINE PairSums quarter(PairSums v) { return (PairSums)_mm256_srai_epi16((__m256i)v, 2); }
BITGEN_INLINE DotSums add_neighbours(Vector pairs) {
  return (DotSums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// A pair of products is at least -2 * 2 * 128 = -512, and 64 of them are -32,768. Here each of four
// accumulators takes 16 pairs, two of them times 4.
struct TernaryInPlace {
  using Sums = PairSums;
  static constexpr int64_t kInputs = kChunkInputs;
  static constexpr int64_t kBlockInputs = 256;
  static constexpr int kAccumulators = 4;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    if constexpr (f >= 2) codes = shift_bits<4>(codes);
    return bit_and(codes, f % 2 == 0 ? 0x03 : 0x0c);
  }
  static BITGEN_INLINE Sums multiply_add(Sums sum, Vector codes, Vector x) {
    return add_pairs(sum, (PairSums)_mm256_maddubs_epi16(codes, x));
  }
  static BITGEN_INLINE Sums total(const Sums (&acc)[kAccumulators]) {
    return add_pairs(add_pairs(acc[0], acc[2]), add_pairs(quarter(acc[1]), quarter(acc[3])));
  }
  static BITGEN_INLINE DotSums to_32_bits(Sums total) { return add_neighbours((Vector)total); }
};

// 64 pairs in one accumulator.
struct TernaryShifted {
  using Sums = PairSums;
  static constexpr int64_t kInputs = kChunkInputs;
  static constexpr int64_t kBlockInputs = 256;
  static constexpr int kAccumulators = 1;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    return bit_and(shift_bits<2 * f>(codes), 3);
  }
  static BITGEN_INLINE Sums multiply_add(Sums sum, Vector codes, Vector x) {
    return TernaryInPlace::multiply_add(sum, codes, x);
  }
  static BITGEN_INLINE Sums total(const Sums (&acc)[kAccumulators]) { return acc[0]; }
  static BITGEN_INLINE DotSums to_32_bits(Sums total) { return add_neighbours((Vector)total); }
};

struct TernaryUnpacked : TernaryShifted {
  static constexpr int64_t kInputs = kInt8Inputs;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    return codes;
  }
};

constexpr int32_t kInt8Offset = 0;

// |x| is unsigned and at most 128, w with the sign of x at most 127: 2 * 128 * 127 fits 16 bits.
struct Int8 {
  using Sums = DotSums;
  static constexpr int64_t kInputs = kInt8Inputs;
  static constexpr int64_t kBlockInputs = 256;
  static constexpr int kAccumulators = 1;

  template <int f>
  static BITGEN_INLINE Vector field(Vector weights) {
    return weights;
  }
  static BITGEN_INLINE Sums multiply_add(Sums sum, Vector weights, Vector x) {
    const Vector pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
    return add(sum, add_neighbours(pairs));
  }
  static BITGEN_INLINE Sums total(const Sums (&acc)[kAccumulators]) { return acc[0]; }
  static BITGEN_INLINE DotSums to_32_bits(Sums total) { return total; }
};

#include "products_blocked.inc"
#include "products_measure.inc"
#include "products_table.inc"

}  // namespace
}  // namespace avx2

const Kernels avx2_kernels = avx2::make_table("avx2");

}  // namespace bitgen
