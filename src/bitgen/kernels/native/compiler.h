// What compilers spell differently.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define BITGEN_INLINE __forceinline
#define BITGEN_UNROLL
#if defined(_M_X64)
#include <xmmintrin.h>
#define BITGEN_PREFETCH(place) _mm_prefetch(reinterpret_cast<const char*>(place), _MM_HINT_T0)
#else
#define BITGEN_PREFETCH(place) static_cast<void>(place)
#endif
#define BITGEN_PREFETCH_TO_WRITE(place) BITGEN_PREFETCH(place)
#else
#define BITGEN_PREFETCH(place) __builtin_prefetch(place)
#define BITGEN_PREFETCH_TO_WRITE(place) __builtin_prefetch(place, 1)
#define BITGEN_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define BITGEN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BITGEN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif
