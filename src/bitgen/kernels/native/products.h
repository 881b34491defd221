// The tables of all instruction sets. BITGEN_HAVE_* come from the build: what the compiler can do.
#pragma once

#include "kernels.h"

namespace bitgen {

extern const Kernels portable_kernels;

}  // namespace bitgen
