// Timing inside the library, for benchmarks/product.py: no Python between two calls.
#include <atomic>
#include <chrono>

#include "api.h"
#include "kernels.h"
#include "thread_pool.h"

using namespace bitgen;

namespace {

std::atomic<int64_t> keep_result;  // what is computed only to be timed

template <typename Function>
double seconds_of(Function&& function) {
  const auto started = std::chrono::steady_clock::now();
  ThreadPool::instance().run(function);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace

// Seconds for reading `bytes` bytes `rounds` times, each thread its own part.
BITGEN_API double bitgen_time_reading(const uint8_t* data, int64_t bytes, int64_t rounds) {
  const Kernels& table = kernels();
  return seconds_of([&](Worker& worker) {
    const auto [first, last] = worker.share(bytes / 4096);
    for (int64_t round = 0; round < rounds; ++round) {
      keep_result += table.read_bytes(data + first * 4096, (last - first) * 4096);
    }
  });
}

// Seconds for multiplying registers, and the number of products of two bytes on all threads.
BITGEN_API double bitgen_time_multiplying(int64_t iterations, int64_t* products) {
  const Kernels& table = kernels();
  std::atomic<int64_t> total{0};
  const double seconds = seconds_of([&](Worker&) {
    alignas(64) uint8_t operands[128];
    for (int i = 0; i < 128; ++i) operands[i] = static_cast<uint8_t>(i % 3);
    alignas(64) int32_t sums[16] = {};
    total += table.multiply_registers(operands, iterations, sums);
    keep_result += sums[0];
  });
  *products = total;
  return seconds;
}

// Seconds for `calls` products in turn with each of `count` matrices, from number `first` on, as the
// engine makes them: threads meet after every product.
BITGEN_API double bitgen_time_ternary_product(const QuantizedRows* x, const TernaryMatrix* matrices,
                                              int64_t count, int64_t first, int64_t calls,
                                              float* products) {
  const Kernels& table = kernels();
  return seconds_of([&](Worker& worker) {
    for (int64_t call = 0; call < calls; ++call) {
      const TernaryMatrix& matrix = matrices[(first + call) % count];
      const auto [first_tile, last_tile] = worker.share(tiles_of(matrix.rows));
      table.ternary_product(x, &matrix, first_tile, last_tile, products, matrix.rows);
      worker.barrier();
    }
  });
}
