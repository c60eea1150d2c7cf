// Linear layers of packed low-bit weights and fixed-point activations with AVX-512 VNNI.
//
// Codes are unsigned bytes once decoded, activations are one or two signed bytes ("digits" of base 256), which is what
// VPDPBUSD multiplies: 64 products an instruction, exact in 32 bits. A token's activations are
//   x[k] = unit[k] * (256 * digit[0][k] + digit[1][k])     or     unit[k] * digit[0][k]
// with a unit that groups of columns share. Scales, units and zero points are applied in float32 to sums over a
// *segment*: columns of one block, one group of weights and one unit. So
//   y = sum over segments of  s * unit * sum(code * digits)  -  sum over groups of  s * zero_point * sum(x).
//
// A *block* is 64 bytes of a row where a byte holds whole codes (1, 2, 4, 8 bits), else 128 codes. Decoded it is J
// vectors of 64 bytes, whose 32-bit lane d holds codes of the d-th sixteenth of the block; activations are brought into
// the same order once per call. Two ways to walk:
// - few tokens: lanes are columns. Rows are dotted with x, and summed across lanes at the end.
// - more tokens: lanes are rows. Blocks of 48 rows are transposed, so that each of x's 32-bit words is broadcast and
//   the sums of 16 rows are one vector: nothing but VPDPBUSD happens per token until a segment ends.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "isa.h"
#include "packed_weight.h"
#include "prefetch.h"

#if TENSORMILL_X86

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers trip these (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace tensormill::low_bit::vnni {

#define TM_VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))
#define TM_VNNI_INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;

template <int BITS>
constexpr bool kWholeBytes = 8 % BITS == 0;
template <int BITS>
constexpr int kVectors = kWholeBytes<BITS> ? 8 / BITS : 2;  // J
template <int BITS>
constexpr int64_t kBlock = 64 * kVectors<BITS>;  // codes
template <int BITS>
constexpr int64_t kBlockBytes = kBlock<BITS> *BITS / 8;
template <int BITS>
constexpr int64_t kLaneCodes = kBlock<BITS> / kLanes;

// Whether segments are whole lanes.
template <int BITS>
bool takes(int64_t groups, int64_t group_size, int64_t units, int64_t unit_size) {
  return (groups == 1 || group_size % kLaneCodes<BITS> == 0) && (units == 1 || unit_size % kLaneCodes<BITS> == 0);
}

struct Aligned {
  std::unique_ptr<uint8_t[]> storage;
  uint8_t *data;
  explicit Aligned(int64_t bytes)
      : storage(new uint8_t[bytes + 64]),
        data(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(storage.get()) + 63) / 64 * 64)) {}
};

// ---------------------------------------------------------------- order of the codes

// Column of a block that vector j holds in byte p.
template <int BITS>
constexpr int column_at(int j, int p) {
  return kWholeBytes<BITS> ? kVectors<BITS> * p + j : p / 4 * 8 + 4 * j + p % 4;
}

// How to bring bytes from the order of columns into that of decoded codes: two vectors at a time.
template <int BITS>
struct Order {
  static constexpr int kPairs = kBlock<BITS> > 128 ? kBlock<BITS> / 128 : 1;
  alignas(64) uint8_t index[kVectors<BITS>][64];
  uint64_t from[kVectors<BITS>][kPairs];
  constexpr Order() : index(), from() {
    for (int j = 0; j < kVectors<BITS>; ++j)
      for (int p = 0; p < 64; ++p) {
        const int column = column_at<BITS>(j, p);
        index[j][p] = static_cast<uint8_t>(column % 128);
        from[j][column / 128] |= uint64_t{1} << p;
      }
  }
};
template <int BITS>
constexpr Order<BITS> kOrder{};

template <int BITS>
TM_VNNI TM_VNNI_INLINE void arrange_block(const int8_t *natural, int8_t *out) {
  constexpr int PAIRS = Order<BITS>::kPairs;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors<BITS>; ++j) {
    const __m512i index = _mm512_load_si512(kOrder<BITS>.index[j]);
    __m512i value = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair) {
      const __m512i low = _mm512_loadu_si512(natural + 128 * pair);
      const __m512i high = kBlock<BITS> > 64 ? _mm512_loadu_si512(natural + 128 * pair + 64) : low;
      value = _mm512_or_si512(value, _mm512_maskz_permutex2var_epi8(kOrder<BITS>.from[j][pair], low, index, high));
    }
    _mm512_store_si512(out + 64 * j, value);
  }
}

// Where a byte does not hold whole codes: bytes that bring the codes 4h ... 4h+3 of octet d into 32-bit lane d, and the
// bits to shift them by. A byte index of 64 or more refers to the second vector of the block.
template <int BITS>
struct Octets {
  alignas(64) uint8_t byte[2][64], shift[2][64];
  constexpr Octets() : byte(), shift() {
    for (int h = 0; h < 2; ++h)
      for (int p = 0; p < 64; ++p) {
        const int start = 4 * BITS * h, source = p / 4 * BITS + start / 8 + p % 4;
        byte[h][p] = static_cast<uint8_t>(source < 16 * BITS ? source : 0);
        shift[h][p] = static_cast<uint8_t>(p / 4 % 2 * 32 + start % 8 + p % 4 * BITS);
      }
  }
};
template <int BITS>
constexpr Octets<BITS> kOctets{};

struct Packed {
  __m512i first, second;
};

// `bytes` of a block, the rest zero.
template <int BITS>
TM_VNNI TM_VNNI_INLINE Packed load_block(const uint8_t *codes, int64_t bytes) {
  if (bytes >= kBlockBytes<BITS>) {
    if (kBlockBytes<BITS> == 64) return {_mm512_loadu_si512(codes), _mm512_setzero_si512()};
    bytes = kBlockBytes<BITS>;
  }
  const __mmask64 first = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
  const __mmask64 second = bytes > 64 ? (1ull << (bytes - 64)) - 1 : 0;
  return {_mm512_maskz_loadu_epi8(first, codes),
          kBlockBytes<BITS> > 64 ? _mm512_maskz_loadu_epi8(second, codes + 64) : _mm512_setzero_si512()};
}

