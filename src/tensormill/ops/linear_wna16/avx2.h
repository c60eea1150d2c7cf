// The linear layer and dequantization with AVX2, FMA and F16C.
//
// Linear layer: a 32-bit lane takes the codes of one octet (half an octet above 4 bits), and a block is eight lanes: 64
// codes (32). The activations are permuted once per call into the order in which the codes of a block are decoded.
// Scales are applied to the float32 sums of a block, lane by lane, and zero points to the sums of x per group:
//   y = sum over groups of  s * sum(x * code)  -  s * zero_point * sum(x).
//
// 16-bit activations become fixed-point numbers: 16-bit integers that share a power of two in each block, so that an
// element is off by at most 2^-16 of the block's largest, 128 (bfloat16) or 16 (float16) times less than that one is
// itself rounded by; bfloat16 loses nothing where it is above 1/128 of the largest. Codes stay integers, and products
// are summed exactly: four instructions per 16 codes (shift, and, multiply pairs and add, add).
//
// In float32 (float32 activations, 5 and 7 bits, activations that are infinite or NaN): code j of all lanes is masked
// where it stands, without a shift, and converted: that is code * 2^p with p the bit position. The activations are
// multiplied with 2^-p, which is exact unless x is below 1e-29: three instructions per eight codes.
#pragma once

#include <cmath>

#include "packed_weight.h"

#if TENSORMILL_X86

#define TM_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TM_AVX2_INLINE TM_AVX2 inline __attribute__((always_inline))

namespace tensormill::low_bit::avx2 {

template <int BITS>
constexpr int kCodes = BITS <= 4 ? 8 : 4;  // codes of a lane
template <int BITS>
constexpr int kBlock = 8 * kCodes<BITS>;
template <int BITS>
constexpr int kBlockBytes = BITS * kCodes<BITS>;
constexpr int kMostBlockBytes = 32;

// Conversion takes bit 31 for a sign: where the last code of a lane reaches it, the lane is shifted first.
template <int BITS>
constexpr int kLastShift = BITS == 4 ? 28 : BITS == 8 ? 24 : BITS == 7 ? 4 : 0;

// In fixed point, each half of a lane takes half of its codes; the upper half's begin at this bit of their first byte.
template <int BITS>
constexpr int kUpperStart = kCodes<BITS> / 2 * BITS % 8;
template <int BITS>
constexpr bool kHasFixed = BITS != 5 && BITS != 7;  // whose half lanes don't fit into 16 bits

template <int BITS>
struct Lane {
  alignas(32) uint8_t bytes[32];  // of the block's two halves of 16 bytes, which overlap in most cases
  alignas(32) uint8_t fixed_bytes[32];
  alignas(32) uint32_t mask[kCodes<BITS>][8];
  alignas(32) float factor[kCodes<BITS>][8];  // 2^-p
  constexpr Lane() : bytes(), fixed_bytes(), mask(), factor() {
    for (int lane = 0; lane < 8; ++lane) {
      const int start = lane * kCodes<BITS> * BITS, half = lane < 4 ? 0 : std::max(0, kBlockBytes<BITS> - 16);
      for (int byte = 0; byte < 4; ++byte) {
        const int at = start / 8 + byte - half, upper = byte / 2 * kCodes<BITS> / 2 * BITS;
        const int fixed = (start + upper) / 8 + byte % 2 - half;
        bytes[4 * lane + byte] = static_cast<uint8_t>(at < 16 ? at : 0x80);
        fixed_bytes[4 * lane + byte] = static_cast<uint8_t>(fixed < 16 ? fixed : 0x80);
      }
      for (int j = 0; j < kCodes<BITS>; ++j) {
        const int position = start % 8 + j * BITS - (j + 1 == kCodes<BITS> ? kLastShift<BITS> : 0);
        mask[j][lane] = ((1u << BITS) - 1u) << position;
        factor[j][lane] = 1.0f / static_cast<float>(1u << position);
      }
    }
  }
};
template <int BITS>
constexpr Lane<BITS> kLane{};

// A block's codes with the bytes of each lane in place.
template <int BITS>
TM_AVX2_INLINE __m256i load_block(const uint8_t *codes, const uint8_t *bytes) {
  if (BITS % 4 == 0) return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes));
  __m256i halves;
  if (BITS == 1) {
    int64_t block;
    std::memcpy(&block, codes, 8);
    halves = _mm256_set1_epi64x(block);
  } else if (BITS == 2) {
    halves = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
  } else {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + kBlockBytes<BITS> - 16));
    halves = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  return _mm256_shuffle_epi8(halves, _mm256_load_si256(reinterpret_cast<const __m256i *>(bytes)));
}

