#include "operators.h"

#include <string>

#include "kernels.h"
#include "operators_tables.h"

namespace bitgen {

const Operators& operators() {
  const std::string name = kernels().name;
#if defined(__x86_64__) || defined(_M_X64)
  if (name.rfind("avx512", 0) == 0) return avx512_operators::table();
  if (name.rfind("avx", 0) == 0) return avx2_operators::table();
#elif defined(__aarch64__) || defined(_M_ARM64)
  if (name.rfind("neon", 0) == 0) return neon_operators::table();
#endif
  return portable_operators::table();
}

}  // namespace bitgen
