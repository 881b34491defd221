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
#if defined(__GNUC__)
typedef int32_t DotSums __attribute__((vector_size(64)));
#else
using DotSums = __m512i;
#endif

constexpr int kTokens = 8;
constexpr int kVectors = 2;
constexpr int kInPlace = 2;
// Taking codes apart keeps pace with the products: unpacking once for all rows was 5% slower (Zen 4).
constexpr int64_t kDirect = int64_t{1} << 40;
constexpr int64_t kDirectInputs = int64_t{1} << 40;  // sums never overflow, a tile is one stream

BITGEN_INLINE Vector load(const uint8_t* source) { return _mm512_loadu_si512(source); }
BITGEN_INLINE void store(uint8_t* target, Vector v) { _mm512_storeu_si512(target, v); }
BITGEN_INLINE Vector zero() { return _mm512_setzero_si512(); }
BITGEN_INLINE Vector broadcast(const int8_t* four) {
  int32_t value;
  memcpy(&value, four, sizeof value);
  return _mm512_set1_epi32(value);
}
BITGEN_INLINE Vector bit_and(Vector v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
// From here on the compiler does not know what is in it.
BITGEN_INLINE void hide(Vector& v) {
#if defined(__GNUC__)
  __asm__("" : "+v"(v));
#else
  static_cast<void>(v);
#endif
}
BITGEN_INLINE Vector bit_xor(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
BITGEN_INLINE Vector flip_high_bits(Vector v) {
  return bit_xor(v, _mm512_set1_epi8(static_cast<char>(0x80)));
}
template <int kBits>
BITGEN_INLINE Vector shift_bits(Vector v) {
  return _mm512_srli_epi32(v, kBits);
}
template <int kBits>
BITGEN_INLINE DotSums shift_sums(DotSums v) {
  return (DotSums)_mm512_srai_epi32((__m512i)v, kBits);
}
BITGEN_INLINE DotSums add(DotSums a, DotSums b) {
  return (DotSums)_mm512_add_epi32((__m512i)a, (__m512i)b);
}
BITGEN_INLINE DotSums dot_add(DotSums sum, Vector unsigned_bytes, Vector signed_bytes) {
  return (DotSums)_mm512_dpbusd_epi32((__m512i)sum, unsigned_bytes, signed_bytes);
}
BITGEN_INLINE DotSums fill(int32_t value) { return (DotSums)_mm512_set1_epi32(value); }
BITGEN_INLINE DotSums load_sums(const int32_t* sums) {
  return (DotSums)_mm512_loadu_si512(sums);
}
BITGEN_INLINE void store_sums(int32_t* sums, DotSums v) { _mm512_storeu_si512(sums, (__m512i)v); }

#include "products_vnni.inc"
#include "products_blocked.inc"
#include "products_measure.inc"
#include "products_table.inc"

}  // namespace
}  // namespace avx512

const Kernels avx512_kernels = avx512::make_table("avx512-vnni");

}  // namespace bitgen