// For `decode`: each lane's codes from bit 0 on (bit 4 in the odd lanes for 5 and 7 bits).
template <int BITS>
TM_AVX2_INLINE __m256i load_lanes(const uint8_t *codes) {
  return load_block<BITS>(codes, kLane<BITS>.bytes);
}

// For `decode_fixed`: each half lane's codes from bit 0 on.
template <int BITS>
TM_AVX2_INLINE __m256i load_half_lanes(const uint8_t *codes) {
  const __m256i halves = load_block<BITS>(codes, kLane<BITS>.fixed_bytes);
  if (kUpperStart<BITS> == 0) return halves;
  return _mm256_blend_epi16(halves, _mm256_srli_epi16(halves, kUpperStart<BITS>), 0xaa);
}

// Code j of each half lane.
template <int BITS>
TM_AVX2_INLINE __m256i decode_fixed(__m256i halves, int j) {
  if (j != 0) halves = _mm256_srli_epi16(halves, j * BITS);
  if (j != 0 && (j + 1) * BITS == 16) return halves;
  return _mm256_and_si256(halves, _mm256_set1_epi16((1 << BITS) - 1));
}

// Code j of each lane, times 2^p.
template <int BITS>
TM_AVX2_INLINE __m256 decode(__m256i lanes, int j) {
  const bool last = j + 1 == kCodes<BITS>;
  if (last && kLastShift<BITS> != 0) lanes = _mm256_srli_epi32(lanes, kLastShift<BITS>);
  if (!last || BITS % 4 != 0)
    lanes = _mm256_and_si256(lanes, _mm256_load_si256(reinterpret_cast<const __m256i *>(kLane<BITS>.mask[j])));
  return _mm256_cvtepi32_ps(lanes);
}

TM_AVX2_INLINE __m256 load_floats(const void *data, int64_t i, int kind) {
  if (kind == kFloat32) return _mm256_loadu_ps(static_cast<const float *>(data) + i);
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(data) + i));
  if (kind == kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

TM_AVX2 inline void convert_to_floats(const void *data, int64_t first, int64_t count, int kind, float *out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load_floats(data, first + i, kind));
  for (; i < count; ++i) out[i] = load_float(data, first + i, kind);
}

TM_AVX2_INLINE float reduce_add(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// The activations of one call in the order of the decoded codes, and their sums over each group.
struct Activations {
  int64_t M, blocks, block;
  int64_t span;           // blocks that are summed before a scale is applied: two of one group, or one
  int64_t padded_groups;  // groups rounded up to a multiple of 8, the rest zero
  std::unique_ptr<float[]> storage;
  void *values;   // [M][blocks][codes of a lane][8] float32 or [M][blocks][codes of half a lane][16] int16, aligned
  float *sums;    // [M][padded_groups]
  float *powers;  // [M][blocks], of fixed-point values; those of a span agree

  Activations(int64_t tokens, const Weight &w, int64_t block_codes)
      : M(tokens), blocks((w.K + block_codes - 1) / block_codes), block(block_codes),
        span(w.groups == 1 || w.group_size % (2 * block) == 0 ? 2 : 1),
        padded_groups((w.groups + 7) / 8 * 8) {
    storage.reset(new float[M * (blocks * (block + 1) + padded_groups) + 8]);
    float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(storage.get()) + 31) / 32 * 32);
    values = aligned;
    sums = aligned + M * blocks * block;
    powers = sums + M * padded_groups;
    std::memset(sums, 0, M * padded_groups * sizeof(float));
  }
};

// A token's activations in float32 and natural order, zeros past K.
template <int BITS>
TM_AVX2 std::unique_ptr<float[]> natural_order(const void *x, int kind, int64_t token, const Weight &w,
                                               const Activations &a) {
  std::unique_ptr<float[]> natural(new float[a.blocks * kBlock<BITS>]());
  convert_to_floats(x, token * w.K, w.K, kind, natural.get());
  return natural;
}

TM_AVX2 inline void sum_groups(const float *natural, int64_t token, const Weight &w, Activations &a) {
  float *sums = a.sums + token * a.padded_groups;
  for (int64_t g = 0; g < w.groups; ++g) {  // of whole octets, and the padding past K
    const int64_t end = std::min((w.K + 7) / 8 * 8, (g + 1) * w.group_size);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t k = g * w.group_size; k < end; k += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(natural + k));
    sums[g] = reduce_add(sum);
  }
}

