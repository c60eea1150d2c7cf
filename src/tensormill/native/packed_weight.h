// What the kernels of all instruction sets share: the packed weight and the output.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "floats.h"
#include "parallel.h"

namespace tensormill::low_bit {

enum Kind : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Weight {
  const uint8_t *codes;
  const void *scale;
  const uint8_t *zero;  // or null
  int64_t K, row_bytes, groups, group_size;
  int bits, scale_kind;
};

inline float load_float(const void *data, int64_t i, int kind) {
  if (kind == kFloat32) return static_cast<const float *>(data)[i];
  const uint16_t bits = static_cast<const uint16_t *>(data)[i];
  return kind == kBFloat16 ? bfloat_to_float(bits) : half_to_float(bits);
}

inline void store_float(void *data, int64_t i, int kind, float value) {
  if (kind == kFloat32) {
    static_cast<float *>(data)[i] = value;
  } else {
    static_cast<uint16_t *>(data)[i] = kind == kBFloat16 ? float_to_bfloat(value) : float_to_half(value);
  }
}

struct Output {
  void *y;
  const void *bias;  // or null
  int64_t N;
  int kind, bias_kind;

  void store(int64_t token, int64_t row, float value) const {
    if (bias != nullptr) value += load_float(bias, row, bias_kind);
    store_float(y, token * N + row, kind, value);
  }
};

// Where the groups of a block's lanes are: lane d of block b, with the columns (b * width + d) * codes and on, belongs
// to group first[b] + lane[b][d].
struct Lanes {
  std::unique_ptr<int64_t[]> first;
  std::unique_ptr<int32_t[]> lane;

  Lanes(const Weight &w, int64_t blocks, int64_t width, int64_t codes)
      : first(new int64_t[blocks]), lane(new int32_t[blocks * width]) {
    int64_t group = 0, group_end = w.group_size;
    for (int64_t b = 0; b < blocks; ++b) {
      first[b] = group;
      for (int64_t d = 0; d < width; ++d) {
        if ((b * width + d) * codes >= group_end && group + 1 < w.groups) {
          ++group;
          group_end += w.group_size;
          if (d == 0) first[b] = group;
        }
        lane[b * width + d] = static_cast<int32_t>(group - first[b]);
      }
    }
  }
};

}  // namespace tensormill::low_bit
