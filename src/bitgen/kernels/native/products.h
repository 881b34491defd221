// The tables of all instruction sets. Those without BITGEN_HAVE_* are not in
// the build: the architecture or the compiler lacks the instructions.
#pragma once

#include "kernels.h"

namespace bitgen {

extern const Kernels avx512_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx2_kernels;
extern const Kernels neon_kernels;
extern const Kernels portable_kernels;

}  // namespace bitgen