// Element j of each lane's run of activations.
template <int BITS>
TM_AVX2_INLINE __m256 gather_lanes(const float *block, int64_t j) {
  const __m256i lane = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(kCodes<BITS>));
  return _mm256_i32gather_ps(block + j, lane, 4);
}

template <int BITS>
TM_AVX2 void permute_token(const void *x, int kind, int64_t token, const Weight &w, Activations &a) {
  const auto natural = natural_order<BITS>(x, kind, token, w, a);
  float *out = static_cast<float *>(a.values) + token * a.blocks * kBlock<BITS>;
  for (int64_t block = 0; block < a.blocks; ++block)
    for (int64_t j = 0; j < kCodes<BITS>; ++j, out += 8)
      _mm256_store_ps(out, _mm256_mul_ps(gather_lanes<BITS>(natural.get() + block * kBlock<BITS>, j),
                                         _mm256_load_ps(kLane<BITS>.factor[j])));
  sum_groups(natural.get(), token, w, a);
}

constexpr int kSmallestExponent = -100;  // of a block's largest activation; smaller ones keep fewer than 15 bits

// Returns whether all activations are finite; they are useless if not.
template <int BITS>
TM_AVX2 bool permute_token_fixed(const void *x, int kind, int64_t token, const Weight &w, Activations &a) {
  const auto natural = natural_order<BITS>(x, kind, token, w, a);
  int16_t *out = static_cast<int16_t *>(a.values) + token * a.blocks * kBlock<BITS>;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t begin = 0; begin < a.blocks; begin += a.span) {
    const int64_t end = std::min(begin + a.span, a.blocks);
    __m256i most = _mm256_setzero_si256();  // as integers, NaN is above infinity and that above all numbers
    for (int64_t k = begin * kBlock<BITS>; k < end * kBlock<BITS>; k += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(natural.get() + k));
      most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, bits));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), most);
    const int32_t bits = *std::max_element(lanes, lanes + 8);
    if (bits >= 0x7f800000) return false;
    const int exponent = std::max((bits >> 23) - 127, kSmallestExponent) - 14;  // the largest becomes 2^14 ... 2^15
    const float power = std::ldexp(1.0f, exponent);
    const __m256 by = _mm256_set1_ps(std::ldexp(1.0f, -exponent)), back = _mm256_set1_ps(power);
    for (int64_t block = begin; block < end; ++block) {
      float *values = natural.get() + block * kBlock<BITS>;
      for (int64_t k = 0; k < kBlock<BITS>; k += 8) {
        const __m256 steps = _mm256_round_ps(_mm256_mul_ps(_mm256_loadu_ps(values + k), by),
                                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_ps(values + k, _mm256_mul_ps(steps, back));
      }
      for (int64_t j = 0; j < kCodes<BITS> / 2; ++j, out += 16) {
        const __m256 lower = gather_lanes<BITS>(values, j), upper = gather_lanes<BITS>(values, j + kCodes<BITS> / 2);
        const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(upper, by)), 16);
        _mm256_store_si256(reinterpret_cast<__m256i *>(out),
                           _mm256_blend_epi16(_mm256_cvtps_epi32(_mm256_mul_ps(lower, by)), high, 0xaa));
      }
      a.powers[token * a.blocks + block] = power;
    }
  }
  sum_groups(natural.get(), token, w, a);
  return true;
}

constexpr int kRows = 2;     // rows at a time; three are 4 % slower with one token, 1 % faster with four
constexpr int kPadding = 8;  // a block's scales are loaded as one vector

// Scales and correction factors -scale * zero of `kRows` rows, in float32, zero past the last group.
struct RowScales {
  int64_t stride;
  std::unique_ptr<float[]> scale, correction;
  explicit RowScales(int64_t groups)
      : stride((groups + 7) / 8 * 8 + kPadding),
        scale(new float[kRows * stride]()),
        correction(new float[kRows * stride]()) {}
};

TM_AVX2 inline void load_scales(const Weight &w, int64_t row, int rows, RowScales &s) {
  for (int r = 0; r < rows; ++r) {
    const int64_t first = (row + r) * w.groups;
    float *scale = s.scale.get() + r * s.stride, *correction = s.correction.get() + r * s.stride;
    convert_to_floats(w.scale, first, w.groups, w.scale_kind, scale);
    if (w.zero == nullptr) {
      for (int64_t g = 0; g < w.groups; ++g) correction[g] = scale[g] * -static_cast<float>(1 << (w.bits - 1));
    } else {
      for (int64_t g = 0; g < w.groups; ++g) correction[g] = scale[g] * -static_cast<float>(w.zero[first + g]);
    }
  }
}

