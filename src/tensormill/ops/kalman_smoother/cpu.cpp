// Kalman smoother of a batch of series: one thread takes whole series, each one step after another (recursion.h).
#include <nanobind/nanobind.h>

#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace tensormill::kalman {

template <class T>
struct Arguments {
  const T *transition, *process_noise, *emission, *precision, *information, *initial_mean, *initial_covariance;
};

template <class T>
struct Results {
  T *mean, *covariance, *filtered_mean, *filtered_covariance, *future_information, *future_precision, *log_evidence;
};

template <class T>
using Series = void (*)(const Arguments<T> &, const Results<T> &, int64_t, int, int);

}  // namespace tensormill::kalman

#define ISA portable
#define ISA_TARGET
#define ISA_SIZES !TENSORMILL_X86
#include "recursion.h"

#if TENSORMILL_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_SIZES 1
#include "recursion.h"

#define ISA avx512
// Matrices are too small for whole registers; what helps is that there are more.
#define ISA_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=256")))
#define ISA_SIZES 1
#include "recursion.h"
#endif

namespace tensormill::kalman {

template <class T>
Series<T> best_series(int size) {
  return TENSORMILL_BEST_COPY(series_of<T>(size));
}

template <class T>
void smooth(uintptr_t transition, uintptr_t process_noise, uintptr_t emission, uintptr_t precision,
            uintptr_t information, uintptr_t initial_mean, uintptr_t initial_covariance, uintptr_t mean,
            uintptr_t covariance, uintptr_t filtered_mean, uintptr_t filtered_covariance, uintptr_t future_information,
            uintptr_t future_precision, uintptr_t log_evidence, int64_t batch, int64_t steps, int size, int outputs,
            int threads) {
  const auto input = [](uintptr_t address) { return reinterpret_cast<const T *>(address); };
  const auto output = [](uintptr_t address) { return reinterpret_cast<T *>(address); };
  const Series<T> series = best_series<T>(size);
  const int64_t s = size, r = outputs;
  parallel_ranges(batch, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t vectors = b * steps * s, matrices = vectors * s;
      const Arguments<T> in{input(transition) + matrices,      input(process_noise) + matrices,
                            input(emission),                   input(precision) + b * steps * r * r,
                            input(information) + b * steps * r, input(initial_mean) + b * s,
                            input(initial_covariance) + b * s * s};
      const Results<T> out{output(mean) + vectors,
                           output(covariance) + matrices,
                           output(filtered_mean) + vectors,
                           output(filtered_covariance) + matrices,
                           output(future_information) + vectors,
                           output(future_precision) + matrices,
                           output(log_evidence) + b};
      series(in, out, steps, size, outputs);
    }
  });
}

}  // namespace tensormill::kalman

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  using namespace tensormill::kalman;
  m.def("float32", &smooth<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("float64", &smooth<double>, nb::call_guard<nb::gil_scoped_release>());
  m.def("instruction_set", &tensormill::instruction_set_name);
}
