// Products by NEON with the dot product of ARMv8.2: 4 rows a vector, 32 registers. The instruction
// multiplies signed bytes.
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "kernels.h"
#include "products.h"

namespace bitgen {
namespace neon {
namespace {

#include "products_common.inc"

using Vector = int8x16_t;
using DotSums = int32x4_t;

constexpr int kTokens = 4;
constexpr int kVectors = 4;
constexpr int kInPlace = 1;
constexpr int64_t kDirect = 8;
constexpr int64_t kDirectInputs = 1024;  // all parts of a tile are read while they are cached

BITGEN_INLINE Vector load(const uint8_t* source) { return vreinterpretq_s8_u8(vld1q_u8(source)); }
BITGEN_INLINE void store(uint8_t* target, Vector v) { vst1q_u8(target, vreinterpretq_u8_s8(v)); }
BITGEN_INLINE Vector zero() { return vdupq_n_s8(0); }
BITGEN_INLINE Vector broadcast(const int8_t* four) {
  int32_t value;
  memcpy(&value, four, sizeof value);
  return vreinterpretq_s8_s32(vdupq_n_s32(value));
}
template <int kBits>
BITGEN_INLINE Vector shift_bytes(Vector v) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), kBits));
}
BITGEN_INLINE Vector bit_and(Vector v, int mask) {
  return vandq_s8(v, vdupq_n_s8(static_cast<int8_t>(mask)));
}
// From here on the compiler does not know what is in it.
BITGEN_INLINE void hide(Vector& v) {
#if defined(__GNUC__)
  __asm__("" : "+w"(v));
#else
  static_cast<void>(v);
#endif
}
BITGEN_INLINE Vector bit_xor(Vector a, Vector b) { return veorq_s8(a, b); }
BITGEN_INLINE DotSums add(DotSums a, DotSums b) { return vaddq_s32(a, b); }
BITGEN_INLINE DotSums fill(int32_t value) { return vdupq_n_s32(value); }
BITGEN_INLINE DotSums load_sums(const int32_t* sums) { return vld1q_s32(sums); }
BITGEN_INLINE void store_sums(int32_t* sums, DotSums v) { vst1q_s32(sums, v); }

struct TernaryShifted {
  using Sums = DotSums;
  static constexpr int64_t kInputs = kChunkInputs;
  static constexpr int64_t kBlockInputs = kDirectInputs;
  static constexpr int kAccumulators = 1;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    if constexpr (f == 0) return bit_and(codes, 3);
    else if constexpr (f == 3) return shift_bytes<6>(codes);
    else return bit_and(shift_bytes<2 * f>(codes), 3);
  }
  static BITGEN_INLINE Sums multiply_add(Sums sum, Vector codes, Vector x) {
    return vdotq_s32(sum, codes, x);
  }
  static BITGEN_INLINE Sums total(const Sums (&acc)[kAccumulators]) { return acc[0]; }
  static BITGEN_INLINE DotSums to_32_bits(Sums total) { return total; }
};

// The highest field in place would be negative, so that one is shifted.
struct TernaryInPlace : TernaryShifted {
  static constexpr int kAccumulators = 4;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    if constexpr (f == 3) return shift_bytes<6>(codes);
    else return bit_and(codes, 3 << (2 * f));
  }
  static BITGEN_INLINE Sums total(const Sums (&acc)[kAccumulators]) {
    return add(add(acc[0], acc[3]), add(vshrq_n_s32(acc[1], 2), vshrq_n_s32(acc[2], 4)));
  }
};

struct TernaryUnpacked : TernaryShifted {
  static constexpr int64_t kInputs = kInt8Inputs;

  template <int f>
  static BITGEN_INLINE Vector field(Vector codes) {
    return codes;
  }
};

constexpr int32_t kInt8Offset = 0;
using Int8 = TernaryUnpacked;

#include "products_blocked.inc"
#include "products_measure.inc"
#include "products_table.inc"

}  // namespace
}  // namespace neon

const Kernels neon_kernels = neon::make_table("neon-dotprod");

}  // namespace bitgen
