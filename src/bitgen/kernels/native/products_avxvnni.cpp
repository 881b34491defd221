// Products by AVX-VNNI, the 256-bit form of the instruction: 8 rows a vector, 16 registers.
#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "kernels.h"
#include "products.h"
#include "x86_vectors.h"

namespace bitgen {
namespace avxvnni {
namespace {

#include "products_common.inc"
#include "vectors_256.inc"

constexpr int kTokens = 6;
constexpr int kVectors = 2;
constexpr int kInPlace = 1;
constexpr int64_t kDirect = 12;
constexpr int64_t kDirectInputs = 1024;  // both halves of a tile are read while they are cached

BITGEN_INLINE DotSums dot_add(DotSums sum, Vector unsigned_bytes, Vector signed_bytes) {
  return (DotSums)_mm256_dpbusd_avx_epi32((__m256i)sum, unsigned_bytes, signed_bytes);
}

#include "products_vnni.inc"
#include "products_blocked.inc"
#include "products_measure.inc"
#include "products_table.inc"

}  // namespace
}  // namespace avxvnni

const Kernels avxvnni_kernels = avxvnni::make_table("avx-vnni");

}  // namespace bitgen
