// Threads and run-time CPU detection for the CPU kernels.
//
// Threads come from OpenMP, and in a Python process that has imported torch first they are torch's own pool
// (both link libgomp.so.1), so that the two never compete for cores. Without OpenMP everything is serial.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define TENSORMILL_X86 1
#include <immintrin.h>
#else
#define TENSORMILL_X86 0
#endif

namespace tensormill {

// Calls body(begin, end) on `threads` contiguous ranges of [0, count), each a multiple of `grain` but the last.
template <class Body>
inline void parallel_ranges(int64_t count, int64_t grain, int threads, Body &&body) {
  const int64_t blocks = (count + grain - 1) / grain;
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
#if defined(_OPENMP)
  if (workers > 1) {
#pragma omp parallel num_threads(workers)
    {
      const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
      const int64_t begin = blocks * id / team * grain, end = std::min(count, blocks * (id + 1) / team * grain);
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  if (count > 0) body(int64_t{0}, count);
}

// As parallel_ranges, in eight ranges per thread, which are handed out as threads become free: a core that another
// process shares doesn't hold up the others.
template <class Body>
inline void parallel_chunks(int64_t count, int64_t grain, int threads, Body &&body) {
  const int64_t blocks = (count + grain - 1) / grain, chunks = std::min<int64_t>(blocks, 8 * int64_t{threads});
  std::atomic<int64_t> next{0};
  parallel_ranges(threads > 1 ? std::min<int64_t>(threads, chunks) : 1, 1, threads, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < chunks; i = next++) {
      const int64_t begin = blocks * i / chunks * grain, end = std::min(count, blocks * (i + 1) / chunks * grain);
      if (begin < end) body(begin, end);
    }
  });
}

#if TENSORMILL_X86
inline bool has_avx512() {
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return yes;
}
inline bool has_avx512_vbmi() {
  static const bool yes = has_avx512() && __builtin_cpu_supports("avx512vbmi");
  return yes;
}
inline bool has_avx512_bf16() {
  static const bool yes = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return yes;
}
inline bool has_avx512_vnni() {
  static const bool yes = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return yes;
}
inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}
#else
inline bool has_avx512() { return false; }
inline bool has_avx512_vbmi() { return false; }
inline bool has_avx512_bf16() { return false; }
inline bool has_avx512_vnni() { return false; }
inline bool has_avx2() { return false; }
#endif

}  // namespace tensormill
