// The float operators for processors with AVX-512 (F, BW, DQ, VL).
#include <math.h>
#include <string.h>

#include "operators_tables.h"
#include "x86_vectors.h"

namespace bitgen {
namespace avx512_operators {
namespace {

const char* const kOperatorsName = "avx512";

struct Vector {
  static constexpr int kLanes = 16;
  static constexpr int kDotRows = 4, kDotColumns = 4;  // sums that registers hold
  static constexpr int kRowBlock = 8;
  __m512 v;

  static __mmask16 mask_of(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector load_part(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(mask_of(count), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_part(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, mask_of(count), v); }
  static void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static Vector all(float x) { return {_mm512_set1_ps(x)}; }
  static Vector add(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vector sub(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vector mul(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vector div(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vector abs(Vector a) { return {_mm512_abs_ps(a.v)}; }
  static Vector round(Vector a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static Vector scale_by_power(Vector a, Vector n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  // value where x >= limit, else 0
  static Vector zero_below(Vector x, Vector limit, Vector value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_GE_OQ), value.v)};
  }
  static float sum(Vector a) { return _mm512_reduce_add_ps(a.v); }
  static float largest(Vector a) { return _mm512_reduce_max_ps(a.v); }
  // Rounds to whole numbers, half to even, in [-128, 127], and writes them; returns them.
  static Vector store_int8(Vector a, int8_t* out) {
    const __m512 above = _mm512_max_ps(a.v, _mm512_set1_ps(-128.0f));  // -128 for NaN too
    const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(above, _mm512_set1_ps(127.0f)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(whole));
    return {_mm512_cvtepi32_ps(whole)};
  }
  // The sums of 16 registers.
  static void sums(const Vector* x, float* out) {
    __m512 pairs[8], quads[4];
    for (int i = 0; i < 8; ++i) {
      const __m512 a = x[2 * i].v, b = x[2 * i + 1].v;
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // Each 128-bit part of quads[i] holds partial sums of the registers 4i .. 4i + 3.
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                   _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88),
                                        _mm512_shuffle_f32x4(a, b, 0xdd)));
  }
};

#include "operators.inc"

}  // namespace

const Operators& table() { return kTable; }

}  // namespace avx512_operators
}  // namespace bitgen
