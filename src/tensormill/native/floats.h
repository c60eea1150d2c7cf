// float32 and bfloat16 behind one interface: kernels compute in float and store with one rounding.
#pragma once

#include <cstdint>
#include <cstring>

namespace tensormill {

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline BFloat16 narrow<BFloat16>(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return {static_cast<uint16_t>(nan ? 0x7FC0 : rounded)};
}

}  // namespace tensormill
