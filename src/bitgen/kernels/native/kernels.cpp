// Chooses the table of functions, and offers the products to Python.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "cpu.h"
#include "products.h"
#include "thread_pool.h"

namespace bitgen {
namespace {

// The tables of this build that this processor can run, the fastest first.
const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = [] {
    std::vector<const Kernels*> found;
    const CpuFeatures& cpu = cpu_features();
#if defined(BITGEN_HAVE_AVX512)
    if (cpu.avx512_vnni) found.push_back(&avx512_kernels);
#endif
#if defined(BITGEN_HAVE_AVXVNNI)
    if (cpu.avx_vnni) found.push_back(&avxvnni_kernels);
#endif
#if defined(BITGEN_HAVE_AVX2)
    if (cpu.avx2) found.push_back(&avx2_kernels);
#endif
#if defined(BITGEN_HAVE_NEON)
    if (cpu.neon_dotprod) found.push_back(&neon_kernels);
#endif
    static_cast<void>(cpu);
    found.push_back(&portable_kernels);
    return found;
  }();
  return usable;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* table : usable_kernels()) {
    if (std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

const Kernels* first_choice() {
  const char* wanted = std::getenv("BITGEN_KERNELS");
  const Kernels* named = wanted == nullptr ? nullptr : find_kernels(wanted);
  return named == nullptr ? usable_kernels().front() : named;
}

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen{first_choice()};
  return chosen;
}

// Products of two bytes that one thread makes in less time than another takes to wake up.
constexpr int64_t kWorthSharing = 1 << 19;

}  // namespace

const Kernels& kernels() { return *chosen_kernels().load(std::memory_order_relaxed); }

}  // namespace bitgen

using namespace bitgen;

// Identifies the sources that this library was built from; Python compares it with those it finds.
BITGEN_API const char* bitgen_source_hash() { return BITGEN_SOURCE_HASH; }

BITGEN_API const char* bitgen_kernels_name() { return kernels().name; }

// Names of the tables that can run here, separated by spaces, the fastest first.
BITGEN_API const char* bitgen_usable_kernels() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* table : usable_kernels()) {
      joined += (joined.empty() ? "" : " ") + std::string(table->name);
    }
    return joined;
  }();
  return names.c_str();
}

// Instruction sets that matter here and that the processor has, separated by spaces.
BITGEN_API const char* bitgen_cpu_features() {
  static const std::string names = [] {
    const CpuFeatures& cpu = cpu_features();
    std::string joined;
    const auto add = [&](bool found, const char* name) {
      if (found) joined += (joined.empty() ? "" : " ") + std::string(name);
    };
    add(cpu.avx2, "avx2");
    add(cpu.avx_vnni, "avx-vnni");
    add(cpu.avx512_vnni, "avx512-vnni");
    add(cpu.neon_dotprod, "neon-dotprod");
    return joined;
  }();
  return names.c_str();
}

// Takes the named table from now on; an empty name takes the fastest. Returns 0 if there is none of
// that name here, and changes nothing then.
BITGEN_API int bitgen_select_kernels(const char* name) {
  const Kernels* table = *name == '\0' ? usable_kernels().front() : find_kernels(name);
  if (table != nullptr) chosen_kernels().store(table);
  return table != nullptr;
}

// float32 [rows][columns] -> values int8 [rows][stride], scales float32 [rows], sums int32 [rows].
// stride: at least columns, and a multiple of 64.
BITGEN_API void bitgen_quantize(const float* x, int64_t rows, int64_t columns, int8_t* values,
                                int64_t stride, float* scales, int32_t* sums) {
  QuantizedRows quantized{values, scales, sums, rows, columns, stride};
  const Kernels& table = kernels();
  ThreadPool::instance().run([&](Worker& worker) {
    const auto [first, last] = worker.share(rows);
    table.quantize(x, columns, first, last, &quantized);
  }, rows * columns >= kWorthSharing / 8);
}

// out [rows of x][rows of the matrix], dense: int32 sums, or where they are null float32 products.
BITGEN_API void bitgen_ternary_product(const QuantizedRows* x, const TernaryMatrix* matrix,
                                       int32_t* sums, float* products) {
  const Kernels& table = kernels();
  ThreadPool::instance().run([&](Worker& worker) {
    const auto [first, last] = worker.share(tiles_of(matrix->rows));
    if (sums != nullptr) table.ternary_sums(x, matrix, first, last, sums, matrix->rows);
    else table.ternary_product(x, matrix, first, last, products, matrix->rows);
  }, x->rows * matrix->rows * matrix->columns >= kWorthSharing);
}

BITGEN_API void bitgen_int8_product(const QuantizedRows* x, const Int8Matrix* matrix,
                                    int32_t* sums, float* products) {
  const Kernels& table = kernels();
  ThreadPool::instance().run([&](Worker& worker) {
    const auto [first, last] = worker.share(tiles_of(matrix->rows));
    if (sums != nullptr) table.int8_sums(x, matrix, first, last, sums, matrix->rows);
    else table.int8_product(x, matrix, first, last, products, matrix->rows);
  }, x->rows * matrix->rows * matrix->columns >= kWorthSharing);
}