template <int BITS>
TM_VNNI TM_VNNI_INLINE __m512i decode(const Packed &packed, int j) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  if constexpr (BITS == 8) {
    return packed.first;
  } else if constexpr (kWholeBytes<BITS>) {
    return _mm512_and_si512(_mm512_srli_epi32(packed.first, BITS * j), mask);
  } else {
    const __m512i index = _mm512_load_si512(kOctets<BITS>.byte[j]);
    const __m512i bytes = kBlockBytes<BITS> > 64 ? _mm512_permutex2var_epi8(packed.first, index, packed.second)
                                                 : _mm512_permutexvar_epi8(index, packed.first);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(kOctets<BITS>.shift[j]), bytes), mask);
  }
}

// The middle codes of a byte of four, by its six lower bits.
struct Middle {
  alignas(64) uint8_t code[2][64];
  constexpr Middle() : code() {
    for (int i = 0; i < 64; ++i) {
      code[0][i] = static_cast<uint8_t>(i >> 2 & 3);
      code[1][i] = static_cast<uint8_t>(i >> 4);
    }
  }
};
constexpr Middle kMiddle{};

// As decode, with fewer instructions if tables for it are kept in registers: VPERMB ignores an index's upper bits.
struct Decoder {
  __m512i middle[2];

  TM_VNNI TM_VNNI_INLINE Decoder() : middle{_mm512_load_si512(kMiddle.code[0]), _mm512_load_si512(kMiddle.code[1])} {
    __asm__("" : "+v"(middle[0]), "+v"(middle[1]));  // not from memory every time
  }
  template <int BITS>
  TM_VNNI TM_VNNI_INLINE __m512i code(const Packed &packed, int j) const {
    if (BITS == 2 && (j == 1 || j == 2)) return _mm512_permutexvar_epi8(packed.first, middle[j - 1]);
    return decode<BITS>(packed, j);
  }
};

// ---------------------------------------------------------------- activations

TM_VNNI TM_VNNI_INLINE __m512 load_floats(const void *data, int64_t i, int kind, __mmask16 mask) {
  if (kind == kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + i);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + i);
  if (kind == kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

TM_VNNI_INLINE uint32_t lanes_below(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1u;
}

// A call's activations in the order of the decoded codes.
template <int BITS>
struct Activations {
  int64_t M, K, blocks, padded_groups;  // groups rounded up to a multiple of 16, the rest zero
  int digits;
  Aligned value_storage, float_storage;
  int8_t *values;  // [M][blocks][digits][J][64], zero past K
  float *units;    // [M][blocks][16], per lane
  float *sums;     // [M][padded_groups], of x

  Activations(int64_t tokens, int64_t columns, int64_t groups, int digit_count)
      : M(tokens),
        K(columns),
        blocks((columns + kBlock<BITS> - 1) / kBlock<BITS>),
        padded_groups((groups + 15) / 16 * 16),
        digits(digit_count),
        value_storage(M * blocks * digits * kBlock<BITS>),
        float_storage(M * (blocks * kLanes + padded_groups) * 4),
        values(reinterpret_cast<int8_t *>(value_storage.data)),
        units(reinterpret_cast<float *>(float_storage.data)),
        sums(units + M * blocks * kLanes) {
    std::memset(sums, 0, M * padded_groups * sizeof(float));
  }
  int8_t *block_values(int64_t token, int64_t block) const {
    return values + (token * blocks + block) * digits * kBlock<BITS>;
  }
};

// Adds a block's activations, times their units, to the sums of the groups.
template <int BITS, int DIGITS>
TM_VNNI TM_VNNI_INLINE void add_to_sums(const Activations<BITS> &a, int64_t token, int64_t block, const Lanes &lanes) {
  const int8_t *values = a.block_values(token, block);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int d = 0; d < DIGITS; ++d) {
    if (d > 0) total = _mm512_slli_epi32(total, 8);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors<BITS>; ++j)
      total = _mm512_dpbusd_epi32(total, ones, _mm512_load_si512(values + (d * kVectors<BITS> + j) * 64));
  }
  alignas(64) float lane_sums[kLanes];
  _mm512_store_ps(lane_sums,
                  _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(a.units + (token * a.blocks + block) * 16)));
  float *sums = a.sums + token * a.padded_groups + lanes.first[block];
  const int32_t *lane = lanes.lane.get() + block * kLanes;
  if (lane[kLanes - 1] == 0) {
    sums[0] += _mm512_reduce_add_ps(_mm512_load_ps(lane_sums));
  } else {
    for (int d = 0; d < kLanes; ++d) sums[lane[d]] += lane_sums[d];
  }
}

// Two digits: 16 bits of x relative to the largest magnitude in a block, with a power of two as unit. False if a value
// is infinite or NaN.
template <int BITS>
TM_VNNI bool split_token(const void *x, int kind, int64_t token, const Lanes &lanes, const Activations<BITS> &a) {
  alignas(64) float natural[kBlock<BITS>];
  alignas(64) int8_t high[kBlock<BITS>], low[kBlock<BITS>];
  for (int64_t block = 0; block < a.blocks; ++block) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < kBlock<BITS>; i += 16) {
      const int64_t column = block * kBlock<BITS> + i;
      const __m512 value = load_floats(x, token * a.K + column, kind, lanes_below(a.K - column));
      _mm512_store_ps(natural + i, value);
      // as integers magnitudes have the same order, and NaN is above all of them
      largest = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest),
                                                     _mm512_castps_si512(_mm512_abs_ps(value))));
    }
    const uint32_t pattern = _mm512_reduce_max_epu32(_mm512_castps_si512(largest));
    if (pattern >= 0x7f800000u) return false;
    float magnitude;
    std::memcpy(&magnitude, &pattern, 4);
    int exponent = -110;  // so that the unit's inverse is finite
    if (magnitude > 0) std::frexp(magnitude, &exponent);
    float unit = std::ldexp(1.0f, std::max(exponent, -110) - 15);
    if (magnitude > unit * 32639) unit *= 2;  // 127 * 256 + 127
    const __m512 inverse = _mm512_set1_ps(1 / unit);
    for (int64_t i = 0; i < kBlock<BITS>; i += 16) {
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(natural + i), inverse));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      _mm_store_si128(reinterpret_cast<__m128i *>(high + i), _mm512_cvtepi32_epi8(upper));
      _mm_store_si128(reinterpret_cast<__m128i *>(low + i), _mm512_cvtepi32_epi8(value));  // the lower byte, signed
    }
    int8_t *out = a.block_values(token, block);
    arrange_block<BITS>(high, out);
    arrange_block<BITS>(low, out + kBlock<BITS>);
    _mm512_store_ps(a.units + (token * a.blocks + block) * kLanes, _mm512_set1_ps(unit));
    add_to_sums<BITS, 2>(a, token, block, lanes);
  }
  return true;
}

