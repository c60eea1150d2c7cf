// Low-bit linear layer and dequantization on the CPU.
//
// Codes are packed densely along K, so that eight codes of `bits` bits fill exactly `bits` bytes: an *octet*. The
// AVX-512 kernels take 128 codes of a row at a time (16 octets, 16 * bits bytes) and decode them so that 32-bit lane d
// of every decoded vector holds codes of octet d. A lane then never mixes two groups as long as the group size is a
// multiple of 8, and scales can be applied to the float32 sums of a block instead of to every weight. The activations
// are permuted once per call into the same order, padded with zeros past K. avx2.h has the kernels for AVX2.
//
// Decoded values are `code + offset` with an offset that depends on the way of decoding (table look-up or conversion),
// so that
//   y = sum over groups of  s * sum(x * value)  +  s * (-offset - zero_point) * sum(x),
// where the sums of x per group are computed once per call. Everything is multiplied and added in float32, whatever
// the activations' type: on Sapphire Rapids VDPBF16PS retires every second cycle only (measured: 2.2 cycles against
// 0.54 for a float32 FMA of half its width), so that it would be the slower way.
#include <nanobind/nanobind.h>

#include <cstring>
#include <memory>

#include "avx2.h"
#include "integer_products.h"
#include "isa.h"
#include "packed_weight.h"

namespace nb = nanobind;

using namespace tensormill::low_bit;
using tensormill::instruction_set;

