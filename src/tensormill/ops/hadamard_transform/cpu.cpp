// Walsh-Hadamard transform of contiguous rows.
//
// A row that fits in the first-level cache is transformed there: registers full of neighbouring elements first, then
// passes over the rest of the index (butterflies.h). A longer row is an n1 x n2 matrix whose rows fit: first the
// columns, a block of them at a time in a small scratch buffer, then the rows. So the data cross each outer cache
// level once per split, and both halves are independent pieces of work for threads. Rows of more than 2^19 floats are
// split twice, for the first-level and for the second-level cache.
#include <nanobind/nanobind.h>

#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "floats.h"
#include "isa.h"
#include "lanes.h"
#include "parallel.h"

namespace tensormill::hadamard {

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class S>
using compute_t = typename Compute<S>::type;

// What cpu.cpp needs from one instruction set, for storage type S.
template <class S>
struct Kernels {
  using T = compute_t<S>;
  void (*first_columns)(const S *, T *, T *, int, int64_t, int64_t, int64_t, int64_t);
  void (*inner_columns)(const T *, T *, T *, int, int64_t, int64_t, int64_t, int64_t);
  void (*rows)(const S *, S *, T *, int, int64_t, T);
  void (*last_rows)(const T *, S *, T *, int, int64_t, T);
};

}  // namespace tensormill::hadamard

#define ISA portable
#define ISA_TARGET
#define ISA_BYTES 16
#define ISA_RADIX 3
#include "butterflies.h"

#if TENSORMILL_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA_BYTES 32
#define ISA_RADIX 3
#include "butterflies.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define ISA_BYTES 64
#define ISA_RADIX 4
#include "butterflies.h"
#endif

namespace tensormill::hadamard {

template <class S>
const Kernels<S> &kernels() {
  static const Kernels<S> chosen = TENSORMILL_BEST_COPY(kernels<S>());
  return chosen;
}

// How a row of 2^log_n elements is split: `outer` index bits, then `inner`, then rows of 2^direct in the first cache.
template <class T>
struct Split {
  static constexpr int DIRECT = log2_floor((16 << 10) / sizeof(T));        // half of a 32 KiB first-level cache
  static constexpr int ONE_SPLIT = log2_floor((2 << 20) / sizeof(T));  // measured: from 4 MiB on, two splits are faster
  static constexpr int SECOND_LEVEL = log2_floor((256 << 10) / sizeof(T));
  static constexpr int64_t SCRATCH = (16 << 10) / sizeof(T), LINE = 64 / sizeof(T);
  int outer, inner, direct;

  explicit Split(int log_n) {
    direct = std::min(log_n, DIRECT);
    inner = log_n > ONE_SPLIT ? SECOND_LEVEL - DIRECT : 0;
    outer = log_n - direct - inner;
  }
  static int64_t block(int bits) { return std::max(2 * LINE, SCRATCH >> bits); }
  int64_t scratch() const {
    const int64_t widest = std::max(block(outer) << outer, block(inner) << inner);
    return std::max(widest, int64_t{1} << DIRECT);
  }
};

template <class S>
void one_row(const S *x, S *y, compute_t<S> *work, int log_n, compute_t<S> scale, int threads) {
  using T = compute_t<S>;
  const Split<T> split(log_n);
  const Kernels<S> &kernel = kernels<S>();
  if constexpr (std::is_same_v<S, T>) work = y;
  const int inner_log = split.inner + split.direct;
  const int64_t inner_n = int64_t{1} << inner_log, outer_n = int64_t{1} << split.outer;
  const int64_t block = Split<T>::block(split.outer);
  parallel_ranges(inner_n, block, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[split.scratch()]);
    kernel.first_columns(x, work, scratch.get(), split.outer, inner_n, block, begin, end);
  });
  parallel_ranges(outer_n, 1, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[split.scratch()]);
    for (int64_t r = begin; r < end; ++r) {
      T *row = work + r * inner_n;
      if (split.inner > 0) {
        const int64_t columns = int64_t{1} << split.direct;
        kernel.inner_columns(row, row, scratch.get(), split.inner, columns, Split<T>::block(split.inner), 0, columns);
      }
      kernel.last_rows(row, y + r * inner_n, scratch.get(), split.direct, int64_t{1} << split.inner, scale);
    }
  });
}

template <class S>
void transform(uintptr_t x_address, uintptr_t y_address, int64_t count, int log_n, double scale, int threads) {
  using T = compute_t<S>;
  constexpr int64_t WORTH_A_THREAD = int64_t{1} << 15;  // elements; below, waking a thread costs more than it saves
  const S *x = reinterpret_cast<const S *>(x_address);
  S *y = reinterpret_cast<S *>(y_address);
  const int64_t n = int64_t{1} << log_n;
  const T factor = static_cast<T>(scale);
  const bool direct = log_n <= Split<T>::DIRECT;
  const bool inside = !direct && count < 4 * threads;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, count * n / WORTH_A_THREAD)));
  const auto workspace = [&] { return std::unique_ptr<T[]>(std::is_same_v<S, T> ? nullptr : new T[n]); };
  if (inside) {
    const auto work = workspace();
    for (int64_t r = 0; r < count; ++r) one_row<S>(x + r * n, y + r * n, work.get(), log_n, factor, threads);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, 64 / sizeof(S) / n);  // so that no two threads write one cache line
  parallel_ranges(count, grain, threads, [&](int64_t begin, int64_t end) {
    if (direct) {
      const std::unique_ptr<T[]> scratch(std::is_same_v<S, T> ? nullptr : new T[int64_t{1} << Split<T>::DIRECT]);
      kernels<S>().rows(x + begin * n, y + begin * n, scratch.get(), log_n, end - begin, factor);
      return;
    }
    const auto work = workspace();
    for (int64_t r = begin; r < end; ++r) one_row<S>(x + r * n, y + r * n, work.get(), log_n, factor, 1);
  });
}

}  // namespace tensormill::hadamard

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  using namespace tensormill::hadamard;
  m.def("float32", &transform<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("float64", &transform<double>, nb::call_guard<nb::gil_scoped_release>());
  m.def("float16", &transform<tensormill::Half>, nb::call_guard<nb::gil_scoped_release>());
  m.def("bfloat16", &transform<tensormill::BFloat16>, nb::call_guard<nb::gil_scoped_release>());
  m.def("instruction_set", &tensormill::instruction_set_name);
}