// One digit: given codes, and a unit for every `unit_size` columns.
template <int BITS>
TM_VNNI void arrange_token(const int8_t *codes, const float *units, int64_t unit_size, int64_t token,
                           const Lanes &lanes, const Activations<BITS> &a) {
  alignas(64) int8_t natural[kBlock<BITS>];
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int64_t column = block * kBlock<BITS>, left = a.K - column;
    const int8_t *from = codes + column;
    if (left < kBlock<BITS>) {
      std::memset(natural, 0, sizeof natural);
      std::memcpy(natural, from, left);
      from = natural;
    }
    arrange_block<BITS>(from, a.block_values(token, block));
    float *unit = a.units + (token * a.blocks + block) * kLanes;
    for (int64_t d = 0; d < kLanes; ++d) unit[d] = units[std::min(column + d * kLaneCodes<BITS>, a.K - 1) / unit_size];
    add_to_sums<BITS, 1>(a, token, block, lanes);
  }
}

// ---------------------------------------------------------------- lanes are columns

constexpr int kRows = 4;
constexpr int kPadding = 16;  // a block's scales are loaded as one vector

// kRows rows at equal distances, and what they are multiplied with.
struct Rows {
  int64_t row, count;  // rows count ... kRows-1 are row count-1 again
  const uint8_t *codes;
  int64_t code_stride;
  float *scale;  // [kRows][scale_stride], times the groups' units if they are given
  int64_t scale_stride;
};

// Fills in the scales, and starts the totals with the zero points' share of the results:
// -sum over groups of scale * zero_point * sum(x), by lanes.
template <int KIND, bool ZEROS>
TM_VNNI void load_rows(const Weight &w, const Rows &rows, const float *units, const float *sums, float *totals) {
  const __m512 middle = _mm512_set1_ps(ZEROS ? -1.0f : -static_cast<float>(1 << (w.bits - 1)));
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    __m512 total = _mm512_setzero_ps();
    const int64_t first = (rows.row + std::min(r, rows.count - 1)) * w.groups;
    for (int64_t g = 0; g < w.groups; g += 16) {
      const __mmask16 mask = lanes_below(w.groups - g);
      const __m512 scale = load_floats(w.scale, first + g, KIND, mask);
      _mm512_store_ps(rows.scale + r * rows.scale_stride + g,
                      units == nullptr ? scale : _mm512_mul_ps(scale, _mm512_load_ps(units + g)));
      __m512 share = _mm512_load_ps(sums + g);
      if (ZEROS)
        share = _mm512_mul_ps(
            share, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zero + first + g))));
      total = _mm512_fmadd_ps(share, scale, total);
    }
    _mm512_store_ps(totals + r * kLanes, _mm512_mul_ps(total, middle));
  }
}

// Scales of a row, and scale * zero_point (not where there are none).
template <int KIND, bool ZEROS>
TM_VNNI void load_scales(const Weight &w, int64_t row, float *scales, float *products) {
  for (int64_t g = 0; g < w.groups; g += 16) {
    const __mmask16 mask = lanes_below(w.groups - g);
    const int64_t i = row * w.groups + g;
    const __m512 scale = load_floats(w.scale, i, KIND, mask);
    _mm512_store_ps(scales + g, scale);
    if (ZEROS)
      _mm512_store_ps(products + g, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                                                             _mm_maskz_loadu_epi8(mask, w.zero + i)))));
  }
}

// Fetches rows' scales and zero points.
TM_VNNI_INLINE void prefetch_scales(const Weight &w, int64_t row, int64_t rows) {
  const int64_t size = w.scale_kind == kFloat32 ? 4 : 2;
  const char *scale = static_cast<const char *>(w.scale) + row * w.groups * size;
  for (int64_t i = 0; i < rows * w.groups * size; i += 64) __builtin_prefetch(scale + i, 0, 3);
  if (w.zero == nullptr) return;
  for (int64_t i = 0; i < rows * w.groups; i += 64) __builtin_prefetch(w.zero + row * w.groups + i, 0, 3);
}

// Calls body with constants for the type of the scales and whether there are zero points.
template <class Body>
TM_VNNI_INLINE auto with_kind(const Weight &w, Body &&body) {
  using std::integral_constant;
  const auto zeros = [&](auto kind) {
    if (w.zero != nullptr) return body(kind, integral_constant<bool, true>());
    return body(kind, integral_constant<bool, false>());
  };
  switch (w.scale_kind) {
    case kFloat32: return zeros(integral_constant<int, kFloat32>());
    case kBFloat16: return zeros(integral_constant<int, kBFloat16>());
    default: return zeros(integral_constant<int, kFloat16>());
  }
}

template <int BITS>
struct Call {
  const Weight &w;
  const Activations<BITS> &a;
  const Lanes &lanes;
  const Output &out;
};

// Rows that are multiplied together. Where a byte takes many products, four share what is loaded of x, and lines are
// asked for. Otherwise rows are read one by one, which is faster: processors fetch ahead of one stream themselves.
template <int BITS, int DIGITS>
constexpr int kTogether = kWholeBytes<BITS> && kVectors<BITS> * DIGITS >= 4 ? kRows : 1;

