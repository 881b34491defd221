// The float operators for processors with AVX2 and FMA.
#include <math.h>
#include <string.h>

#include "operators_tables.h"
#include "x86_vectors.h"

namespace bitgen {
namespace avx2_operators {
namespace {

const char* const kOperatorsName = "avx2";

struct Vector {
  static constexpr int kLanes = 8;
  static constexpr int kDotRows = 2, kDotColumns = 4;  // sums that registers hold
  static constexpr int kRowBlock = 6;
  __m256 v;

  static __m256i mask_of(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
  }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vector load_part(const float* p, int64_t count) {
    return {_mm256_maskload_ps(p, mask_of(count))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_part(float* p, int64_t count) const { _mm256_maskstore_ps(p, mask_of(count), v); }
  static void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static Vector all(float x) { return {_mm256_set1_ps(x)}; }
  static Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vector mul(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vector div(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vector abs(Vector a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vector round(Vector a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static Vector scale_by_power(Vector a, Vector n) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shift))};
  }
  // value where x >= limit, else 0
  static Vector zero_below(Vector x, Vector limit, Vector value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_GE_OQ), value.v)};
  }
  static float sum(Vector a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float largest(Vector a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // Rounds to whole numbers, half to even, in [-128, 127], and writes them; returns them.
  static Vector store_int8(Vector a, int8_t* out) {
    const __m256 above = _mm256_max_ps(a.v, _mm256_set1_ps(-128.0f));  // -128 for NaN too
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(above, _mm256_set1_ps(127.0f)));
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
    return {_mm256_cvtepi32_ps(whole)};
  }
  // The sums of 8 registers.
  static void sums(const Vector* x, float* out) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                        _mm256_permute2f128_ps(a, b, 0x31)));
  }
};

#include "operators.inc"

}  // namespace

const Operators& table() { return kTable; }

}  // namespace avx2_operators
}  // namespace bitgen