namespace {

// ---------------------------------------------------------------- portable path

#if defined(__GNUC__)
#define TM_INLINE inline __attribute__((always_inline))
#else
#define TM_INLINE inline
#endif

// One row's weights in float32: out[k] = (code - zero) * scale.
TM_INLINE void dequantize_row(const Weight &w, int64_t row, float *out) {
  const uint8_t *codes = w.codes + row * w.row_bytes;
  const uint32_t mask = (1u << w.bits) - 1u;
  const int64_t K = w.K, full = K / 8 * 8;
  for (int64_t k = 0; k < full; k += 8, codes += w.bits) {
    uint64_t octet = 0;
    for (int b = 0; b < w.bits; ++b) octet |= static_cast<uint64_t>(codes[b]) << (8 * b);
    for (int j = 0; j < 8; ++j) out[k + j] = static_cast<float>((octet >> (j * w.bits)) & mask);
  }
  if (full < K) {
    uint64_t octet = 0;
    const int64_t last = ((K - full) * w.bits + 7) / 8;
    for (int64_t b = 0; b < last; ++b) octet |= static_cast<uint64_t>(codes[b]) << (8 * b);
    for (int64_t k = full; k < K; ++k) out[k] = static_cast<float>((octet >> ((k - full) * w.bits)) & mask);
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const float scale = load_float(w.scale, row * w.groups + g, w.scale_kind);
    const float zero =
        w.zero != nullptr ? static_cast<float>(w.zero[row * w.groups + g]) : static_cast<float>(1 << (w.bits - 1));
    const int64_t end = std::min(K, (g + 1) * w.group_size);
    for (int64_t k = g * w.group_size; k < end; ++k) out[k] = (out[k] - zero) * scale;
  }
}

TM_INLINE float dot(const float *a, const float *b, int64_t count) {
  float partial[16] = {};  // enough independent sums for the compiler to use vectors
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; ++j) partial[j] += a[i + j] * b[i + j];
  for (int j = 0; i < count; ++i, ++j) partial[j] += a[i] * b[i];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

TM_INLINE void linear_rows_body(const Weight &w, const float *x, int64_t M, const Output &out, int64_t begin,
                                int64_t end) {
  std::unique_ptr<float[]> row(new float[w.K]);
  for (int64_t n = begin; n < end; ++n) {
    dequantize_row(w, n, row.get());
    for (int64_t m = 0; m < M; ++m) out.store(m, n, dot(x + m * w.K, row.get(), w.K));
  }
}

TM_INLINE void dequantize_rows_body(const Weight &w, void *out, int kind, int64_t begin, int64_t end) {
  std::unique_ptr<float[]> row(new float[w.K]);
  for (int64_t n = begin; n < end; ++n) {
    dequantize_row(w, n, row.get());
    for (int64_t k = 0; k < w.K; ++k) store_float(out, n * w.K + k, kind, row[k]);
  }
}

void linear_rows_portable(const Weight &w, const float *x, int64_t M, const Output &out, int64_t begin, int64_t end) {
  linear_rows_body(w, x, M, out, begin, end);
}
void dequantize_rows_portable(const Weight &w, void *out, int kind, int64_t begin, int64_t end) {
  dequantize_rows_body(w, out, kind, begin, end);
}

#if TENSORMILL_X86
__attribute__((target("avx2,fma"))) void linear_rows_avx2(const Weight &w, const float *x, int64_t M, const Output &out,
                                                          int64_t begin, int64_t end) {
  linear_rows_body(w, x, M, out, begin, end);
}
__attribute__((target("avx2,fma"))) void dequantize_rows_avx2(const Weight &w, void *out, int kind, int64_t begin,
                                                              int64_t end) {
  dequantize_rows_body(w, out, kind, begin, end);
}

// ---------------------------------------------------------------- AVX-512

#define TM_512_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"
#define TM_512 __attribute__((target(TM_512_FEATURES)))
#define TM_ALWAYS inline __attribute__((always_inline))

constexpr int64_t kBlock = 128;

// Byte positions that bring the codes 4h ... 4h+3 of octet d into 32-bit lane d (all eight codes with h = 0 where they
// have at most four bits). A byte index of 64 or more refers to the second vector of the block.
template <int BITS>
struct OctetHalf {
  alignas(64) uint8_t byte_index[2][64];
  uint64_t second[2];
  constexpr OctetHalf() : byte_index(), second() {
    for (int h = 0; h < 2; ++h) {
      const int start = 4 * BITS * h / 8;
      for (int i = 0; i < 64; ++i) {
        const int lane = i / 4, byte = i % 4, position = lane * BITS + start + byte;
        byte_index[h][i] = static_cast<uint8_t>(position < 128 ? position : 0);
        second[h] |= static_cast<uint64_t>(byte_index[h][i] >= 64) << i;
      }
    }
  }
};
template <int BITS>
constexpr OctetHalf<BITS> kOctetHalf{};

// code - 2^(BITS-1), repeated so that stray higher bits of the index don't matter.
template <int BITS>
struct Table {
  alignas(64) float value[16];
  constexpr Table() : value() {
    for (int i = 0; i < 16; ++i) value[i] = static_cast<float>(i % (1 << BITS) - (1 << BITS) / 2);
  }
};
template <int BITS>
constexpr Table<BITS> kTable{};

// What a decoded value is above the code.
template <int BITS>
constexpr float kOffset = BITS <= 4 ? -static_cast<float>((1 << BITS) / 2) : 0.0f;

struct Masks {
  __mmask16 first, second;
};

template <int BITS>
TM_512 TM_ALWAYS __m512i half_octets(__m512i first, __m512i second, int h) {
  const __m512i index = _mm512_load_si512(kOctetHalf<BITS>.byte_index[h]);
  const __m512i low = _mm512_permutexvar_epi8(index, first);
  if (BITS <= 4) return low;
  return _mm512_mask_permutexvar_epi8(low, kOctetHalf<BITS>.second[h], index, second);
}

// 128 codes as eight vectors of 16 floats: vector j holds in lane d code 8d+j.
template <int BITS>
TM_512 TM_ALWAYS void decode_block(const uint8_t *codes, Masks masks, __m512 out[8]) {
  const __m512i first = _mm512_maskz_loadu_epi32(masks.first, codes);
  if (BITS <= 4) {
    const __m512 table = _mm512_load_ps(kTable<BITS <= 4 ? BITS : 4>.value);
    const __m512i octets = BITS == 4 ? first : half_octets<BITS>(first, first, 0);
    for (int j = 0; j < 8; ++j) out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(octets, j * BITS), table);
    return;
  }
  const __m512i second = _mm512_maskz_loadu_epi32(masks.second, codes + 64);
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  for (int h = 0; h < 2; ++h) {
    const __m512i octets = half_octets<BITS>(first, second, h);
    for (int i = 0; i < 4; ++i) {
      const int shift = 4 * BITS * h % 8 + i * BITS;
      out[4 * h + i] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(octets, shift), mask));
    }
  }
}

TM_512 TM_ALWAYS __m512 load_floats(const void *data, int64_t i, int kind, __mmask16 mask) {
  if (kind == kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + i);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + i);
  if (kind == kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The activations of one call in the order of the decoded codes, and their sums over each group.
struct Activations {
  int64_t M, blocks, padded_groups;  // groups rounded up to a multiple of 16, the rest zero
  std::unique_ptr<float[]> storage;
  float *values;  // [M][blocks][8][16], 64-byte aligned
  float *sums;    // [M][padded_groups]

  Activations(int64_t tokens, const Weight &w)
      : M(tokens), blocks((w.K + kBlock - 1) / kBlock), padded_groups((w.groups + 15) / 16 * 16) {
    storage.reset(new float[M * (blocks * kBlock + padded_groups) + 16]);
    values = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(storage.get()) + 63) / 64 * 64);
    sums = values + M * blocks * kBlock;
    std::memset(sums, 0, M * padded_groups * sizeof(float));
  }
};