// Adds COUNT blocks of kTogether rows; ONE_GROUP where a block never has two groups, UNITS where units are not in the
// scales. The block's share of `next` is fetched into the second-level cache, in the order of memory.
template <int BITS, int DIGITS, bool ONE_GROUP, bool UNITS, int COUNT>
TM_VNNI TM_VNNI_INLINE void add_blocks(const Call<BITS> &call, const Rows &rows, const uint8_t *next, int64_t block,
                                       const Decoder &decoder, __m512 *total) {
  constexpr int J = kVectors<BITS>, ROWS = kTogether<BITS, DIGITS>;
  Packed packed[COUNT][ROWS];
  const uint8_t *from = rows.codes + block * kBlockBytes<BITS>;
  const int64_t left = COUNT == 1 ? call.w.row_bytes - block * kBlockBytes<BITS> : kBlockBytes<BITS>;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < COUNT; ++b) {
      Packed loaded = load_block<BITS>(from + r * rows.code_stride + b * kBlockBytes<BITS>, left);
      __asm__ volatile("" : "+v"(loaded.first));  // now, and once
      packed[b][r] = loaded;
      if (ROWS > 1) __builtin_prefetch(next + (block * ROWS + r * COUNT + b) * kBlockBytes<BITS>, 0, 2);
    }
#pragma GCC unroll 4
  for (int b = 0; b < COUNT; ++b, ++block) {
    const int8_t *x = call.a.values + block * DIGITS * kBlock<BITS>;
    __m512i sum[ROWS][DIGITS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int d = 0; d < DIGITS; ++d) sum[r][d] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      __m512i digit[DIGITS];
#pragma GCC unroll 2
      for (int d = 0; d < DIGITS; ++d) digit[d] = _mm512_load_si512(x + (d * J + j) * 64);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m512i code = decoder.code<BITS>(packed[b][r], j);
#pragma GCC unroll 2
        for (int d = 0; d < DIGITS; ++d) sum[r][d] = _mm512_dpbusd_epi32(sum[r][d], code, digit[d]);
      }
    }
    const float *const scale = rows.scale + call.lanes.first[block];
    const __m512i lane = _mm512_loadu_si512(call.lanes.lane.get() + block * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const float *const of = scale + r * rows.scale_stride;
      const __m512i exact =
          DIGITS == 1 ? sum[r][0] : _mm512_add_epi32(_mm512_slli_epi32(sum[r][0], 8), sum[r][DIGITS - 1]);
      __m512 value = _mm512_cvtepi32_ps(exact);
      if (UNITS) value = _mm512_mul_ps(value, _mm512_load_ps(call.a.units + block * kLanes));
      const __m512 by = ONE_GROUP ? _mm512_set1_ps(*of) : _mm512_permutexvar_ps(lane, _mm512_loadu_ps(of));
      total[r] = _mm512_fmadd_ps(value, by, total[r]);
    }
  }
}

