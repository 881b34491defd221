// What compilers spell differently.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define BITGEN_INLINE __forceinline
#define BITGEN_UNROLL
#else
#define BITGEN_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define BITGEN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BITGEN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif
