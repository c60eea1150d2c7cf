// Vectors of one register, for kernels that are written once for several instruction sets.
#pragma once

#include <cstdint>

namespace tensormill {

constexpr int log2_floor(int64_t n) {
  int bits = 0;
  for (; n > 1; n /= 2) ++bits;
  return bits;
}

// BYTES of T, and of integers of its size.
template <class T, int BYTES>
struct Register;
template <int BYTES>
struct Register<float, BYTES> {
  typedef float type __attribute__((vector_size(BYTES)));
  typedef int32_t index __attribute__((vector_size(BYTES)));
};
template <int BYTES>
struct Register<double, BYTES> {
  typedef double type __attribute__((vector_size(BYTES)));
  typedef int64_t index __attribute__((vector_size(BYTES)));
};

// Lanes of a and b, numbered from a's first to b's last. A macro, for a function would need the caller's target.
#if defined(__clang__)
#define TENSORMILL_SHUFFLE(T, BYTES, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TENSORMILL_SHUFFLE(T, BYTES, a, b, ...) \
  __builtin_shuffle(a, b, typename ::tensormill::Register<T, BYTES>::index{__VA_ARGS__})
#endif

}  // namespace tensormill