TM_VNNI TM_VNNI_INLINE __m128 sums_of(const __m512 (&total)[kRows]) {
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(total[0], total[1]), _mm512_unpackhi_ps(total[0], total[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(total[2], total[3]), _mm512_unpackhi_ps(total[2], total[3]));
  const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
  const __m512 even = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), odd = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  const __m512 sum = _mm512_add_ps(even, odd);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// One token, four rows at a time, and the last few by themselves. `units` of the groups, or null.
template <int BITS, int DIGITS, bool ONE_GROUP, bool UNITS>
TM_VNNI void dot_rows(const Call<BITS> &call, const float *units, int64_t begin, int64_t end) {
  const Weight &w = call.w;
  const int64_t blocks = call.a.blocks, full = w.row_bytes / kBlockBytes<BITS>;
  const int64_t scale_stride = call.a.padded_groups + kPadding;
  const Aligned scales(kRows * scale_stride * 4);
  std::memset(scales.data, 0, kRows * scale_stride * 4);
  const auto load =
      with_kind(w, [](auto kind, auto zeros) { return &load_rows<decltype(kind)::value, decltype(zeros)::value>; });
  constexpr int TOGETHER = kTogether<BITS, DIGITS>, COUNT = TOGETHER == 1 ? 4 : 2;
  const Decoder decoder;
  for (int64_t row = begin, count; row < end; row += count) {
    count = end - row >= kRows ? kRows : 1;
    Rows rows{row, count, w.codes + row * w.row_bytes, count == 1 ? 0 : w.row_bytes,
                    reinterpret_cast<float *>(scales.data), scale_stride};
    prefetch_pages(rows.codes + kPageDistance, count * w.row_bytes);
    prefetch_scales(w, row + 16 * kRows, kRows);
    alignas(64) float totals[kRows * kLanes], sums[kRows];
    load(w, rows, units, call.a.sums, totals);
    __m512 total[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r] = _mm512_load_ps(totals + r * kLanes);
    const uint8_t *next = rows.codes + kRows * w.row_bytes + 4096;
#pragma GCC unroll 4
    for (int r = 0; r < count; r += TOGETHER) {
      int64_t block = 0;
      for (; block + COUNT <= full; block += COUNT)
        add_blocks<BITS, DIGITS, ONE_GROUP, UNITS, COUNT>(call, rows, next, block, decoder, total + r);
      for (; block < blocks; ++block)
        add_blocks<BITS, DIGITS, ONE_GROUP, UNITS, 1>(call, rows, next, block, decoder, total + r);
      rows.codes += TOGETHER * rows.code_stride;
      rows.scale += TOGETHER * scale_stride;
    }
    _mm_store_ps(sums, sums_of(total));
    for (int64_t r = 0; r < count; ++r) call.out.store(0, row + r, sums[r]);
  }
}

// The units of the one token's groups; false if one changes within a group.
template <int BITS>
bool units_of_groups(const Call<BITS> &call, float *units) {
  std::fill(units, units + call.a.padded_groups, 0.0f);
  int64_t before = -1;
  for (int64_t lane = 0; lane < call.a.blocks * kLanes; ++lane) {
    const int64_t group = call.lanes.first[lane / kLanes] + call.lanes.lane[lane];
    if (group == before && units[group] != call.a.units[lane]) return false;
    units[group] = call.a.units[lane];
    before = group;
  }
  return true;
}

// ---------------------------------------------------------------- lanes are rows

// out[c] = 32-bit word c of 16 rows that are `stride` bytes apart, for c = 0 ... 3: lane r is of row r.
TM_VNNI TM_VNNI_INLINE void load_columns(const uint8_t *rows, int64_t stride, __m512i (&out)[4]) {
  __m512i mixed[4];  // rows i, 4+i, 8+i, 12+i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto piece = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows + r * stride)); };
    mixed[i] = _mm512_broadcast_i32x4(piece(i));
    mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0x00f0, piece(4 + i));
    mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0x0f00, piece(8 + i));
    mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0xf000, piece(12 + i));
  }
  const __m512i low01 = _mm512_unpacklo_epi32(mixed[0], mixed[1]), high01 = _mm512_unpackhi_epi32(mixed[0], mixed[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(mixed[2], mixed[3]), high23 = _mm512_unpackhi_epi32(mixed[2], mixed[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// As load_columns, from and to memory: words 4c ... 4c+3.
TM_VNNI TM_VNNI_INLINE void transpose_words(const uint8_t *rows, int64_t stride, int64_t c, uint8_t *out) {
  __m512i columns[4];
  load_columns(rows + 16 * c, stride, columns);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm512_store_si512(out + (4 * c + i) * 64, columns[i]);
}

// Sixteen rows' scales: out[g * out_stride + r] = in[r * stride + g].
TM_VNNI inline void transpose_floats(const float *in, int64_t stride, int64_t count, int64_t out_stride, float *out) {
  for (int64_t g = 0; g < count; g += 4) {
    __m512i columns[4];
    load_columns(reinterpret_cast<const uint8_t *>(in + g), stride * 4, columns);
    for (int i = 0; i < 4; ++i) _mm512_store_ps(out + (g + i) * out_stride, _mm512_castsi512_ps(columns[i]));
  }
}

// A tile of tokens, their words in the order of use: [blocks][16 lanes][J][digits][TOKENS].
template <int BITS, int DIGITS>
TM_VNNI void arrange_tile(const Activations<BITS> &a, int64_t first, int64_t tokens, int64_t width, int32_t *out) {
  constexpr int J = kVectors<BITS>;
  const int64_t stride = a.blocks * DIGITS * kBlock<BITS>;
  alignas(64) int32_t words[kLanes][kLanes];
  std::memset(out, 0, a.blocks * kLanes * J * DIGITS * width * 4);
  for (int64_t part = 0; part < tokens; part += kLanes) {
    const int64_t here = std::min(kLanes, tokens - part);
    for (int64_t block = 0; block < a.blocks; ++block)
      for (int d = 0; d < DIGITS; ++d)
        for (int j = 0; j < J; ++j) {
          const int8_t *x = a.block_values(first + part, block) + (d * J + j) * 64;
          int32_t *to = out + ((block * kLanes * J + j) * DIGITS + d) * width + part;
          if (here == kLanes) {
            for (int64_t c = 0; c < 4; ++c)
              transpose_words(reinterpret_cast<const uint8_t *>(x), stride, c, reinterpret_cast<uint8_t *>(words));
            for (int64_t c = 0; c < kLanes; ++c)
              _mm512_storeu_si512(to + c * J * DIGITS * width, _mm512_load_si512(words[c]));
          } else {
            for (int64_t t = 0; t < here; ++t)
              for (int64_t c = 0; c < kLanes; ++c)
                std::memcpy(to + c * J * DIGITS * width + t, x + t * stride + 4 * c, 4);
          }
        }
  }
}

// The units of a tile, by lane: [blocks][16][TOKENS].
template <int BITS>
void arrange_units(const Activations<BITS> &a, int64_t first, int64_t tokens, int64_t width, float *out) {
  std::memset(out, 0, a.blocks * kLanes * width * 4);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < a.blocks * kLanes; ++i) out[i * width + t] = a.units[(first + t) * a.blocks * kLanes + i];
}

// A few tokens in the order of use.
struct Tile {
  int64_t first, tokens, width;
  const int32_t *words;
  const float *units;
};

constexpr int kStrips = 3;  // of 16 rows: each broadcast word serves all, at the cost of half a product
constexpr int64_t kStripRows = kStrips * kLanes;

// 48 rows (fewer at the end of the matrix) with their scales, transposed, and what is summed so far.
struct Strips {
  int64_t row, rows;
  const float *scale, *product;  // [groups][kStripRows], the scales, and their products with the zero points
  float *total;                  // [tokens][kStripRows]
};

// Vectors that a row's block is while it is transposed: packed codes, or decoded ones.
template <int BITS>
constexpr int kWords = kWholeBytes<BITS> ? 1 : kVectors<BITS>;
template <int BITS>
constexpr int64_t kStagedBytes = kWords<BITS> *kStripRows * 64;

// A block on its way from the matrix to the multiplication. Rows are copied first, for they may lie at a distance at
// which the first-level cache holds few of them, then transposed. Both happen a little at a time while another block is
// multiplied, which leaves the units for it idle. `copied` is [words][48 rows][64], `words` [words][strips][16][64].
struct Staging {
  const uint8_t *rows = nullptr;  // to copy, or null
  int64_t bytes = 0, row_bytes = 0, count = 0;
  uint8_t *copied = nullptr;
  const uint8_t *copied_before = nullptr;  // to transpose, or null
  uint8_t *words = nullptr;

  template <int BITS>
  TM_VNNI TM_VNNI_INLINE void copy(int64_t c) const {  // a sixteenth
    if (rows == nullptr) return;
#pragma GCC unroll 4
    for (int64_t r = kStrips * c; r < kStrips * (c + 1); ++r) {
      const uint8_t *from = rows + r * row_bytes;
      const Packed packed = load_block<BITS>(from, r < count ? bytes : 0);
      for (int64_t i = 0; i < kBlockBytes<BITS>; i += 64)  // of the next strips, into the second-level cache
        __builtin_prefetch(from + kStripRows * row_bytes + i, 0, 2);
#pragma GCC unroll 2
      for (int j = 0; j < kWords<BITS>; ++j)
        _mm512_store_si512(copied + (j * kStripRows + r) * 64,
                           kWholeBytes<BITS> ? packed.first : decode<BITS>(packed, j));
    }
  }
  template <int BITS>
  TM_VNNI TM_VNNI_INLINE void transpose(int64_t c) const {  // a sixteenth, if c is below 4 kStrips
    if (copied_before == nullptr || c >= 4 * kStrips) return;
    const int64_t strip = c / 4;
#pragma GCC unroll 2
    for (int j = 0; j < kWords<BITS>; ++j)
      transpose_words(copied_before + (j * kStripRows + strip * kLanes) * 64, 64, c % 4,
                      words + (j * kStrips + strip) * kLanes * 64);
  }
};

// Adds a block's products with TOKENS tokens. `ends` has a bit for every lane that is the last of its segment.
template <int BITS, int DIGITS, int TOKENS>
TM_VNNI void multiply(const Call<BITS> &call, const Strips &strips, const Tile &tile, int64_t block, uint32_t ends,
                      const uint8_t *codes, const Staging &staging) {
  constexpr int J = kVectors<BITS>;
  const int32_t *x = tile.words + block * kLanes * J * DIGITS * TOKENS;
  const float *units = tile.units + block * kLanes * TOKENS;
  const int32_t *lane = call.lanes.lane.get() + block * kLanes;
  float *total = strips.total + tile.first * kStripRows;
  __m512i sum[kStrips][DIGITS][TOKENS];
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 2
    for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) sum[s][d][t] = _mm512_setzero_si512();
  for (int64_t c = 0; c < kLanes; ++c) {
    staging.copy<BITS>(c);
    staging.transpose<BITS>(c);
    Packed packed[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s)
      if (kWholeBytes<BITS>) {
        packed[s].first = _mm512_load_si512(codes + (s * kLanes + c) * 64);
        if (BITS != 8) __asm__("" : "+v"(packed[s].first));
      }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      __m512i code[kStrips];
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s)
        code[s] = kWholeBytes<BITS> ? decode<BITS>(packed[s], j)
                                    : _mm512_load_si512(codes + ((j * kStrips + s) * kLanes + c) * 64);
#pragma GCC unroll 2
      for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) {
          const __m512i word = _mm512_set1_epi32(x[d * TOKENS + t]);
#pragma GCC unroll 4
          for (int s = 0; s < kStrips; ++s) sum[s][d][t] = _mm512_dpbusd_epi32(sum[s][d][t], code[s], word);
        }
      x += DIGITS * TOKENS;
    }
    if (ends >> c & 1) {
      const float *scales = strips.scale + (call.lanes.first[block] + lane[c]) * kStripRows;
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        const __m512 scale = _mm512_load_ps(scales + s * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) {
          __m512i exact = sum[s][0][t];
          if (DIGITS == 2) exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), sum[s][DIGITS - 1][t]);
          const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(units[c * TOKENS + t]));
          float *to = total + t * kStripRows + s * kLanes;
          _mm512_store_ps(to, _mm512_fmadd_ps(scaled, scale, _mm512_load_ps(to)));
