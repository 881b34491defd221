// Products by AVX-512 VNNI: 16 rows a vector, 32 registers.
#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "kernels.h"
#include "products.h"
#include "x86_vectors.h"

namespace bitgen {
namespace avx512 {
namespace {

#include "products_common.inc"

using Vector = __m512i;
using Sums = __m512i;

constexpr int kTokens = 8;
constexpr int kVectors = 2;
constexpr int kInPlace = 2;
constexpr int64_t kDirect = 16;
constexpr int64_t kDirectInputs = int64_t{1} << 40;  // sums never overflow, a tile is one stream

BITGEN_INLINE Vector load(const uint8_t* source) { return _mm512_loadu_si512(source); }
BITGEN_INLINE void store(uint8_t* target, Vector v) { _mm512_storeu_si512(target, v); }
BITGEN_INLINE Sums zero() { return _mm512_setzero_si512(); }
BITGEN_INLINE Vector broadcast(const int8_t* four) {
  int32_t value;
  memcpy(&value, four, sizeof value);
  return _mm512_set1_epi32(value);
}
BITGEN_INLINE Vector bit_and(Vector v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
BITGEN_INLINE Vector flip_high_bits(Vector v) {
  return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
}
template <int kBits>
BITGEN_INLINE Vector shift_bits(Vector v) {
  return _mm512_srli_epi32(v, kBits);
}
template <int kBits>
BITGEN_INLINE Sums shift_sums(Sums v) {
  return _mm512_srai_epi32(v, kBits);
}
BITGEN_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
BITGEN_INLINE Sums dot_add(Sums sum, Vector unsigned_bytes, Vector signed_bytes) {
  return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
}
BITGEN_INLINE void add_to(int32_t* sums, Sums v) {
  _mm512_storeu_si512(sums, add(_mm512_loadu_si512(sums), v));
}

#include "products_vnni.inc"
#include "products_blocked.inc"
#include "products_table.inc"

}  // namespace
}  // namespace avx512

const Kernels avx512_kernels = avx512::make_table("avx512-vnni");

}  // namespace bitgen
