#include "operators.h"

#include <string>

#include "kernels.h"
#include "operators_tables.h"

namespace bitgen {

const Operators& operators() {
  const std::string name = kernels().name;
#if defined(BITGEN_HAVE_AVX512)
  if (name.rfind("avx512", 0) == 0) return avx512_operators::table();
#endif
#if defined(BITGEN_HAVE_AVX2)
  if (name.rfind("avx", 0) == 0) return avx2_operators::table();
#endif
#if defined(BITGEN_HAVE_NEON)
  if (name.rfind("neon", 0) == 0) return neon_operators::table();
#endif
  return portable_operators::table();
}

}  // namespace bitgen
