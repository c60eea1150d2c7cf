// Rotary position embedding of stacked heads, a position at a time.

#include <nanobind/nanobind.h>

#include <algorithm>

#include "floats.h"
#include "parallel.h"

namespace nb = nanobind;

namespace {

using tensormill::narrow;
using tensormill::widen;

// Below this many elements a thread costs more than it does.
constexpr int64_t kSerial = 1 << 15;

template <class T>
void positions(const T *x, const T *cosine, const T *sine, T *y, int64_t length, int64_t heads, int64_t rotated,
               int64_t head_dim, int64_t begin, int64_t end) {
  const int64_t half = head_dim / 2;
  // A product rounded, as the definition's steps are.
  const auto product = [](T a, T b) { return widen(narrow<T>(widen(a) * widen(b))); };
  for (int64_t row = begin; row < end; ++row) {
    const T *c = cosine + row % length * head_dim, *s = sine + row % length * head_dim;
    for (int64_t head = 0; head < heads; ++head) {
      const T *in = x + (row * heads + head) * head_dim;
      T *out = y + (row * heads + head) * head_dim;
      if (head >= rotated) {
        std::copy(in, in + head_dim, out);
        continue;
      }
      for (int64_t i = 0; i < half; ++i) {
        out[i] = narrow<T>(product(in[i], c[i]) - product(in[i + half], s[i]));
        out[i + half] = narrow<T>(product(in[i + half], c[i + half]) + product(in[i], s[i + half]));
      }
    }
  }
}

template <class T>
void rotate_heads(uintptr_t x, uintptr_t cosine, uintptr_t sine, uintptr_t y, int64_t batch, int64_t length,
                  int64_t heads, int64_t rotated, int64_t head_dim, int threads) {
  if (batch * length * heads * head_dim < kSerial) threads = 1;
  tensormill::parallel_ranges(batch * length, 1, threads, [&](int64_t begin, int64_t end) {
    positions(reinterpret_cast<const T *>(x), reinterpret_cast<const T *>(cosine), reinterpret_cast<const T *>(sine),
              reinterpret_cast<T *>(y), length, heads, rotated, head_dim, begin, end);
  });
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("float32", &rotate_heads<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("bfloat16", &rotate_heads<tensormill::BFloat16>, nb::call_guard<nb::gil_scoped_release>());
}