struct Call {
  const Weight &w;
  const Activations &a;
  const Lanes &lanes;
  const Output &out;
};

// Sums of products lane by lane, as integers where FIXED. A single chain of additions would wait for its own results.
template <bool FIXED, int TOKENS>
constexpr int kChains = TOKENS == 1 && !FIXED ? 2 : 1;
template <bool FIXED, int TOKENS>
using Sums = __m256[kRows][TOKENS][kChains<FIXED, TOKENS>];

template <bool FIXED, int TOKENS>
TM_AVX2_INLINE void clear(Sums<FIXED, TOKENS> &sum) {
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains<FIXED, TOKENS>; ++chain) sum[r][t][chain] = _mm256_setzero_ps();
}

// Adds to `sum` the products of a block's codes and TOKENS tokens' activations, `stride` bytes apart.
template <int BITS, bool FIXED, int TOKENS>
TM_AVX2_INLINE void add_block(const uint8_t *const (&codes)[kRows], const char *x, int64_t stride,
                              Sums<FIXED, TOKENS> &sum) {
  __m256i loaded[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) loaded[r] = FIXED ? load_half_lanes<BITS>(codes[r]) : load_lanes<BITS>(codes[r]);
#pragma GCC unroll 8
  for (int j = 0; j < (FIXED ? kCodes<BITS> / 2 : kCodes<BITS>); ++j) {
    __m256 value[kRows];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
      value[r] = FIXED ? _mm256_castsi256_ps(decode_fixed<BITS>(loaded[r], j)) : decode<BITS>(loaded[r], j);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m256 xt = _mm256_load_ps(reinterpret_cast<const float *>(x + t * stride + 32 * j));
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        __m256 &s = sum[r][t][j % kChains<FIXED, TOKENS>];
        if constexpr (FIXED) {
          const __m256i pairs = _mm256_madd_epi16(_mm256_castps_si256(value[r]), _mm256_castps_si256(xt));
          s = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(s), pairs));
          __asm__("" : "+x"(s));  // or GCC computes all products first and runs out of registers
        } else {
          s = _mm256_fmadd_ps(value[r], xt, s);
        }
      }
    }
  }
}

template <int BITS, bool FIXED>
constexpr int64_t kBlockBytesOfX = kBlock<BITS> * static_cast<int64_t>(FIXED ? sizeof(int16_t) : sizeof(float));

// As add_block, for a whole block of the rows at `codes`.
template <int BITS, bool FIXED, int TOKENS>
TM_AVX2_INLINE void add_rows(const uint8_t *const (&codes)[kRows], int64_t block, int64_t row_bytes, const char *x,
                             int64_t stride, Sums<FIXED, TOKENS> &sum) {
  const uint8_t *here[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    here[r] = codes[r] + block * kBlockBytes<BITS>;
    if (block * kBlockBytes<BITS> % 64 < kBlockBytes<BITS>)  // once per cache line
      __builtin_prefetch(here[r] + kRows * row_bytes);  // the row that is decoded next in its place
  }
  add_block<BITS, FIXED, TOKENS>(here, x + block * kBlockBytesOfX<BITS, FIXED>, stride, sum);
}

// Adds to `total` the sums of products since `block`, scaled.
template <bool FIXED, int TOKENS>
TM_AVX2_INLINE void add_scaled(const Call &call, const Sums<FIXED, TOKENS> &sum, const float *const (&scale)[kRows],
                               int64_t token, int64_t block, __m256 (&total)[kRows][TOKENS]) {
  const int64_t first = call.lanes.first[block];
  const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(call.lanes.lane.get() + block * 8));
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const __m256 by = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scale[r] + first), lane);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      __m256 products = sum[r][t][0];
      if constexpr (FIXED) {
        const __m256 power = _mm256_broadcast_ss(call.a.powers + (token + t) * call.a.blocks + block);
        products = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(products)), power);
      } else if constexpr (kChains<FIXED, TOKENS> == 2) {
        products = _mm256_add_ps(products, sum[r][t][1]);
      }
      total[r][t] = _mm256_fmadd_ps(products, by, total[r][t]);
    }
  }
}

