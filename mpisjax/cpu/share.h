// What the operations have in common: how XLA calls them, and that threads share the samples of a batch.

#ifndef MPISJAX_NATIVE_SHARE_H_
#define MPISJAX_NATIVE_SHARE_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace mpisjax {

// The pool, two arrays, numbers, and the result.
inline auto bound() {
  namespace ffi = xla::ffi;
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

// Of `count` samples, how many parts are made for so many threads: two each, so that one that is held up holds up less.
inline int64_t parts_of(int64_t count, int64_t threads) {
  return threads <= 1 ? 1 : std::max<int64_t>(1, std::min(count, 2 * threads));
}

// Calls work(part, begin, end) for every part of `count` samples. The caller works, too, and waits for parts that somebody
// has begun but for nothing else: where no thread of the pool is free, it does all of them.
template <typename Work>
void share(xla::ffi::ThreadPool pool, int64_t threads, int64_t count, const Work& work) {
  const int64_t parts = parts_of(count, threads);
  const auto part = [&work, count, parts](int64_t n) { work(n, n * count / parts, (n + 1) * count / parts); };
  if (parts == 1) return part(0);
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto progress = std::make_shared<Progress>();  // a late helper finds nothing left to do, and nobody waiting
  const auto help = [progress, parts, &part] {
    for (int64_t n; (n = progress->next.fetch_add(1)) < parts;) {
      part(n);
      const std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == parts) progress->finished.notify_all();
    }
  };
  for (int64_t helper = 1; helper < threads; ++helper) {
    auto another = help;
    pool.Schedule(std::move(another));
  }
  help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done == parts; });
}

}  // namespace mpisjax

#endif  // MPISJAX_NATIVE_SHARE_H_
