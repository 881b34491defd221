#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"
#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace bitgen {
namespace {

// Long enough for the gap between two tokens, short enough not to be seen in processor time.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpinsBetweenClockReads = 32;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

std::atomic<ThreadPool*> process_pool{nullptr};
std::atomic<int> threads_before_fork{0};
thread_local bool inside_run = false;

}  // namespace

struct ThreadPool::State {
  std::mutex callers;  // held for the length of a run
  std::vector<std::thread> threads;
  std::atomic<int> count{1};
  bool oversubscribed = false;

  Call call = nullptr;
  void* context = nullptr;
  bool stopping = false;
  // Each on its own cache line: written by one thread while others watch another.
  alignas(64) std::atomic<uint32_t> epoch{0};  // of the run
  alignas(64) std::atomic<int> running{0};     // workers, without the caller
  alignas(64) std::atomic<int> arrived{0};     // at the barrier
  alignas(64) std::atomic<uint32_t> barrier_epoch{0};

  alignas(64) std::atomic<int> sleepers{0};
  std::mutex sleep_mutex;
  std::condition_variable wake_up;

  template <typename Predicate>
  void wait_until(Predicate ready) {
    const auto started = std::chrono::steady_clock::now();
    for (;;) {
      for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
        if (ready()) return;
        relax();
      }
      // With more threads than processors the one waited for may need this processor.
      if (oversubscribed) std::this_thread::yield();
      if (std::chrono::steady_clock::now() - started > kSpinTime) break;
    }
    std::unique_lock<std::mutex> lock(sleep_mutex);
    sleepers.fetch_add(1);
    wake_up.wait(lock, ready);
    sleepers.fetch_sub(1);
  }

  // After a change that others may wait for. The change and `sleepers` are sequentially consistent:
  // either the sleeper sees the change or this sees the sleeper.
  void wake() {
    if (sleepers.load() == 0) return;
    { std::lock_guard<std::mutex> lock(sleep_mutex); }
    wake_up.notify_all();
  }

  void work(ThreadPool* pool, int index, uint32_t seen) {
    inside_run = true;
    for (;;) {
      wait_until([&] { return epoch.load() != seen; });
      ++seen;
      if (stopping) return;
      Worker worker(index, count.load(std::memory_order_relaxed), pool);
      call(context, worker);
      if (running.fetch_sub(1) == 1) wake();
    }
  }

  void start(ThreadPool* pool, int wanted) {
    stopping = false;
    count = wanted;
    oversubscribed = wanted > available_processors();
    for (int index = 1; index < wanted; ++index) {
      threads.emplace_back(&State::work, this, pool, index, epoch.load());
    }
  }

  void stop() {
    stopping = true;
    epoch.fetch_add(1);
    wake();
    for (auto& thread : threads) thread.join();
    threads.clear();
  }
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  state_->start(this, std::max(1, threads));
}

// The pool is never destroyed: its threads may still spin while the process ends.
ThreadPool& ThreadPool::instance() {
  ThreadPool* pool = process_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  static std::mutex making;
  std::lock_guard<std::mutex> lock(making);
  pool = process_pool.load();
  if (pool != nullptr) return *pool;
#if !defined(_WIN32)
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    // The child has none of the threads, and locks may be held for ever: leave the old pool alone.
    if (ThreadPool* parent = process_pool.exchange(nullptr)) threads_before_fork = parent->threads();
    inside_run = false;
  });
  static_cast<void>(registered);
#endif
  const int before = threads_before_fork.load();
  pool = new ThreadPool(before > 0 ? before : default_threads());
  process_pool.store(pool, std::memory_order_release);
  return *pool;
}

int ThreadPool::threads() const { return state_->count.load(); }

void ThreadPool::set_threads(int threads) {
  threads = std::max(1, threads);
  std::lock_guard<std::mutex> lock(state_->callers);
  if (threads == state_->count) return;
  state_->stop();
  state_->start(this, threads);
}

void ThreadPool::run_on_all(bool shared, Call call, void* context) {
  if (inside_run || !shared) {
    Worker alone(0, 1, this);
    call(context, alone);
    return;
  }
  std::lock_guard<std::mutex> lock(state_->callers);
  inside_run = true;
  const int count = state_->count.load(std::memory_order_relaxed);
  Worker caller(0, count, this);
  if (count > 1) {
    state_->call = call;
    state_->context = context;
    state_->running.store(count - 1, std::memory_order_relaxed);
    state_->epoch.fetch_add(1);
    state_->wake();
  }
  call(context, caller);
  if (count > 1) {
    state_->wait_until([this] { return state_->running.load() == 0; });
  }
  inside_run = false;
}

void ThreadPool::wait_for_all() {
  const uint32_t epoch = state_->barrier_epoch.load();
  if (state_->arrived.fetch_add(1) + 1 == state_->count.load(std::memory_order_relaxed)) {
    state_->arrived.store(0);
    state_->barrier_epoch.fetch_add(1);
    state_->wake();
  } else {
    state_->wait_until([this, epoch] { return state_->barrier_epoch.load() != epoch; });
  }
}

}  // namespace bitgen

// Threads of all products and of the engine in this process; takes effect at once.
BITGEN_API void bitgen_set_threads(int threads) {
  bitgen::ThreadPool::instance().set_threads(threads);
}

BITGEN_API int bitgen_threads() { return bitgen::ThreadPool::instance().threads(); }