TM_512 void permute_token(const void *x, int kind, int64_t token, const Weight &w, const Lanes &lanes,
                          Activations &a) {
  const __m512i octet = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  float *sums = a.sums + token * a.padded_groups;
  for (int64_t block = 0; block < a.blocks; ++block) {
    alignas(64) float natural[kBlock], octet_sums[16];
    for (int i = 0; i < 8; ++i) {
      const int64_t left = w.K - block * kBlock - 16 * i;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1u;
      _mm512_store_ps(natural + 16 * i, load_floats(x, token * w.K + block * kBlock + 16 * i, kind, mask));
    }
    float *out = a.values + (token * a.blocks + block) * kBlock;
    __m512 total = _mm512_setzero_ps();
    for (int j = 0; j < 8; ++j) {
      const __m512 codes = _mm512_i32gather_ps(octet, natural + j, 4);  // x of code 8d+j in lane d
      total = _mm512_add_ps(total, codes);
      _mm512_store_ps(out + 16 * j, codes);
    }
    _mm512_store_ps(octet_sums, total);
    const int32_t *lane = lanes.lane.get() + block * 16;
    for (int d = 0; d < 16; ++d) sums[lanes.first[block] + lane[d]] += octet_sums[d];
  }
}

constexpr int kRows = 2;      // rows at a time; four are 7 % slower with one token, 2 % faster with four
constexpr int kPadding = 16;  // a block's scales are loaded as one vector

// Scales and correction factors of `kRows` rows, in float32.
struct RowScales {
  int64_t stride;
  std::unique_ptr<float[]> scale, correction;
  explicit RowScales(int64_t groups)
      : stride(groups + kPadding), scale(new float[kRows * stride]()), correction(new float[kRows * stride]()) {}
};

TM_512 void load_scales(const Weight &w, int64_t row, int rows, float offset, RowScales &s) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < w.groups; g += 16) {
      const __mmask16 mask = w.groups - g >= 16 ? 0xffff : (1u << (w.groups - g)) - 1u;
      const int64_t i = (row + r) * w.groups + g;
      const __m512 scale = load_floats(w.scale, i, w.scale_kind, mask);
      __m512 zero = _mm512_set1_ps(static_cast<float>(1 << (w.bits - 1)));
      if (w.zero != nullptr)
        zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zero + i)));
      const __m512 shift = _mm512_sub_ps(_mm512_set1_ps(-offset), zero);
      _mm512_storeu_ps(s.scale.get() + r * s.stride + g, scale);
      _mm512_storeu_ps(s.correction.get() + r * s.stride + g, _mm512_mul_ps(scale, shift));
    }
  }
}

struct Call {
  const Weight &w;
  const Activations &a;
  const Lanes &lanes;
  const Output &out;
};

// Up to kRows rows, from `row`: the last is repeated where there are fewer.
struct RowPointers {
  const uint8_t *codes[kRows];
  const float *scale[kRows], *correction[kRows];
  int64_t ahead;  // bytes from a row to the one that is decoded next in its place

  TM_ALWAYS RowPointers(const Weight &w, int64_t row, int rows, const RowScales &s) : ahead(kRows * w.row_bytes) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t step = std::min(r, rows - 1);
      codes[r] = w.codes + (row + step) * w.row_bytes;
      scale[r] = s.scale.get() + step * s.stride;
      correction[r] = s.correction.get() + step * s.stride;
    }
  }
};

// Starts the sums with the zero points' share, sum over groups of scale * (-offset - zero) * sum(x).
template <int TOKENS>
TM_512 TM_ALWAYS void start_tile(const Call &call, int64_t token, const RowPointers &p,
                                 __m512 (&total)[kRows][TOKENS]) {
  const int64_t groups = call.a.padded_groups;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g += 16) {
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 sums = _mm512_loadu_ps(call.a.sums + (token + t) * groups + g);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        total[r][t] = _mm512_fmadd_ps(sums, _mm512_loadu_ps(p.correction[r] + g), total[r][t]);
    }
  }
}

