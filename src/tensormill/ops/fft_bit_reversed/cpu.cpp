// Fourier transform of contiguous complex rows: in bit-reversed order to frequencies, and back.
//
// A row that fits in the nearest caches is transformed there: registers full of neighbouring elements, then passes
// over the rest of the index (butterflies.h). A longer row is an n1 x n2 matrix whose rows fit: forward, the rows and
// then the columns, a block of them at a time in a small scratch buffer; inverse, the columns first. So the data cross
// the outer caches twice, and both halves are independent pieces of work for threads.
#include <nanobind/nanobind.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "isa.h"
#include "lanes.h"
#include "parallel.h"

namespace tensormill::fft {

constexpr std::align_val_t LINE{64};
struct FreeAligned {
  void operator()(void *p) const { ::operator delete[](p, LINE); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeAligned>;
template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T *>(::operator new[](size * sizeof(T), LINE)));
}

struct Root {
  double re, im;
};

// exp(-2 pi i j / 2^k) for 0 <= j <= 2^(k-1), from an angle of at most an eighth of a turn.
inline Root root(int64_t j, int k) {
  const int64_t n = int64_t{1} << k, quarters = (8 * j + n) / (2 * n);
  const double angle = -6.283185307179586476925 * static_cast<double>(4 * j - quarters * n) / (4.0 * n);
  const double c = std::cos(angle), s = std::sin(angle);
  if (quarters == 1) return {s, -c};
  return quarters == 2 ? Root{-c, -s} : Root{c, s};
}

// exp(-2 pi i j / 2^(log_h + 1 + b)) for j < h = 2^log_h: `lanes` real parts, `lanes` imaginary parts, and so on.
// Computed at the first call with these arguments (lanes is the same in all calls of a process) and kept.
template <class T>
const T *factors(int log_h, int b, int lanes) {
  static std::once_flag once[64][3];
  static Buffer<T> tables[64][3];
  std::call_once(once[log_h][b], [&] {
    const int64_t h = int64_t{1} << log_h;
    Buffer<T> table = buffer<T>(2 * h);
    for (int64_t j = 0; j < h; ++j) {
      const Root w = root(j, log_h + 1 + b);
      const int64_t at = j / lanes * 2 * lanes + j % lanes;
      table[at] = static_cast<T>(w.re);
      table[at + lanes] = static_cast<T>(w.im);
    }
    tables[log_h][b] = std::move(table);
  });
  return tables[log_h][b].get();
}

// For each stage within a register, the factor of every lane: 1 in the first half of a block.
template <class T>
const T *lane_factors(int lanes) {
  static const Buffer<T> table = [lanes] {
    const int stages = log2_floor(lanes);
    Buffer<T> filled = buffer<T>(2 * lanes * stages);
    for (int s = 0; s < stages; ++s) {
      for (int i = 0; i < lanes; ++i) {
        const Root w = (i >> s & 1) ? root(i & ((1 << s) - 1), s + 1) : Root{1, 0};
        filled[2 * lanes * s + i] = static_cast<T>(w.re);
        filled[2 * lanes * s + lanes + i] = static_cast<T>(w.im);
      }
    }
    return filled;
  }();
  return table.get();
}

// What cpu.cpp needs from one instruction set; arrays are indexed by "inverse".
template <class T>
struct Kernels {
  using Rows = void (*)(const T *, int64_t, T *, int, int64_t, bool, T);
  void (*column_blocks[2])(const T *, T *, T *, int, int, int64_t, int64_t, int64_t, T);
  Rows rows[2], rows_apart;
  void (*unpack)(T *, int, int64_t, int64_t);
  int lanes;
};

}  // namespace tensormill::fft

#define ISA portable
#define ISA_TARGET
#define ISA_BYTES 16
#define ISA_RADIX 2
#include "butterflies.h"

#if TENSORMILL_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_BYTES 32
#define ISA_RADIX 2
#include "butterflies.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ISA_BYTES 64
#define ISA_RADIX 3
#include "butterflies.h"
#endif

