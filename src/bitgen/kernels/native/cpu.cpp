#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#define BITGEN_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_M_ARM64)
#include <windows.h>
#endif

namespace bitgen {
namespace {

#if defined(BITGEN_X86)

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<unsigned>(values[0]), static_cast<unsigned>(values[1]),
       static_cast<unsigned>(values[2]), static_cast<unsigned>(values[3])};
#else
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
  return r;
}

// The register sets that the operating system saves when it switches threads.
unsigned saved_registers() {
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool bit(unsigned value, int number) { return (value >> number & 1) != 0; }

CpuFeatures detect() {
  CpuFeatures found;
  const unsigned highest_leaf = cpuid(0, 0).eax;
  const Registers basic = cpuid(1, 0);
  const bool os_saves = bit(basic.ecx, 27);
  if (highest_leaf < 7 || !os_saves) return found;
  const unsigned saved = saved_registers();
  const bool avx_saved = (saved & 0x06) == 0x06;
  const bool avx512_saved = (saved & 0xe6) == 0xe6;
  const Registers extended = cpuid(7, 0);
  const bool fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
  found.avx2 = avx_saved && bit(extended.ebx, 5) && fma && f16c;
  found.avx_vnni = found.avx2 && extended.eax >= 1 && bit(cpuid(7, 1).eax, 4);
  const bool foundation = bit(extended.ebx, 16), dq = bit(extended.ebx, 17);
  const bool bw = bit(extended.ebx, 30), vl = bit(extended.ebx, 31);
  found.avx512_vnni =
      found.avx2 && avx512_saved && foundation && dq && bw && vl && bit(extended.ecx, 11);
  return found;
}

#else

CpuFeatures detect() {
  CpuFeatures found;
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProductBit = 1ul << 20;  // HWCAP_ASIMDDP
  found.neon_dotprod = (getauxval(AT_HWCAP) & kDotProductBit) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  found.neon_dotprod =
      sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#elif defined(_M_ARM64)
  constexpr DWORD kDotProduct = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  found.neon_dotprod = IsProcessorFeaturePresent(kDotProduct) != 0;
#endif
  return found;
}

#endif

#if defined(__linux__)

// Distinct cores among the processors that this process may run on; 0 if the system does not say.
int physical_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 0;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) return 0;
    cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
}

// Processors that the container's quota amounts to; 0 without a quota.
int container_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::max(1, static_cast<int>(std::atof(quota.c_str()) / period + 0.5));
}

#else

int physical_cores() { return 0; }
int container_quota() { return 0; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

int available_processors() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const int wanted = std::atoi(text);
    if (wanted >= 1) return wanted;
  }
  const int cores = physical_cores();
  const int quota = container_quota();
  const int threads = cores > 0 ? cores : available_processors();
  return quota > 0 ? std::min(threads, quota) : threads;
}

}  // namespace bitgen