template <int TOKENS>
TM_512 TM_ALWAYS void store_tile(const Call &call, int64_t token, int64_t row, int rows,
                                 __m512 (&total)[kRows][TOKENS]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) call.out.store(token + t, row + r, _mm512_reduce_add_ps(total[r][t]));
  }
}

template <int BITS>
TM_ALWAYS void prefetch_block(const uint8_t *codes) {
  __builtin_prefetch(codes);
  if (BITS > 4) __builtin_prefetch(codes + 64);
}

template <int BITS, int TOKENS>
TM_512 TM_ALWAYS void multiply_block(const RowPointers &p, const float *x, int64_t token_floats, int64_t block,
                                   Masks masks, const Lanes &lanes, __m512 (&total)[kRows][TOKENS]) {
  const __m512i lane = _mm512_loadu_si512(lanes.lane.get() + block * 16);
  const int64_t first = lanes.first[block];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const uint8_t *codes = p.codes[r] + block * (16 * BITS);
    prefetch_block<BITS>(codes + p.ahead);
    __m512 value[8];
    decode_block<BITS>(codes, masks, value);
    const __m512 scale = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(p.scale[r] + first));
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const float *xt = x + t * token_floats + block * kBlock;
      __m512 even = _mm512_mul_ps(value[0], _mm512_load_ps(xt));
      __m512 odd = _mm512_mul_ps(value[1], _mm512_load_ps(xt + 16));
#pragma GCC unroll 3
      for (int v = 2; v < 8; v += 2) {
        even = _mm512_fmadd_ps(value[v], _mm512_load_ps(xt + 16 * v), even);
        odd = _mm512_fmadd_ps(value[v + 1], _mm512_load_ps(xt + 16 * (v + 1)), odd);
      }
      total[r][t] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, total[r][t]);
    }
  }
}

template <int BITS>
constexpr Masks kFullBlock{static_cast<__mmask16>((1u << (BITS < 4 ? 4 * BITS : 16)) - 1u),
                           static_cast<__mmask16>((1u << (BITS > 4 ? 4 * BITS - 16 : 0)) - 1u)};

// The last block may have fewer words than the others.
template <int BITS>
TM_ALWAYS Masks last_block(const Weight &w, int64_t block) {
  const int64_t words = (w.row_bytes - block * (16 * BITS)) / 4;
  return {static_cast<__mmask16>(((1u << std::min<int64_t>(words, 16)) - 1u) & kFullBlock<BITS>.first),
          static_cast<__mmask16>(((1u << std::max<int64_t>(words - 16, 0)) - 1u) & kFullBlock<BITS>.second)};
}

// Rows row ... row+rows-1 times TOKENS tokens.
template <int BITS, int TOKENS>
TM_512 void tile(const Call &call, int64_t token, int64_t row, int rows, const RowScales &s) {
  const int64_t blocks = call.a.blocks, token_floats = blocks * kBlock;
  const float *x = call.a.values + token * token_floats;
  const RowPointers p(call.w, row, rows, s);
  __m512 total[kRows][TOKENS];
  start_tile<TOKENS>(call, token, p, total);
  for (int64_t block = 0; block + 1 < blocks; ++block)
    multiply_block<BITS, TOKENS>(p, x, token_floats, block, kFullBlock<BITS>, call.lanes, total);
  multiply_block<BITS, TOKENS>(p, x, token_floats, blocks - 1, last_block<BITS>(call.w, blocks - 1), call.lanes, total);
  store_tile<TOKENS>(call, token, row, rows, total);
}

template <int BITS>
void linear_rows_512(const Call &call, int64_t begin, int64_t end) {
  RowScales s(call.w.groups);
  for (int64_t row = begin; row < end; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - row));
    load_scales(call.w, row, rows, kOffset<BITS>, s);
    int64_t token = 0;  // from the second tile on the rows come from the nearest cache
    for (; token + 4 <= call.a.M; token += 4) tile<BITS, 4>(call, token, row, rows, s);
    if (token + 2 <= call.a.M) {
      tile<BITS, 2>(call, token, row, rows, s);
      token += 2;
    }
    if (token < call.a.M) tile<BITS, 1>(call, token, row, rows, s);
  }
}

template <int BITS>
void linear_512(const Weight &w, const void *x, int x_kind, int64_t M, const Output &out, int threads) {
  Activations a(M, w);
  const Lanes lanes(w, a.blocks, 16, 8);
  tensormill::parallel_ranges(M, 1, M * w.K >= 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) permute_token(x, x_kind, token, w, lanes, a);
  });
  const Call call{w, a, lanes, out};
  tensormill::parallel_ranges(out.N, kRows, threads,
                              [&](int64_t begin, int64_t end) { linear_rows_512<BITS>(call, begin, end); });
}

