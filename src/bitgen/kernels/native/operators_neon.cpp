// The float operators for 64-bit ARM processors.
#include "operators_tables.h"

#include <arm_neon.h>
#include <math.h>
#include <string.h>

namespace bitgen {
namespace neon_operators {
namespace {

const char* const kOperatorsName = "neon";

struct Vector {
  static constexpr int kLanes = 4;
  static constexpr int kDotRows = 4, kDotColumns = 4;  // sums that registers hold
  static constexpr int kRowBlock = 8;
  float32x4_t v;

  static Vector load(const float* p) { return {vld1q_f32(p)}; }
  static Vector load_part(const float* p, int64_t count) {
    if (count == kLanes) return load(p);
    float lanes[kLanes] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_part(float* p, int64_t count) const {
    if (count == kLanes) {
      store(p);
      return;
    }
    float lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
#if defined(_MSC_VER) && !defined(__clang__)
  static void prefetch(const float* p) { __prefetch(p); }
#else
  static void prefetch(const float* p) { __builtin_prefetch(p); }
#endif
  static Vector all(float x) { return {vdupq_n_f32(x)}; }
  static Vector add(Vector a, Vector b) { return {vaddq_f32(a.v, b.v)}; }
  static Vector sub(Vector a, Vector b) { return {vsubq_f32(a.v, b.v)}; }
  static Vector mul(Vector a, Vector b) { return {vmulq_f32(a.v, b.v)}; }
  static Vector div(Vector a, Vector b) { return {vdivq_f32(a.v, b.v)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vector max(Vector a, Vector b) { return {vmaxq_f32(a.v, b.v)}; }
  static Vector abs(Vector a) { return {vabsq_f32(a.v)}; }
  static Vector round(Vector a) { return {vrndnq_f32(a.v)}; }
  static Vector scale_by_power(Vector a, Vector n) {
    const int32x4_t shift = vshlq_n_s32(vcvtnq_s32_f32(n.v), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), shift))};
  }
  // value where x >= limit, else 0
  static Vector zero_below(Vector x, Vector limit, Vector value) {
    const uint32x4_t kept = vandq_u32(vcgeq_f32(x.v, limit.v), vreinterpretq_u32_f32(value.v));
    return {vreinterpretq_f32_u32(kept)};
  }
  static float sum(Vector a) { return vaddvq_f32(a.v); }
  static float largest(Vector a) { return vmaxvq_f32(a.v); }
  // Rounds to whole numbers, half to even, in [-128, 127], and writes them; returns them.
  static Vector store_int8(Vector a, int8_t* out) {
    const float32x4_t above = vmaxq_f32(a.v, vdupq_n_f32(-128.0f));
    const int32x4_t whole = vcvtnq_s32_f32(vminq_f32(above, vdupq_n_f32(127.0f)));  // NaN is 0
    const int16x4_t words = vqmovn_s32(whole);
    int8_t lanes[8];
    vst1_s8(lanes, vqmovn_s16(vcombine_s16(words, words)));
    memcpy(out, lanes, 4);
    return {vcvtq_f32_s32(whole)};
  }
  // The sums of 4 registers.
  static void sums(const Vector* x, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v)));
  }
};

#include "operators.inc"

}  // namespace

const Operators& table() { return kTable; }

}  // namespace neon_operators
}  // namespace bitgen
