// What the operations share: how XLA calls them, the checks of their buffers, and how threads divide the
// work.

#ifndef MPISJAX_CPU_SHARE_H_
#define MPISJAX_CPU_SHARE_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace mpisjax {

using Array = xla::ffi::Buffer<xla::ffi::F32>;
using Numbers = xla::ffi::Buffer<xla::ffi::S32>;
using Result = xla::ffi::ResultBuffer<xla::ffi::F32>;

// The thread pool, two arrays, numbers, and the result.
inline auto ffi_signature() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::ThreadPool>()
      .Arg<Array>()
      .Arg<Array>()
      .Arg<Numbers>()
      .Ret<Array>();
}

inline xla::ffi::Error out_of_memory() {
  return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                         "mpisjax: a convolution found no memory to work in");
}

// Runs the body of an operation. A failed allocation becomes an error of the program.
template <typename Body>
xla::ffi::Error guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  } catch (const std::exception& error) {
    return xla::ffi::Error::Internal(std::string("mpisjax: ") + error.what());
  }
}

// One thing that has to hold of the buffers, and the words for an error.
struct Requirement {
  bool holds;
  const char* text;
};

// The first requirement that does not hold, as an error.
inline xla::ffi::Error check(const char* operation, std::initializer_list<Requirement> requirements) {
  for (const Requirement& one : requirements) {
    if (!one.holds) return xla::ffi::Error::InvalidArgument(std::string(operation) + ": " + one.text);
  }
  return xla::ffi::Error::Success();
}

template <typename Buffer>
bool has_rank(const Buffer& buffer, size_t rank) {
  return buffer.dimensions().size() == rank;
}

// How many parts are made of `count` samples. Each thread gets two, so that a thread that is held up delays
// less.
inline int64_t parts_of(int64_t count, int64_t threads) {
  return threads <= 1 ? 1 : std::max<int64_t>(1, std::min(count, 2 * threads));
}

// Calls work(part) for each part. The caller works too. It waits for parts that somebody has begun and for
// nothing else: where no thread of the pool is free, it does all of them. Throws std::bad_alloc if any part
// found no memory.
template <typename Work>
void run_parts(xla::ffi::ThreadPool pool, int64_t threads, int64_t parts, const Work& work) {
  if (parts == 1) return work(0);
  struct Progress {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  // Shared, because a helper may start after the caller has left. It then finds no part to do, and touches
  // nothing else.
  const auto progress = std::make_shared<Progress>();
  const auto help = [progress, parts, &work] {
    for (int64_t n; (n = progress->next.fetch_add(1)) < parts;) {
      try {
        work(n);
      } catch (...) {  // an exception would end the process if it left a thread of the pool
        progress->failed = true;
      }
      const std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == parts) progress->finished.notify_all();
    }
  };
  try {
    for (int64_t helper = 1; helper < std::min(threads, parts); ++helper) {
      auto another = help;
      pool.Schedule(std::move(another));
    }
  } catch (const std::bad_alloc&) {  // fewer helpers, then
  }
  help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done == parts; });
  if (progress->failed) throw std::bad_alloc();
}

// Calls work(begin, end) for every part of `count` samples.
template <typename Work>
void share(xla::ffi::ThreadPool pool, int64_t threads, int64_t count, const Work& work) {
  const int64_t parts = parts_of(count, threads);
  run_parts(pool, threads, parts, [&](int64_t n) { work(n * count / parts, (n + 1) * count / parts); });
}

}  // namespace mpisjax

#endif  // MPISJAX_CPU_SHARE_H_