// Rows row ... row+rows-1 times TOKENS tokens; the last row is repeated where there are fewer than kRows.
template <int BITS, bool FIXED, int TOKENS>
TM_AVX2 void tile(const Call &call, int64_t token, int64_t row, int rows, const RowScales &s) {
  const Weight &w = call.w;
  const int64_t blocks = call.a.blocks, groups = call.a.padded_groups, row_bytes = w.row_bytes;
  const int64_t stride = blocks * kBlockBytesOfX<BITS, FIXED>;
  const char *const x = static_cast<const char *>(call.a.values) + token * stride;
  const uint8_t *codes[kRows];
  const float *scale[kRows];
  __m256 total[kRows][TOKENS];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const int64_t step = std::min(r, rows - 1);
    codes[r] = w.codes + (row + step) * row_bytes;
    scale[r] = s.scale.get() + step * s.stride;
    const float *correction = s.correction.get() + step * s.stride;
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const float *sums = call.a.sums + (token + t) * groups;
      total[r][t] = _mm256_setzero_ps();
      for (int64_t g = 0; g < groups; g += 8)
        total[r][t] = _mm256_fmadd_ps(_mm256_loadu_ps(sums + g), _mm256_loadu_ps(correction + g), total[r][t]);
    }
  }
  const int64_t full = std::min(blocks, row_bytes / kBlockBytes<BITS>);
  int64_t block = 0;
  // Two blocks in one go, not in a loop: sums that live through a loop GCC keeps in memory.
  for (; call.a.span == 2 && block + 2 <= full; block += 2) {
    Sums<FIXED, TOKENS> sum;
    clear<FIXED, TOKENS>(sum);
    add_rows<BITS, FIXED, TOKENS>(codes, block, row_bytes, x, stride, sum);
    add_rows<BITS, FIXED, TOKENS>(codes, block + 1, row_bytes, x, stride, sum);
    add_scaled<FIXED, TOKENS>(call, sum, scale, token, block, total);
  }
  for (; block < full; ++block) {
    Sums<FIXED, TOKENS> sum;
    clear<FIXED, TOKENS>(sum);
    add_rows<BITS, FIXED, TOKENS>(codes, block, row_bytes, x, stride, sum);
    add_scaled<FIXED, TOKENS>(call, sum, scale, token, block, total);
  }
  if (full < blocks) {  // a vector would reach past the row, and past the buffer for the last one
    alignas(32) uint8_t padded[kRows][kMostBlockBytes] = {};
    const uint8_t *padded_rows[kRows];
    const int64_t at = full * kBlockBytes<BITS>;
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(padded[r], codes[r] + at, row_bytes - at);
      padded_rows[r] = padded[r];
    }
    Sums<FIXED, TOKENS> sum;
    clear<FIXED, TOKENS>(sum);
    add_block<BITS, FIXED, TOKENS>(padded_rows, x + full * kBlockBytesOfX<BITS, FIXED>, stride, sum);
    add_scaled<FIXED, TOKENS>(call, sum, scale, token, full, total);
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) call.out.store(token + t, row + r, reduce_add(total[r][t]));
  }
}

template <int BITS, bool FIXED>
void linear_rows(const Call &call, int64_t begin, int64_t end) {
  RowScales s(call.w.groups);
  for (int64_t row = begin; row < end; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - row));
    load_scales(call.w, row, rows, s);
    int64_t token = 0;  // from the second tile on the rows come from the nearest cache
    for (; token + 4 <= call.a.M; token += 4) tile<BITS, FIXED, 4>(call, token, row, rows, s);
    switch (call.a.M - token) {
      case 3: tile<BITS, FIXED, 3>(call, token, row, rows, s); break;
      case 2: tile<BITS, FIXED, 2>(call, token, row, rows, s); break;
      case 1: tile<BITS, FIXED, 1>(call, token, row, rows, s); break;
    }
  }
}

// Groups must be of whole octets, or there must be only one.
template <int BITS>
void linear(const Weight &w, const void *x, int x_kind, int64_t M, const Output &out, int threads) {
  Activations a(M, w, kBlock<BITS>);
  const Lanes lanes(w, a.blocks, 8, kCodes<BITS>);
  const Call call{w, a, lanes, out};
  const int permuting = M * w.K >= 65536 ? threads : 1;
  if constexpr (kHasFixed<BITS>) {
    std::atomic<bool> finite{x_kind != kFloat32};
    if (finite)
      parallel_ranges(M, 1, permuting, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token)
          if (!permute_token_fixed<BITS>(x, x_kind, token, w, a)) finite = false;
      });
    if (finite) {
      parallel_chunks(out.N, kRows, threads,
                      [&](int64_t begin, int64_t end) { linear_rows<BITS, true>(call, begin, end); });
      return;
    }
  }
  parallel_ranges(M, 1, permuting, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) permute_token<BITS>(x, x_kind, token, w, a);
  });
  parallel_chunks(out.N, kRows, threads,
                  [&](int64_t begin, int64_t end) { linear_rows<BITS, false>(call, begin, end); });
}