// ---------------------------------------------------------------- AMX
//
// For many bf16 tokens. A thread takes 32 rows and multiplies them with 32 tokens at a time: four accumulator tiles of
// 16 rows x 16 tokens, two tiles of weights and two of activations, 32 columns deep each. The weights are decoded,
// scaled and rounded to bf16 into a scratch of the tiles' layout: for one pair of token tiles a few blocks at a time,
// which stay in the first-level cache; for more tokens whole rows, which stay in the second-level cache and serve all.
#if defined(__linux__) && defined(__x86_64__)
#define TENSORMILL_AMX 1
#else
#define TENSORMILL_AMX 0
#endif

#if TENSORMILL_AMX
#define TM_AMX __attribute__((target(TM_512_FEATURES ",avx512bf16,amx-tile,amx-bf16")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kBlockTiles = 4;    // tiles of 32 columns in a block of 128
constexpr int64_t kShortChunk = 4;    // blocks decoded at a time for one pair of token tiles

struct Aligned {
  std::unique_ptr<uint8_t[]> storage;
  uint8_t *data;
  explicit Aligned(int64_t bytes)
      : storage(new uint8_t[bytes + 64]),
        data(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(storage.get()) + 63) / 64 * 64)) {}
};

// 16 tokens as tiles: tile (block, v) has in row p, column m the pair x[m, 128 block + 8p + 2v ... + 1].
TM_512 void tile_tokens(const uint16_t *x, int64_t first, int64_t M, int64_t K, int64_t blocks, uint8_t *tiles) {
  const int64_t width = blocks * kBlock, count = std::min(kTile, M - first);
  Aligned rows(kTile * width * 2);
  std::memset(rows.data, 0, kTile * width * 2);
  for (int64_t m = 0; m < count; ++m) std::memcpy(rows.data + m * width * 2, x + (first + m) * K, K * 2);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i token = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(width / 2)));
  const int *pairs = reinterpret_cast<const int *>(rows.data);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t v = 0; v < kBlockTiles; ++v)
      for (int64_t p = 0; p < kTile; ++p)
        _mm512_store_si512(tiles + (block * kBlockTiles + v) * kTileBytes + p * 64,
                           _mm512_i32gather_epi32(token, pairs + block * 64 + 4 * p + v, 4));
}

// Weights of blocks [begin, end) of up to 16 rows, as tiles from `out` on; the rows' scales are in `s`.
template <int BITS>
TM_AMX void tile_weights(const Weight &w, const Lanes &lanes, int64_t row, int rows, int64_t begin, int64_t end,
                         const float *scale, const float *correction, int64_t stride, uint8_t *out) {
  // _mm512_cvtne2ps_pbh leaves the two inputs one behind the other: interleave them
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int r = 0; r < rows; ++r) {
    const uint8_t *codes = w.codes + (row + r) * w.row_bytes;
    for (int64_t block = begin; block < end; ++block) {
      prefetch_block<BITS>(codes + (block + kShortChunk) * (16 * BITS));
      const Masks masks = (block + 1) * (16 * BITS) <= w.row_bytes ? kFullBlock<BITS> : last_block<BITS>(w, block);
      const __m512i lane = _mm512_loadu_si512(lanes.lane.get() + block * 16);
      const int64_t group = r * stride + lanes.first[block];
      const __m512 by = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scale + group));
      const __m512 plus = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(correction + group));
      __m512 value[8];
      decode_block<BITS>(codes + block * (16 * BITS), masks, value);
#pragma GCC unroll 4
      for (int v = 0; v < kBlockTiles; ++v) {
        const __m512 even = _mm512_fmadd_ps(value[2 * v], by, plus), odd = _mm512_fmadd_ps(value[2 * v + 1], by, plus);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(out + ((block - begin) * kBlockTiles + v) * kTileBytes + r * 64,
                           _mm512_permutexvar_epi16(interleave, both));
      }
    }
  }
}

