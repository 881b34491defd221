// The float operators for any processor: plain loops, which a compiler turns into what its target has.
#include <math.h>
#include <string.h>

#include "operators_tables.h"

namespace bitgen {
namespace portable_operators {
namespace {

const char* const kOperatorsName = "portable";

struct Vector {
  static constexpr int kLanes = 4;
  static constexpr int kDotRows = 2, kDotColumns = 2;  // sums that registers hold
  static constexpr int kRowBlock = 4;
  float v[kLanes];

  template <typename Function>
  static Vector each(Function function) {
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = function(i);
    return result;
  }
  static Vector load(const float* p) { return each([=](int i) { return p[i]; }); }
  static Vector load_part(const float* p, int64_t count) {
    return each([=](int i) { return i < count ? p[i] : 0.0f; });
  }
  void store(float* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = v[i];
  }
  void store_part(float* p, int64_t count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
  static void prefetch(const float*) {}
  static Vector all(float x) { return each([=](int) { return x; }); }
  static Vector add(Vector a, Vector b) { return each([=](int i) { return a.v[i] + b.v[i]; }); }
  static Vector sub(Vector a, Vector b) { return each([=](int i) { return a.v[i] - b.v[i]; }); }
  static Vector mul(Vector a, Vector b) { return each([=](int i) { return a.v[i] * b.v[i]; }); }
  static Vector div(Vector a, Vector b) { return each([=](int i) { return a.v[i] / b.v[i]; }); }
  static Vector fma(Vector a, Vector b, Vector c) {
    return each([=](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static Vector max(Vector a, Vector b) {
    return each([=](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vector abs(Vector a) { return each([=](int i) { return fabsf(a.v[i]); }); }
  static Vector round(Vector a) { return each([=](int i) { return rintf(a.v[i]); }); }
  static Vector scale_by_power(Vector a, Vector n) {
    return each([=](int i) { return ldexpf(a.v[i], static_cast<int>(n.v[i])); });
  }
  // value where x >= limit, else 0
  static Vector zero_below(Vector x, Vector limit, Vector value) {
    return each([=](int i) { return x.v[i] >= limit.v[i] ? value.v[i] : 0.0f; });
  }
  static float sum(Vector a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  static float largest(Vector a) {
    float most = a.v[0];
    for (int i = 1; i < kLanes; ++i) most = a.v[i] > most ? a.v[i] : most;
    return most;
  }
  // Rounds to whole numbers, half to even, in [-128, 127], and writes them; returns them.
  static Vector store_int8(Vector a, int8_t* out) {
    const Vector whole = each([=](int i) {
      const float x = rintf(a.v[i]);
      return x >= 127.0f ? 127.0f : x > -128.0f ? x : -128.0f;  // -128 for NaN too
    });
    for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int8_t>(whole.v[i]);
    return whole;
  }
  // The sums of kLanes registers.
  static void sums(const Vector* x, float* out) {
    for (int i = 0; i < kLanes; ++i) out[i] = sum(x[i]);
  }
};

#include "operators.inc"

}  // namespace

const Operators& table() { return kTable; }

}  // namespace portable_operators
}  // namespace bitgen