// ---------------------------------------------------------------- dequantization, in the order of memory

template <int BITS>
constexpr int64_t kOctetReach = BITS <= 4 ? 4 : 8;  // bytes that are read for an octet

template <int BITS>
TM_AVX2_INLINE __m256 decode_octet(const uint8_t *codes) {
  __m256i code;
  if (BITS == 8) {
    code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
  } else {
    constexpr int HALF = BITS <= 4 ? 0 : 4 * BITS / 8, SHIFT = 4 * BITS - 8 * HALF;  // where codes 4 ... 7 start
    int32_t low, high;
    std::memcpy(&low, codes, 4);
    std::memcpy(&high, codes + HALF, 4);
    code = _mm256_set1_epi32(low);
    if (HALF != 0) code = _mm256_blend_epi32(code, _mm256_set1_epi32(high), 0xf0);
    const __m256i shifts = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, SHIFT, SHIFT + BITS, SHIFT + 2 * BITS,
                                             SHIFT + 3 * BITS);
    code = _mm256_and_si256(_mm256_srlv_epi32(code, shifts), _mm256_set1_epi32((1 << BITS) - 1));
  }
  return _mm256_cvtepi32_ps(code);
}

template <int KIND>
TM_AVX2_INLINE void store_floats(void *out, int64_t i, __m256 value) {
  if (KIND == kFloat32) return _mm256_storeu_ps(static_cast<float *>(out) + i, value);
  __m128i bits;
  if (KIND == kFloat16) {
    bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m256i pattern = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(pattern, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(pattern, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(pattern, _mm256_set1_epi32(0x400000));
    const __m256i either = _mm256_castps_si256(_mm256_blendv_ps(
        _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    const __m256i high = _mm256_srli_epi32(either, 16);
    bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<uint16_t *>(out) + i), bits);
}

template <int BITS, int KIND>
TM_AVX2 void dequantize_rows(const Weight &w, void *out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t *codes = w.codes + row * w.row_bytes;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t i = row * w.groups + g, group_end = g + 1 == w.groups ? w.K : (g + 1) * w.group_size;
      const __m256 scale = _mm256_set1_ps(load_float(w.scale, i, w.scale_kind));
      const __m256 zero = _mm256_set1_ps(w.zero != nullptr ? w.zero[i] : 1 << (BITS - 1));
      int64_t k = g * w.group_size;
      for (; k + 8 <= group_end && k / 8 * BITS + kOctetReach<BITS> <= w.row_bytes; k += 8) {
        const __m256 code = decode_octet<BITS>(codes + k / 8 * BITS);
        store_floats<KIND>(out, row * w.K + k, _mm256_mul_ps(_mm256_sub_ps(code, zero), scale));
      }
      for (; k < group_end; k += 8) {  // partial, or so near the row's end that its words reach past it
        uint8_t octet[8] = {};
        std::memcpy(octet, codes + k / 8 * BITS, std::min<int64_t>(8, w.row_bytes - k / 8 * BITS));
        float value[8];
        _mm256_storeu_ps(value, _mm256_mul_ps(_mm256_sub_ps(decode_octet<BITS>(octet), zero), scale));
        for (int64_t j = 0; j < std::min<int64_t>(8, group_end - k); ++j)
          store_float(out, row * w.K + k + j, KIND, value[j]);
      }
    }
  }
}

// Groups must be of whole octets, or there must be only one.
template <int BITS>
void dequantize(const Weight &w, void *out, int kind, int64_t N, int threads) {
  parallel_chunks(N, 1, threads, [&](int64_t begin, int64_t end) {
    if (kind == kFloat32) return dequantize_rows<BITS, kFloat32>(w, out, begin, end);
    if (kind == kBFloat16) return dequantize_rows<BITS, kBFloat16>(w, out, begin, end);
    dequantize_rows<BITS, kFloat16>(w, out, begin, end);
  });
}

}  // namespace tensormill::low_bit::avx2

#endif  // TENSORMILL_X86
