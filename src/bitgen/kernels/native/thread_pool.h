// One set of threads for the whole process: every call runs the same function on all of them.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace bitgen {

class ThreadPool;

// One thread's place in a run.
class Worker {
 public:
  const int index;  // 0 is the caller
  const int count;

  // Waits until all workers of the run have come here. Every worker must call it equally often.
  void barrier();

  // This worker's part [first, last) of `total` items; parts differ by one item at most.
  std::pair<int64_t, int64_t> share(int64_t total) const {
    return {total * index / count, total * (index + 1) / count};
  }

 private:
  friend class ThreadPool;
  Worker(int i, int n, ThreadPool* pool) : index(i), count(n), pool_(pool) {}
  ThreadPool* pool_;
};

// Threads wait for work and for each other by spinning for some microseconds, then they sleep: calls
// that follow each other closely start at once, and an idle process takes no processor time.
class ThreadPool {
 public:
  // The pool of this process, made at first use with default_threads(). A child made by fork gets
  // its own, with as many threads.
  static ThreadPool& instance();

  // Takes effect before the next run. Values below 1 count as 1.
  void set_threads(int threads);
  int threads() const;

  // Calls function(Worker&) on every thread, this one among them; returns when all are done. The
  // function must not throw. Calls from several threads come one after the other; a call from within
  // a run, or one that is not `shared` because it is too small, is made by one worker alone.
  template <typename Function>
  void run(Function&& function, bool shared = true) {
    using Plain = std::remove_reference_t<Function>;
    run_on_all(shared, [](void* context, Worker& worker) { (*static_cast<Plain*>(context))(worker); },
               const_cast<void*>(static_cast<const void*>(&function)));
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

 private:
  friend class Worker;
  using Call = void (*)(void* context, Worker& worker);
  struct State;

  explicit ThreadPool(int threads);
  void run_on_all(bool shared, Call call, void* context);
  void wait_for_all();

  State* state_;
};

inline void Worker::barrier() {
  if (count > 1) pool_->wait_for_all();
}

}  // namespace bitgen