// Adds `tiles` products to the accumulators 0 ... 3 = [row tile][token tile].
TM_AMX void multiply_tiles(const uint8_t *a0, const uint8_t *a1, const uint8_t *b0, const uint8_t *b1, int64_t tiles) {
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, a0 + t * kTileBytes, 64);
    _tile_loadd(6, b0 + t * kTileBytes, 64);
    _tile_loadd(5, a1 + t * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (b1 != nullptr) {
      _tile_loadd(7, b1 + t * kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

TM_AMX void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

TM_AMX void store_tiles(const Output &out, int64_t row, int64_t rows, int64_t token, int64_t M) {
  alignas(64) float sums[4][kTile][kTile];  // [row tile, token tile][row][token]
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  const int64_t tokens = std::min(2 * kTile, M - token);
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t r = 0; r < rows; ++r)
      out.store(token + m, row + r, sums[2 * (r / kTile) + m / kTile][r % kTile][m % kTile]);
}

template <int BITS>
TM_AMX void linear_rows_amx(const Weight &w, const Lanes &lanes, const uint8_t *x, int64_t M, int64_t blocks,
                            const Output &out, int64_t begin, int64_t end) {
  const int64_t token_tiles = (M + kTile - 1) / kTile, token_bytes = blocks * kBlockTiles * kTileBytes;
  const bool single = token_tiles <= 2;
  const int64_t chunk = single ? std::min(kShortChunk, blocks) : blocks;
  const int64_t half = chunk * kBlockTiles * kTileBytes;
  Aligned a(2 * half);
  std::memset(a.data, 0, 2 * half);  // rows past N
  RowScales quad(w.groups);
  const int64_t stride = quad.stride;
  std::unique_ptr<float[]> scale(new float[2 * kTile * stride]()), correction(new float[2 * kTile * stride]());
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t row = begin; row < end; row += 2 * kTile) {
    const int64_t rows = std::min(2 * kTile, end - row);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int some = static_cast<int>(std::min<int64_t>(kRows, rows - r));
      load_scales(w, row + r, some, kOffset<BITS>, quad);
      std::memcpy(scale.get() + r * stride, quad.scale.get(), some * stride * sizeof(float));
      std::memcpy(correction.get() + r * stride, quad.correction.get(), some * stride * sizeof(float));
    }
    if (single) clear_tiles();
    for (int64_t first = 0; first < blocks; first += chunk) {
      const int64_t last = std::min(blocks, first + chunk);
      for (int64_t h = 0; h < 2 && h * kTile < rows; ++h) {
        const int64_t at = h * kTile * stride;
        tile_weights<BITS>(w, lanes, row + h * kTile, static_cast<int>(std::min(kTile, rows - h * kTile)), first, last,
                           scale.get() + at, correction.get() + at, stride, a.data + h * half);
      }
      if (single) {
        const uint8_t *b = x + first * kBlockTiles * kTileBytes;
        multiply_tiles(a.data, a.data + half, b, token_tiles > 1 ? b + token_bytes : nullptr,
                       (last - first) * kBlockTiles);
      }
    }
    if (single) store_tiles(out, row, rows, 0, M);
    for (int64_t t = 0; t < token_tiles && !single; t += 2) {
      const uint8_t *b = x + t * token_bytes;
      clear_tiles();
      multiply_tiles(a.data, a.data + half, b, t + 1 < token_tiles ? b + token_bytes : nullptr, blocks * kBlockTiles);
      store_tiles(out, row, rows, t * kTile, M);
    }
  }
  _tile_release();
}

template <int BITS>
void linear_amx(const Weight &w, const void *x, int64_t M, const Output &out, int threads) {
  const int64_t blocks = (w.K + kBlock - 1) / kBlock, token_tiles = (M + kTile - 1) / kTile;
  const int64_t token_bytes = blocks * kBlockTiles * kTileBytes;
  Aligned tiles(token_tiles * token_bytes);
  tensormill::parallel_ranges(token_tiles, 1, M * w.K >= 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      tile_tokens(static_cast<const uint16_t *>(x), t * kTile, M, w.K, blocks, tiles.data + t * token_bytes);
  });
  const Lanes lanes(w, blocks, 16, 8);
  tensormill::parallel_ranges(out.N, 2 * kTile, threads, [&](int64_t begin, int64_t end) {
    linear_rows_amx<BITS>(w, lanes, tiles.data, M, blocks, out, begin, end);
  });
}
#endif  // TENSORMILL_AMX

// 64 codes of a row in natural order, a byte each.
template <int BITS>
struct Natural {
  alignas(64) uint8_t byte_index[64];
  alignas(64) uint8_t bit_shift[64];
  constexpr Natural() : byte_index(), bit_shift() {
    for (int i = 0; i < 64; ++i) {
      byte_index[i] = static_cast<uint8_t>(std::min(63, i / 8 * BITS + i % 8));
      bit_shift[i] = static_cast<uint8_t>(i % 8 * BITS);
    }
  }
};
template <int BITS>
constexpr Natural<BITS> kNatural{};

