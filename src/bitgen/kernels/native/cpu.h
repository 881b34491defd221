// What this processor can do, and how many threads suit it.
#pragma once

namespace bitgen {

struct CpuFeatures {
  bool avx2 = false;          // with FMA and F16C, and an operating system that saves the registers
  bool avx_vnni = false;
  bool avx512_vnni = false;   // with F, BW, DQ and VL
  bool neon_dotprod = false;
};

const CpuFeatures& cpu_features();

// Physical cores that this process may use, at most what a container's quota grants; what
// OMP_NUM_THREADS says where it is set, as torch does.
int default_threads();

// Logical processors that this process may use.
int available_processors();

}  // namespace bitgen