#pragma GCC unroll 2
          for (int d = 0; d < DIGITS; ++d) sum[s][d][t] = _mm512_setzero_si512();
        }
      }
    }
  }
}

// ---------------------------------------------------------------- by tables instead of products
//
// A byte of a row holds two nibbles of 4 / BITS codes each, so that a nibble has 16 possible sums of products with a
// token's activations. They are tabulated once per call and looked up for every row, 64 at a time with VPERMB: 16 rows
// times the four bytes of a word, each with its own table. Sums have two bytes, high and low (signed), in two tables,
// so that nothing is lost; VPDPBUSD with ones adds them up. One bit takes 4 look-ups where 8 products would be, two bits
// take as many of either.

// [blocks][16 words][2 nibbles][2: high, low][4 bytes of the word][16 sums] of one token.
template <int BITS>
constexpr int64_t kTableBytes = kLanes * 2 * 2 * 64;

template <int BITS>
TM_VNNI void build_tables(const Activations<BITS> &a, int64_t token, int8_t *out) {
  constexpr int CODES = 4 / BITS, J = kVectors<BITS>;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int8_t *x = a.block_values(token, block);
    for (int64_t word = 0; word < kLanes; ++word)
      for (int nibble = 0; nibble < 2; ++nibble, out += 128)
        for (int byte = 0; byte < 4; ++byte) {
          int16_t sum[16] = {};
          for (int i = 0; i < CODES; ++i) {  // vector j has in byte p the column of the j-th code of packed byte p
            const int16_t value = x[(nibble * (J / 2) + i) * 64 + word * 4 + byte];
            for (int n = 0; n < 16; ++n) sum[n] += static_cast<int16_t>((n >> (BITS * i) & ((1 << BITS) - 1)) * value);
          }
          for (int n = 0; n < 16; ++n) {
            out[byte * 16 + n] = static_cast<int8_t>((sum[n] + 128) >> 8);
            out[64 + byte * 16 + n] = static_cast<int8_t>(sum[n]);
          }
        }
  }
}

// As multiply, with the tokens' tables one behind the other.
template <int BITS, int TOKENS>
TM_VNNI void look_up(const Call<BITS> &call, const Strips &strips, const Tile &tile, int64_t block, uint32_t ends,
                     const uint8_t *codes, const Staging &staging) {
  const int64_t stride = call.a.blocks * kTableBytes<BITS>;
  const auto *table = reinterpret_cast<const uint8_t *>(tile.words) + block * kTableBytes<BITS>;
  const float *units = tile.units + block * kLanes * TOKENS;
  const int32_t *lane = call.lanes.lane.get() + block * kLanes;
  float *total = strips.total + tile.first * kStripRows;
  const __m512i ones = _mm512_set1_epi8(1), low_half = _mm512_set1_epi8(15), which = _mm512_set1_epi32(0x30201000);
  __m512i high[kStrips][TOKENS], low[kStrips][TOKENS];
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) high[s][t] = low[s][t] = _mm512_setzero_si512();
  for (int64_t c = 0; c < kLanes; ++c) {
    staging.copy<BITS>(c);
    staging.transpose<BITS>(c);
    __m512i packed[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) packed[s] = _mm512_load_si512(codes + (s * kLanes + c) * 64);
#pragma GCC unroll 2
    for (int nibble = 0; nibble < 2; ++nibble) {
      __m512i index[kStrips];
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s)  // (packed & low_half) | which
        index[s] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(packed[s], 4 * nibble), low_half, which, 0xea);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const uint8_t *of = table + t * stride + (2 * c + nibble) * 128;
        const __m512i high_bytes = _mm512_load_si512(of), low_bytes = _mm512_load_si512(of + 64);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
          high[s][t] = _mm512_dpbusd_epi32(high[s][t], ones, _mm512_permutexvar_epi8(index[s], high_bytes));
          low[s][t] = _mm512_dpbusd_epi32(low[s][t], ones, _mm512_permutexvar_epi8(index[s], low_bytes));
        }
      }
    }
    if (ends >> c & 1) {
      const float *scales = strips.scale + (call.lanes.first[block] + lane[c]) * kStripRows;
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
          const __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[s][t], 8), low[s][t]);
          const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(units[c * TOKENS + t]));
          float *to = total + t * kStripRows + s * kLanes;
          _mm512_store_ps(to, _mm512_fmadd_ps(scaled, _mm512_load_ps(scales + s * kLanes), _mm512_load_ps(to)));
          high[s][t] = low[s][t] = _mm512_setzero_si512();
        }
    }
  }
}