TM_512 TM_ALWAYS void store_floats(void *out, int64_t i, int kind, __mmask16 mask, __m512 value) {
  if (kind == kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float *>(out) + i, mask, value);
    return;
  }
  __m256i bits;
  if (kind == kFloat16) {
    bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i pattern = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(pattern, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(pattern, _mm512_set1_epi32(0x7fff)), odd);
    bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out) + i, mask, bits);
}

template <int BITS>
TM_512 void dequantize_rows_512(const Weight &w, void *out, int kind, int64_t begin, int64_t end) {
  RowScales s(w.groups);
  const __m512i index = _mm512_load_si512(kNatural<BITS>.byte_index);
  const __m512i shifts = _mm512_load_si512(kNatural<BITS>.bit_shift);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  const int64_t span = w.groups == 1 ? w.K : w.group_size;
  for (int64_t row = begin; row < end; ++row) {
    load_scales(w, row, 1, 0.0f, s);
    if (w.zero != nullptr) {
      for (int64_t g = 0; g < w.groups; ++g) s.correction[g] = static_cast<float>(w.zero[row * w.groups + g]);
    } else {
      for (int64_t g = 0; g < w.groups; ++g) s.correction[g] = static_cast<float>(1 << (BITS - 1));
    }
    const uint8_t *codes = w.codes + row * w.row_bytes;
    int64_t group = 0, group_end = span;
    for (int64_t k = 0; k < w.K; k += 64) {
      const int64_t at = k / 8 * BITS, left = std::min<int64_t>(w.row_bytes - at, 8 * BITS);
      const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1ull;
      __m512i q = _mm512_maskz_loadu_epi8(bytes, codes + at);
      if (BITS < 8) {
        q = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(index, q));
        q = _mm512_and_si512(q, mask);
      }
      const __m128i code[4] = {_mm512_castsi512_si128(q), _mm512_extracti32x4_epi32(q, 1),
                               _mm512_extracti32x4_epi32(q, 2), _mm512_extracti32x4_epi32(q, 3)};
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int64_t column = k + 16 * part;
        if (column >= w.K) break;
        if (column >= group_end) {
          ++group;
          group_end += span;
        }
        const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code[part]));
        const __m512 weight =
            _mm512_mul_ps(_mm512_sub_ps(value, _mm512_set1_ps(s.correction[group])), _mm512_set1_ps(s.scale[group]));
        const int64_t columns = w.K - column;
        store_floats(out, row * w.K + column, kind, columns >= 16 ? 0xffff : (1u << columns) - 1u, weight);
      }
    }
  }
}

template <int BITS>
void dequantize_512(const Weight &w, void *out, int kind, int64_t N, int threads) {
  tensormill::parallel_ranges(N, 4, threads, [&](int64_t begin, int64_t end) {
    dequantize_rows_512<BITS>(w, out, kind, begin, end);
  });
}

#endif  // TENSORMILL_X86

// ---------------------------------------------------------------- entry points

#if TENSORMILL_X86
template <int BITS>
bool takes_vnni(const Weight &w) {
  return vnni::takes<BITS>(w.groups, w.group_size, 1, 0);
}

// Whether the call was computed with 8-bit products.
template <int BITS>
bool linear_vnni(const Weight &w, const void *x, int x_kind, int64_t M, const Output &out, int threads) {
  return vnni::takes<BITS>(w.groups, w.group_size, 1, 0) && vnni::linear_of_floats<BITS>(w, x, x_kind, M, out, threads);
}
#endif

#define TM_DISPATCH_BITS(FUNCTION, ...)        \
  switch (w.bits) {                            \
    case 1: return FUNCTION<1>(__VA_ARGS__);   \
    case 2: return FUNCTION<2>(__VA_ARGS__);   \
    case 3: return FUNCTION<3>(__VA_ARGS__);   \
    case 4: return FUNCTION<4>(__VA_ARGS__);   \
    case 5: return FUNCTION<5>(__VA_ARGS__);   \
    case 6: return FUNCTION<6>(__VA_ARGS__);   \
    case 7: return FUNCTION<7>(__VA_ARGS__);   \
    default: return FUNCTION<8>(__VA_ARGS__);  \
  }

constexpr int64_t kDecodedTokens = 4;     // up to here AVX-512 beats AMX, whose tiles hold 16 tokens

// Multiply-adds below which waking another thread costs more than it saves.
int64_t serial_work() { return instruction_set() == tensormill::kPortable ? 1 << 15 : 1 << 19; }