namespace tensormill::fft {

template <class T>
const Kernels<T> &kernels() {
  static const Kernels<T> chosen = TENSORMILL_BEST_COPY(kernels<T>());
  return chosen;
}

constexpr int64_t CACHED = 256 << 10;  // bytes of a row that is transformed in place, and of a block of columns
template <class T>
constexpr int DIRECT = log2_floor(CACHED / (2 * sizeof(T)));

// A row that is too long to be direct. With `apart`, x is 2^log_n real parts and then as many imaginary ones.
template <class T>
void one_row(const T *x, T *y, int log_n, bool inverse, bool apart, T scale, int threads) {
  const int inner = DIRECT<T>, outer = log_n - inner;
  const int64_t columns = int64_t{1} << inner, line = 64 / (2 * sizeof(T));
  const int64_t fits = CACHED / int64_t(2 * sizeof(T)) >> outer;
  const int64_t block = std::min(columns, std::max(4 * line, fits));
  const Kernels<T> &kernel = kernels<T>();
  const auto all_columns = [&](const T *from) {
    parallel_ranges(columns, block, threads, [&](int64_t begin, int64_t end) {
      const Buffer<T> scratch = buffer<T>(2 * block << outer);
      kernel.column_blocks[inverse](from, y, scratch.get(), outer, inner, block, begin, end, scale);
    });
  };
  if (inverse) all_columns(x);
  const T *from = inverse ? y : x;
  parallel_ranges(int64_t{1} << outer, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * columns;
    const auto rows = apart ? kernel.rows_apart : kernel.rows[inverse];
    rows(from + (apart ? at : 2 * at), int64_t{1} << log_n, y + 2 * at, inner, end - begin, false, scale);
  });
  if (!inverse) all_columns(y);
}

constexpr int64_t WORTH_A_THREAD = int64_t{1} << 14;  // elements; below, waking a thread costs more than it saves

inline int worthwhile(int threads, int64_t elements) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, elements / WORTH_A_THREAD)));
}

template <class T>
void transform(uintptr_t x_address, uintptr_t y_address, int64_t count, int log_n, bool inverse, double scale,
               int threads) {
  const T *x = reinterpret_cast<const T *>(x_address);
  T *y = reinterpret_cast<T *>(y_address);
  const int64_t n = int64_t{1} << log_n;
  const T factor = static_cast<T>(scale);
  const bool direct = log_n <= DIRECT<T>, inside = !direct && count < 4 * threads;
  threads = worthwhile(threads, count * n);
  const int64_t grain = std::max<int64_t>(1, 64 / int64_t(2 * sizeof(T)) / n);  // no two threads write one line
  parallel_ranges(count, grain, inside ? 1 : threads, [&](int64_t begin, int64_t end) {
    if (direct) {
      kernels<T>().rows[inverse](x + 2 * begin * n, 0, y + 2 * begin * n, log_n, end - begin, true, factor);
      return;
    }
    for (int64_t r = begin; r < end; ++r) {
      one_row<T>(x + 2 * r * n, y + 2 * r * n, log_n, inverse, false, factor, inside ? threads : 1);
    }
  });
}

// Forward, of real rows of 2^log_n: the even times, which are the first half, and the odd ones make a complex row of
// half the length. Needs four registers of samples (`least_real_bits`).
template <class T>
void transform_real(uintptr_t x_address, uintptr_t y_address, int64_t count, int log_n, double scale, int threads) {
  const T *x = reinterpret_cast<const T *>(x_address);
  T *y = reinterpret_cast<T *>(y_address);
  const int64_t n = int64_t{1} << log_n;
  const T factor = static_cast<T>(scale / 2);
  const Kernels<T> &kernel = kernels<T>();
  const bool direct = log_n - 1 <= DIRECT<T>, inside = !direct && count < 4 * threads;
  threads = worthwhile(threads, count * n);
  parallel_ranges(count, 1, inside ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *from = x + r * n;
      T *to = y + 2 * r * n;
      if (direct) {
        kernel.rows_apart(from, n / 2, to, log_n - 1, 1, true, factor);
      } else {
        one_row<T>(from, to, log_n - 1, false, true, factor, inside ? threads : 1);
      }
      parallel_ranges(n / 4 / kernel.lanes, 64, inside ? threads : 1,
                      [&](int64_t first, int64_t last) { kernel.unpack(to, log_n, first, last); });
    }
  });
}

inline int least_real_bits() { return 2 + log2_floor(std::max(kernels<float>().lanes, kernels<double>().lanes)); }

}  // namespace tensormill::fft

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  using namespace tensormill::fft;
  m.def("float32", &transform<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("float64", &transform<double>, nb::call_guard<nb::gil_scoped_release>());
  m.def("real_float32", &transform_real<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("real_float64", &transform_real<double>, nb::call_guard<nb::gil_scoped_release>());
  m.def("least_real_bits", &least_real_bits);
  m.def("instruction_set", &tensormill::instruction_set_name);
}
