// Residual sum and RMS norm, a row at a time.

#include <nanobind/nanobind.h>

#include <cmath>

#include "floats.h"
#include "parallel.h"

namespace nb = nanobind;

namespace {

using tensormill::narrow;
using tensormill::widen;

// Below this many elements a thread costs more than it does.
constexpr int64_t kSerial = 1 << 15;

template <class T>
void rows(const T *x, const T *residual, const T *weight, T *y, T *total, int64_t N, float eps, int64_t begin,
          int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *in = x + row * N, *stream = residual + row * N;
    T *normed = y + row * N, *sum = total + row * N;
    // Partial sums: the compiler may not reorder one sum, and 16 fill its vectors.
    float squares[16] = {};
    int64_t i = 0;
    for (; i + 16 <= N; i += 16)
      for (int64_t j = 0; j < 16; ++j) {
        sum[i + j] = narrow<T>(widen(in[i + j]) + widen(stream[i + j]));
        squares[j] += widen(sum[i + j]) * widen(sum[i + j]);
      }
    for (; i < N; ++i) {
      sum[i] = narrow<T>(widen(in[i]) + widen(stream[i]));
      squares[0] += widen(sum[i]) * widen(sum[i]);
    }
    for (int64_t width = 8; width > 0; width /= 2)
      for (int64_t j = 0; j < width; ++j) squares[j] += squares[j + width];
    const float factor = 1.0f / std::sqrt(squares[0] / static_cast<float>(N) + eps);
    for (i = 0; i < N; ++i) normed[i] = narrow<T>(widen(weight[i]) * widen(narrow<T>(widen(sum[i]) * factor)));
  }
}

template <class T>
void add_rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t total, int64_t M, int64_t N,
                  float eps, int threads) {
  if (M * N < kSerial) threads = 1;
  tensormill::parallel_ranges(M, 1, threads, [&](int64_t begin, int64_t end) {
    rows(reinterpret_cast<const T *>(x), reinterpret_cast<const T *>(residual), reinterpret_cast<const T *>(weight),
         reinterpret_cast<T *>(y), reinterpret_cast<T *>(total), N, eps, begin, end);
  });
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("float32", &add_rms_norm<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("bfloat16", &add_rms_norm<tensormill::BFloat16>, nb::call_guard<nb::gil_scoped_release>());
}