Weight make_weight(uintptr_t codes, uintptr_t scale, uintptr_t zero, int64_t K, int64_t row_words, int64_t groups,
                   int64_t group_size, int bits, int scale_kind) {
  return {reinterpret_cast<const uint8_t *>(codes),
          reinterpret_cast<const void *>(scale),
          reinterpret_cast<const uint8_t *>(zero),
          K,
          row_words * 4,
          groups,
          group_size < 0 ? K : group_size,
          bits,
          scale_kind};
}

// Whether 16-bit activations are multiplied with 8-bit products.
bool multiplies_bytes(int64_t groups, int64_t group_size, int bits) {
#if TENSORMILL_X86
  Weight w{};
  w.groups = groups;
  w.group_size = group_size;
  w.bits = bits;
  if (instruction_set() < tensormill::kVnni) return false;
  TM_DISPATCH_BITS(takes_vnni, w)
#else
  static_cast<void>(groups), static_cast<void>(group_size), static_cast<void>(bits);
  return false;
#endif
}

// y [M, N] = x [M, K] W^T + bias, all contiguous; zero and bias may be null.
void linear(uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t bias, uintptr_t y, int64_t M,
            int64_t N, int64_t K, int64_t row_words, int64_t groups, int64_t group_size, int bits, int x_kind,
            int scale_kind, int bias_kind, int threads) {
  const Weight w = make_weight(codes, scale, zero, K, row_words, groups, group_size, bits, scale_kind);
  const Output out{reinterpret_cast<void *>(y), reinterpret_cast<const void *>(bias), N, x_kind, bias_kind};
  const void *values = reinterpret_cast<const void *>(x);
  if (M * N * K < serial_work()) threads = 1;
#if TENSORMILL_X86
  const bool whole_octets = groups == 1 || group_size % 8 == 0;
#if TENSORMILL_AMX
  if (M > kDecodedTokens && x_kind == kBFloat16 && whole_octets && instruction_set() == tensormill::kAmx) {
    TM_DISPATCH_BITS(linear_amx, w, values, M, out, threads)
  }
#endif
  const auto of_integers = [&] { TM_DISPATCH_BITS(linear_vnni, w, values, x_kind, M, out, threads) };
  if (x_kind != kFloat32 && instruction_set() >= tensormill::kVnni && of_integers()) return;
  if (instruction_set() >= tensormill::kVbmi && whole_octets) {
    TM_DISPATCH_BITS(linear_512, w, values, x_kind, M, out, threads)
  }
  if (instruction_set() >= tensormill::kAvx2 && whole_octets) {
    TM_DISPATCH_BITS(avx2::linear, w, values, x_kind, M, out, threads)
  }
#endif
  std::unique_ptr<float[]> single(new float[M * K]);
  for (int64_t i = 0; i < M * K; ++i) single[i] = load_float(values, i, x_kind);
  tensormill::parallel_ranges(N, 1, threads, [&](int64_t begin, int64_t end) {
#if TENSORMILL_X86
    if (instruction_set() >= tensormill::kAvx2) return linear_rows_avx2(w, single.get(), M, out, begin, end);
#endif
    linear_rows_portable(w, single.get(), M, out, begin, end);
  });
}

// out [N, K] = (code - zero) * scale.
void dequantize(uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t out, int64_t N, int64_t K,
                int64_t row_words, int64_t groups, int64_t group_size, int bits, int scale_kind, int out_kind,
                int threads) {
  const Weight w = make_weight(codes, scale, zero, K, row_words, groups, group_size, bits, scale_kind);
  void *target = reinterpret_cast<void *>(out);
  if (N * K < serial_work()) threads = 1;
#if TENSORMILL_X86
  if (instruction_set() >= tensormill::kVbmi && (groups == 1 || group_size % 16 == 0)) {
    TM_DISPATCH_BITS(dequantize_512, w, target, out_kind, N, threads)
  }
  if (instruction_set() >= tensormill::kAvx2 && (groups == 1 || group_size % 8 == 0)) {
    TM_DISPATCH_BITS(avx2::dequantize, w, target, out_kind, N, threads)
  }
#endif
  tensormill::parallel_ranges(N, 1, threads, [&](int64_t begin, int64_t end) {
#if TENSORMILL_X86
    if (instruction_set() >= tensormill::kAvx2) return dequantize_rows_avx2(w, target, out_kind, begin, end);
#endif
    dequantize_rows_portable(w, target, out_kind, begin, end);
  });
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.def("dequantize", &dequantize, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiplies_bytes", &multiplies_bytes);
  m.def("instruction_set", &tensormill::instruction_set_name);
}
