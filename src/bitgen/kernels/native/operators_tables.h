// The table of every instruction set; each is there where its processors are.
#pragma once

#include "operators.h"

namespace bitgen {

namespace portable_operators {
const Operators& table();
}
namespace avx2_operators {
const Operators& table();
}
namespace avx512_operators {
const Operators& table();
}
namespace neon_operators {
const Operators& table();
}

}  // namespace bitgen
