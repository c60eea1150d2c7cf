// 16-bit floats as their bits, and behind one interface with float32: kernels compute in float32 and store with one
// rounding, to nearest, ties to even. NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace tensormill {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  float value;
  if (rest < 0x400) {  // zero and subnormals: multiples of 2^-24
    value = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((rest << 13) + (rest >= 0x7c00 ? 0x70000000u : 0x38000000u));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (bits < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

inline float bfloat_to_float(uint16_t bfloat) {
  const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(Half value) { return half_to_float(value.bits); }
inline float widen(BFloat16 value) { return bfloat_to_float(value.bits); }

template <class T>
T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline Half narrow<Half>(float value) { return {float_to_half(value)}; }
template <>
inline BFloat16 narrow<BFloat16>(float value) { return {float_to_bfloat(value)}; }

}  // namespace tensormill