// ---------------------------------------------------------------- strips of rows

constexpr int kByTables = 0;  // in place of a number of digits

template <int DIGITS>
constexpr int64_t kMostTokens = DIGITS == 1 ? 8 : 4;  // of a tile: 24 sums

template <int BITS, int DIGITS>
void multiply_tile(const Call<BITS> &call, const Strips &strips, const Tile &tile, int64_t block, uint32_t ends,
                   const uint8_t *codes, const Staging &staging) {
  if constexpr (DIGITS == kByTables) {
    switch (tile.width) {
      case 1: return look_up<BITS, 1>(call, strips, tile, block, ends, codes, staging);
      case 2: return look_up<BITS, 2>(call, strips, tile, block, ends, codes, staging);
      default: return look_up<BITS, 4>(call, strips, tile, block, ends, codes, staging);
    }
  } else {
    switch (tile.width) {
      case 2: return multiply<BITS, DIGITS, 2>(call, strips, tile, block, ends, codes, staging);
      case 4: return multiply<BITS, DIGITS, 4>(call, strips, tile, block, ends, codes, staging);
      default: return multiply<BITS, DIGITS, kMostTokens<DIGITS>>(call, strips, tile, block, ends, codes, staging);
    }
  }
}

TM_VNNI TM_VNNI_INLINE void store_floats(void *out, int64_t i, int kind, __mmask16 mask, __m512 value) {
  if (kind == kFloat32) return _mm512_mask_storeu_ps(static_cast<float *>(out) + i, mask, value);
  __m256i bits;
  if (kind == kFloat16) {
    bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i pattern = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(pattern, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(pattern, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(pattern, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out) + i, mask, bits);
}

// Zero points, bias, and out: TOKENS tokens at a time, so that additions don't wait for each other.
template <int TOKENS, int BITS>
TM_VNNI void finish(const Call<BITS> &call, const Strips &strips, int64_t token) {
  const Output &out = call.out;
  const bool zeros = call.w.zero != nullptr;
  const float *const by = zeros ? strips.product : strips.scale;
  const __m512 zero = _mm512_set1_ps(zeros ? 1.0f : static_cast<float>(1 << (BITS - 1)));
  __m512 share[kStrips][TOKENS];
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) share[s][t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < call.w.groups; ++g) {
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 sum = _mm512_set1_ps(call.a.sums[(token + t) * call.a.padded_groups + g]);
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s)
        share[s][t] = _mm512_fmadd_ps(sum, _mm512_load_ps(by + g * kStripRows + s * kLanes), share[s][t]);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s) {
    const int64_t row = strips.row + s * kLanes;
    const __mmask16 mask = lanes_below(strips.rows - s * kLanes);
    if (mask == 0) break;
    const __m512 bias = out.bias == nullptr ? _mm512_setzero_ps() : load_floats(out.bias, row, out.bias_kind, mask);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 total = _mm512_load_ps(strips.total + (token + t) * kStripRows + s * kLanes);
      store_floats(out.y, (token + t) * out.N + row, out.kind, mask,
                   _mm512_fnmadd_ps(share[s][t], zero, _mm512_add_ps(total, bias)));
    }
  }
}

template <int BITS, int DIGITS>
TM_VNNI void multiply_strips(const Call<BITS> &call, const Tile *tiles, int64_t count, const uint16_t *ends,
                             int64_t begin, int64_t end) {
  const Weight &w = call.w;
  const int64_t blocks = call.a.blocks, groups = call.a.padded_groups;
  const int64_t tokens = tiles[count - 1].first + tiles[count - 1].width;
  const Aligned floats((4 * groups + tokens) * kStripRows * 4), storage(4 * kStagedBytes<BITS>);
  float *const by_row = reinterpret_cast<float *>(floats.data), *const scale = by_row + 2 * groups * kStripRows;
  float *const product = scale + groups * kStripRows, *const total = product + groups * kStripRows;
  std::memset(floats.data, 0, 2 * groups * kStripRows * 4);
  const auto load = with_kind(
      w, [](auto kind, auto zeros) { return &load_scales<decltype(kind)::value, decltype(zeros)::value>; });
  uint8_t *const copied[2] = {storage.data, storage.data + kStagedBytes<BITS>};
  uint8_t *const words[2] = {storage.data + 2 * kStagedBytes<BITS>, storage.data + 3 * kStagedBytes<BITS>};
  for (int64_t row = begin; row < end; row += kStripRows) {
    const Strips strips{row, std::min(kStripRows, end - row), scale, product, total};
    for (int64_t r = 0; r < strips.rows; ++r)
      load(w, row + r, by_row + r * groups, by_row + (kStripRows + r) * groups);
    for (int64_t first = 0; first < kStripRows; first += kLanes) {
      transpose_floats(by_row + first * groups, groups, w.groups, kStripRows, scale + first);
      if (w.zero != nullptr)
        transpose_floats(by_row + (kStripRows + first) * groups, groups, w.groups, kStripRows, product + first);
    }
    std::memset(strips.total, 0, tokens * kStripRows * 4);
    const auto stage = [&](int64_t block) {  // what happens during the block
      Staging staging;
      const int64_t at = (block + 2) * kBlockBytes<BITS>;
      if (block + 2 < blocks) staging.rows = w.codes + row * w.row_bytes + at;
      staging.bytes = w.row_bytes - at;
      staging.row_bytes = w.row_bytes;
      staging.count = strips.rows;
      staging.copied = copied[(block + 2) % 2];
      if (block + 1 >= 0 && block + 1 < blocks) staging.copied_before = copied[(block + 1) % 2];
      staging.words = words[(block + 3) % 2];
      return staging;
    };
    for (int64_t block = -2; block < 0; ++block) {
      const Staging staging = stage(block);
      for (int64_t c = 0; c < kLanes; ++c) {
        staging.copy<BITS>(c);
        staging.transpose<BITS>(c);
      }
    }
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < count; ++i)
        multiply_tile<BITS, DIGITS>(call, strips, tiles[i], block, ends[block], words[block % 2],
                                    i == 0 ? stage(block) : Staging{});
    int64_t token = 0;
    for (; token + 4 <= call.a.M; token += 4) finish<4>(call, strips, token);
    for (; token < call.a.M; ++token) finish<1>(call, strips, token);
  }
}

// ---------------------------------------------------------------- entry

template <int BITS, int DIGITS>
void linear(const Weight &w, const Activations<BITS> &a, const Lanes &lanes, const Output &out, int threads) {
  const Call<BITS> call{w, a, lanes, out};
  if (a.M == 0) return;
  if constexpr (DIGITS != kByTables) {
    if (a.M == 1) {
      const Aligned storage(a.padded_groups * 4);
      float *const units = reinterpret_cast<float *>(storage.data);
      const bool one_group = w.groups == 1 || w.group_size % kBlock<BITS> == 0, folded = units_of_groups(call, units);
      parallel_chunks(out.N, kRows, threads, [&](int64_t begin, int64_t end) {
        if (one_group && folded) return dot_rows<BITS, DIGITS, true, false>(call, units, begin, end);
        if (one_group) return dot_rows<BITS, DIGITS, true, true>(call, nullptr, begin, end);
        if (folded) return dot_rows<BITS, DIGITS, false, false>(call, units, begin, end);
        dot_rows<BITS, DIGITS, false, true>(call, nullptr, begin, end);
      });
      return;
    }
  }
  std::unique_ptr<uint16_t[]> ends(new uint16_t[a.blocks]);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int32_t *lane = lanes.lane.get() + block * kLanes;
    ends[block] = 0x8000;
    for (int c = 0; c + 1 < kLanes; ++c) {
      bool changes = lane[c + 1] != lane[c];
      for (int64_t t = 0; t < a.M && !changes; ++t) {
        const float *unit = a.units + (t * a.blocks + block) * kLanes;
        changes = unit[c + 1] != unit[c];
      }
      ends[block] |= static_cast<uint16_t>(changes) << c;
    }
  }
  constexpr int64_t kMost = kMostTokens<DIGITS>;
  const int64_t count = (a.M + kMost - 1) / kMost;
  const int64_t words = a.blocks * (DIGITS == kByTables ? kTableBytes<BITS> / 4 : kBlock<BITS> / 4 * DIGITS);
  const Aligned word_storage(count * kMost * words * 4), unit_storage(count * kMost * a.blocks * kLanes * 4);
  std::unique_ptr<Tile[]> tiles(new Tile[count]);
  parallel_ranges(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tokens = std::min(kMost, a.M - i * kMost);
      const int64_t width = DIGITS == kByTables && tokens == 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : kMost;
      auto *to = reinterpret_cast<int32_t *>(word_storage.data) + i * kMost * words;
      auto *units = reinterpret_cast<float *>(unit_storage.data) + i * kMost * a.blocks * kLanes;
      if constexpr (DIGITS == kByTables) {
        for (int64_t t = 0; t < tokens; ++t)
          build_tables<BITS>(a, i * kMost + t, reinterpret_cast<int8_t *>(to + t * words));
      } else {
        arrange_tile<BITS, DIGITS>(a, i * kMost, tokens, width, to);
      }
      arrange_units<BITS>(a, i * kMost, tokens, width, units);
      tiles[i] = {i * kMost, tokens, width, to, units};
    }
  });
  parallel_chunks(out.N, kStripRows, threads, [&](int64_t begin, int64_t end) {
    multiply_strips<BITS, DIGITS>(call, tiles.get(), count, ends.get(), begin, end);
  });
}

// Floats, as 16 bits with a unit per block: false, and nothing done, if one is infinite or NaN.
template <int BITS>
bool linear_of_floats(const Weight &w, const void *x, int x_kind, int64_t M, const Output &out, int threads) {
  Activations<BITS> a(M, w.K, w.groups, 2);
  const Lanes lanes(w, a.blocks, kLanes, kLaneCodes<BITS>);
  std::atomic<bool> finite{true};
  parallel_ranges(M, 1, M * w.K >= 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      if (!split_token<BITS>(x, x_kind, token, lanes, a)) finite = false;
  });
  if (finite) linear<BITS, 2>(w, a, lanes, out, threads);
  return finite;
}

// Codes of 8 bits, [M][K], with units [M][units] for every `unit_size` columns; by products or by tables.
template <int BITS, bool TABLES = false>
void linear_of_codes(const Weight &w, const int8_t *x, const float *unit, int64_t units, int64_t unit_size, int64_t M,
                     const Output &out, int threads) {
  Activations<BITS> a(M, w.K, w.groups, 1);
  const Lanes lanes(w, a.blocks, kLanes, kLaneCodes<BITS>);
  parallel_ranges(M, 1, M * w.K >= 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      arrange_token<BITS>(x + token * w.K, unit + token * units, unit_size, token, lanes, a);
  });
  linear<BITS, TABLES ? kByTables : 1>(w, a, lanes, out, threads);
}

}  // namespace tensormill::low_bit::vnni

#endif  // TENSORMILL_X86
