// Linear layer with low-bit weights and 8-bit activations on the CPU.
//
// Sums of integers are exact; scales and zero points are applied in float32 to sums over a *segment*, columns that
// share a scale of the weight and one of the activations. AVX-512 VNNI has a kernel of its own (integer_products.h).
// The others decode a row of weights to a byte per code, once for all tokens, and multiply it with the tokens' codes as
// they lie in memory: AVX-VNNI like AVX-512 VNNI, AVX2 by VPMADDUBSW, whose 16-bit sums of products are exact up to 7 bits,
// and by 16-bit products for 8 bits.
#include <nanobind/nanobind.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "integer_products.h"
#include "isa.h"
#include "packed_weight.h"

namespace nb = nanobind;

using namespace tensormill::low_bit;
using tensormill::half_to_float;
using tensormill::instruction_set;

namespace {

#if defined(__GNUC__)
#define TM_INLINE inline __attribute__((always_inline))
#else
#define TM_INLINE inline
#endif

// Activations: int8 codes [M][K] and their units [M][units].
struct Codes {
  const int8_t *values;
  const float *unit;
  int64_t M, K, units, unit_size;
};

// ---------------------------------------------------------------- quantizing activations, as quantize_activations does

constexpr float kSmallest = 0x1p-100f, kLimit = 127.0f;

template <int KIND>
TM_INLINE void quantize_token_body(const void *x, int64_t first, int64_t K, int64_t unit_size, float *natural,
                                   int8_t *codes, float *unit) {
  for (int64_t begin = 0; begin < K; begin += unit_size) {
    const int64_t count = std::min(unit_size, K - begin);
    uint32_t largest_bits = 0;  // as integers magnitudes have the same order, and NaN is above all of them
    for (int64_t i = 0; i < count; ++i) {
      natural[i] = load_float(x, first + begin + i, KIND);
      uint32_t bits;
      std::memcpy(&bits, natural + i, 4);
      largest_bits = std::max(largest_bits, bits & 0x7fffffffu);
    }
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    if (largest_bits >= 0x7f800000u) {
      std::memset(codes + begin, 0, count);
      unit[begin / unit_size] = std::nanf("");
      continue;
    }
    largest = std::max(largest, kSmallest);
    const float inverse = kLimit / largest;
    for (int64_t i = 0; i < count; ++i) codes[begin + i] = static_cast<int8_t>(__builtin_rintf(natural[i] * inverse));
    unit[begin / unit_size] = largest / kLimit;
  }
}

#if TENSORMILL_X86
__attribute__((target("avx2,fma,f16c"))) void widen_halves(const uint16_t *from, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}
#endif

#define TM_QUANTIZE(NAME, ...)                                                                                  \
  __VA_ARGS__ void NAME(const void *x, int kind, int64_t first, int64_t K, int64_t size, float *natural,        \
                        int8_t *codes, float *unit) {                                                           \
    if (kind == kFloat32) return quantize_token_body<kFloat32>(x, first, K, size, natural, codes, unit);        \
    if (kind == kBFloat16) return quantize_token_body<kBFloat16>(x, first, K, size, natural, codes, unit);      \
    quantize_token_body<kFloat16>(x, first, K, size, natural, codes, unit);                                     \
  }
TM_QUANTIZE(quantize_token_portable)
#if TENSORMILL_X86
TM_QUANTIZE(quantize_token_avx2, __attribute__((target("avx2,fma,f16c"))))
TM_QUANTIZE(quantize_token_avx512, __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

void quantize(const void *x, int kind, int64_t M, int64_t K, int64_t unit_size, int8_t *codes, float *unit,
              int threads) {
  const int64_t units = (K + unit_size - 1) / unit_size;
  tensormill::parallel_ranges(M, 1, M * K >= 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> natural(new float[std::min(unit_size, K)]), wide(new float[kind == kFloat16 ? K : 0]);
    for (int64_t t = begin; t < end; ++t) {
      const auto run = [&](auto quantize_token) {
        quantize_token(x, kind, t * K, K, unit_size, natural.get(), codes + t * K, unit + t * units);
      };
#if TENSORMILL_X86
      if (kind == kFloat16 && instruction_set() >= tensormill::kAvx2) {
        widen_halves(static_cast<const uint16_t *>(x) + t * K, K, wide.get());
        const bool avx512 = instruction_set() >= tensormill::kAvx512;
        (avx512 ? quantize_token_avx512 : quantize_token_avx2)(wide.get(), kFloat32, 0, K, unit_size, natural.get(), codes + t * K, unit + t * units);
        continue;
      }
      if (instruction_set() >= tensormill::kAvx512) {
        run(quantize_token_avx512);
        continue;
      }
      if (instruction_set() >= tensormill::kAvx2) {
        run(quantize_token_avx2);
        continue;
      }
#endif
      run(quantize_token_portable);
    }
  });
}

// ---------------------------------------------------------------- a row at a time

// Codes of one row, a byte each; up to 7 bytes are written past K.
void decode_row(const Weight &w, int64_t row, uint8_t *out) {
  const uint8_t *codes = w.codes + row * w.row_bytes;
  const uint32_t mask = (1u << w.bits) - 1u;
  for (int64_t k = 0; k < w.K; k += 8, codes += w.bits) {
    uint64_t octet = 0;
    const int64_t left = w.codes + (row + 1) * w.row_bytes - codes;
    if (left >= 8) {
      std::memcpy(&octet, codes, 8);
    } else {
      std::memcpy(&octet, codes, std::min<int64_t>(w.bits, left));
    }
    for (int j = 0; j < 8; ++j) out[k + j] = static_cast<uint8_t>(octet >> (j * w.bits) & mask);
  }
}

// Segments, and each token's sums of codes over them.
struct Segments {
  int64_t size, count;
  std::unique_ptr<int32_t[]> sums;  // [M][count]

  Segments(const Weight &w, const Codes &x)
      : size(std::gcd(w.groups == 1 ? w.K : w.group_size, x.units == 1 ? x.K : x.unit_size)),
        count((w.K + size - 1) / size),
        sums(new int32_t[x.M * count]) {
    for (int64_t t = 0; t < x.M; ++t)
      for (int64_t i = 0; i < count; ++i) {
        const int8_t *from = x.values + t * x.K;
        sums[t * count + i] = std::accumulate(from + i * size, from + std::min(w.K, (i + 1) * size), 0);
      }
  }
};

TM_INLINE int64_t group_of(int64_t column, int64_t groups, int64_t size) { return groups == 1 ? 0 : column / size; }

int32_t dot_portable(const uint8_t *codes, const int8_t *x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += codes[i] * x[i];
  return sum;
}

void linear_rows_portable(const Weight &w, const Codes &x, const Segments &segments, const Output &out, int64_t begin,
                          int64_t end) {
  std::unique_ptr<uint8_t[]> codes(new uint8_t[w.K + 64]);
  for (int64_t row = begin; row < end; ++row) {
    decode_row(w, row, codes.get());
    for (int64_t t = 0; t < x.M; ++t) {
      float total = 0;
      for (int64_t i = 0; i < segments.count; ++i) {
        const int64_t column = i * segments.size, g = row * w.groups + group_of(column, w.groups, w.group_size);
        const int32_t zero = w.zero != nullptr ? w.zero[g] : 1 << (w.bits - 1);
        const int32_t exact =
            dot_portable(codes.get() + column, x.values + t * x.K + column, std::min(segments.size, w.K - column));
        total += static_cast<float>(exact - zero * segments.sums[t * segments.count + i]) *
                 (load_float(w.scale, g, w.scale_kind) *
                  x.unit[t * x.units + group_of(column, x.units, x.unit_size)]);
      }
      out.store(t, row, total);
    }
  }
}

#if TENSORMILL_X86
#define TM_AVX2_FEATURES "avx2,fma,f16c,bmi,bmi2"
#define TM_AVX2 __attribute__((target(TM_AVX2_FEATURES)))
#define TM_AVX_VNNI __attribute__((target(TM_AVX2_FEATURES ",avxvnni")))

// Codes of one row, a byte each, 32 at a time where bytes hold whole codes, else eight by one PDEP. Up to 32 bytes are
// written past K.
TM_AVX2 inline void decode_row_avx2(const Weight &w, int64_t row, uint8_t *out) {
  const uint8_t *codes = w.codes + row * w.row_bytes;
  int64_t k = 0, at = 0;
  const auto store = [&](__m256i value) TM_AVX2 { _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + k), value); };
  if (w.bits == 2) {
    const __m256i mask = _mm256_set1_epi8(3);
    for (; k < w.K && at + 8 <= w.row_bytes; k += 32, at += 8) {  // a byte's codes to the four bytes of a lane
      const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + at)));
      const __m256i twice = _mm256_or_si256(byte, _mm256_slli_epi32(byte, 12));
      store(_mm256_and_si256(_mm256_or_si256(twice, _mm256_slli_epi32(twice, 6)), mask));
    }
  } else if (w.bits == 4) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (; k < w.K && at + 16 <= w.row_bytes; k += 32, at += 16) {  // a byte's codes to the two bytes of a lane
      const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + at)));
      store(_mm256_and_si256(_mm256_or_si256(byte, _mm256_slli_epi16(byte, 4)), mask));
    }
  }
  const uint64_t mask = 0x0101010101010101u * ((1u << w.bits) - 1u);
  for (; k < w.K; k += 8, at += w.bits) {
    uint64_t octet = 0;
    if (at + 8 <= w.row_bytes) {
      std::memcpy(&octet, codes + at, 8);
    } else {
      std::memcpy(&octet, codes + at, w.row_bytes - at);
    }
    octet = _pdep_u64(octet, mask);
    std::memcpy(out + k, &octet, 8);
  }
}

TM_AVX2 TM_INLINE __m256i load_bytes(const void *from) {
  return _mm256_loadu_si256(static_cast<const __m256i *>(from));
}

TM_AVX2 TM_INLINE __m256i with_tail(__m256i sum, const uint8_t *codes, const int8_t *x, int64_t count) {
  if (count == 0) return sum;
  return _mm256_add_epi32(sum, _mm256_setr_epi32(dot_portable(codes, x, count), 0, 0, 0, 0, 0, 0, 0));
}

// Exact sums of products, in eight lanes. Two products fit 16 bits with sign up to 7 bits, sixteen up to 4 bits.
template <int STEPS>
TM_AVX2 TM_INLINE __m256i multiply_bytes(const uint8_t *codes, const int8_t *x, int64_t count) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  int64_t i = 0;
  while (i + 32 <= count) {
    __m256i pairs = _mm256_maddubs_epi16(load_bytes(codes + i), load_bytes(x + i));
    i += 32;
    for (int step = 1; step < STEPS && i + 32 <= count; ++step, i += 32)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(load_bytes(codes + i), load_bytes(x + i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
  }
  return with_tail(sum, codes + i, x + i, count - i);
}

TM_AVX2 TM_INLINE __m256i multiply_words(const uint8_t *codes, const int8_t *x, int64_t count) {
  __m256i sum = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    sum = _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i))),
                               _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i)))));
  return with_tail(sum, codes + i, x + i, count - i);
}

TM_AVX_VNNI TM_INLINE __m256i multiply_vnni(const uint8_t *codes, const int8_t *x, int64_t count) {
  __m256i sum = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) sum = _mm256_dpbusd_avx_epi32(sum, load_bytes(codes + i), load_bytes(x + i));
  return with_tail(sum, codes + i, x + i, count - i);
}

TM_AVX2 TM_INLINE float sum_of(__m256 lanes) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Row by row, decoded once for all tokens. Sums of segments are scaled in eight lanes, and added up at the end.
template <class Multiply>
TM_AVX2 TM_INLINE void linear_rows_body(const Weight &w, const Codes &x, const Segments &segments, const Output &out,
                                        int64_t begin, int64_t end, Multiply &&multiply) {
  std::unique_ptr<uint8_t[]> codes(new uint8_t[w.K + 64]);
  std::unique_ptr<float[]> scale(new float[2 * segments.count]);
  float *const by_zero = scale.get() + segments.count;
  for (int64_t row = begin; row < end; ++row) {
    decode_row_avx2(w, row, codes.get());
    for (int64_t i = 0; i < segments.count; ++i) {
      const int64_t g = row * w.groups + group_of(i * segments.size, w.groups, w.group_size);
      scale[i] = load_float(w.scale, g, w.scale_kind);
      by_zero[i] = scale[i] * static_cast<float>(w.zero != nullptr ? w.zero[g] : 1 << (w.bits - 1));
    }
    for (int64_t t = 0; t < x.M; ++t) {
      __m256 total = _mm256_setzero_ps();
      float share = 0;
      for (int64_t i = 0; i < segments.count; ++i) {
        const int64_t column = i * segments.size;
        const float unit = x.units == 1 ? x.unit[t] : x.unit[t * x.units + column / x.unit_size];
        const __m256i exact =
            multiply(codes.get() + column, x.values + t * x.K + column, std::min(segments.size, w.K - column));
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_set1_ps(scale[i] * unit), total);
        share += by_zero[i] * unit * static_cast<float>(segments.sums[t * segments.count + i]);
      }
      out.store(t, row, sum_of(total) - share);
    }
  }
}

bool has_avx_vnni() {
  static const bool yes = tensormill::has_avx2() && __builtin_cpu_supports("avxvnni");
  return yes;
}

TM_AVX2 void linear_rows_avx2(const Weight &w, const Codes &x, const Segments &segments, const Output &out,
                              int64_t begin, int64_t end) {
  if (w.bits == 8) return linear_rows_body(w, x, segments, out, begin, end, multiply_words);
  if (w.bits > 4) return linear_rows_body(w, x, segments, out, begin, end, multiply_bytes<1>);
  linear_rows_body(w, x, segments, out, begin, end, multiply_bytes<8>);
}

TM_AVX_VNNI void linear_rows_avx_vnni(const Weight &w, const Codes &x, const Segments &segments, const Output &out,
                                      int64_t begin, int64_t end) {
  linear_rows_body(w, x, segments, out, begin, end, multiply_vnni);
}

template <int BITS>
bool linear_vnni(const Weight &w, const Codes &x, const Output &out, bool tables, int threads) {
  if (!vnni::takes<BITS>(w.groups, w.group_size, x.units, x.unit_size)) return false;
  if constexpr (BITS <= 2) {
    if (tables) {
      vnni::linear_of_codes<BITS, true>(w, x.values, x.unit, x.units, x.unit_size, x.M, out, threads);
      return true;
    }
  }
  vnni::linear_of_codes<BITS>(w, x.values, x.unit, x.units, x.unit_size, x.M, out, threads);
  return true;
}

bool linear_vnni(const Weight &w, const Codes &x, const Output &out, bool tables, int threads) {
  switch (w.bits) {
    case 1: return linear_vnni<1>(w, x, out, tables, threads);
    case 2: return linear_vnni<2>(w, x, out, tables, threads);
    case 3: return linear_vnni<3>(w, x, out, tables, threads);
    case 4: return linear_vnni<4>(w, x, out, tables, threads);
    case 5: return linear_vnni<5>(w, x, out, tables, threads);
    case 6: return linear_vnni<6>(w, x, out, tables, threads);
    case 7: return linear_vnni<7>(w, x, out, tables, threads);
    default: return linear_vnni<8>(w, x, out, tables, threads);
  }
}
#endif  // TENSORMILL_X86

// ---------------------------------------------------------------- entry point

constexpr int64_t kSerialWork = 1 << 19;  // multiply-adds below which waking another thread costs more than it saves

// y [M, N] = x [M, K] W^T + bias, all contiguous; zero and bias may be null. x are int8 codes with float32 units
// [M, units]; or floats of x_kind where unit is null. `tables` asks for look-ups, where there is such a kernel.
void linear(uintptr_t x, int x_kind, uintptr_t unit, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t bias,
            uintptr_t y, int64_t M, int64_t N, int64_t K, int64_t row_words, int64_t groups, int64_t group_size,
            int64_t units, int64_t unit_size, int bits, int scale_kind, int bias_kind, int y_kind, bool tables,
            int threads) {
  const Weight w{reinterpret_cast<const uint8_t *>(codes),
                 reinterpret_cast<const void *>(scale),
                 reinterpret_cast<const uint8_t *>(zero),
                 K,
                 row_words * 4,
                 groups,
                 group_size < 0 ? K : group_size,
                 bits,
                 scale_kind};
  const Output out{reinterpret_cast<void *>(y), reinterpret_cast<const void *>(bias), N, y_kind, bias_kind};
  if (M * N * K < kSerialWork) threads = 1;
  Codes given{reinterpret_cast<const int8_t *>(x), reinterpret_cast<const float *>(unit), M, K, units,
              unit_size < 0 ? K : unit_size};
  std::unique_ptr<int8_t[]> quantized;
  std::unique_ptr<float[]> quantized_unit;
  if (unit == 0) {
    quantized.reset(new int8_t[M * K]);
    quantized_unit.reset(new float[M * units]);
    quantize(reinterpret_cast<const void *>(x), x_kind, M, K, given.unit_size, quantized.get(), quantized_unit.get(),
             threads);
    given.values = quantized.get();
    given.unit = quantized_unit.get();
  }
#if TENSORMILL_X86
  if (instruction_set() >= tensormill::kVnni && linear_vnni(w, given, out, tables, threads)) return;
#else
  static_cast<void>(tables);
#endif
  const Segments segments(w, given);
  tensormill::parallel_chunks(N, 1, threads, [&](int64_t begin, int64_t end) {
#if TENSORMILL_X86
    if (instruction_set() >= tensormill::kAvx2 && has_avx_vnni())
      return linear_rows_avx_vnni(w, given, segments, out, begin, end);
    if (instruction_set() >= tensormill::kAvx2) return linear_rows_avx2(w, given, segments, out, begin, end);
#endif
    linear_rows_portable(w, given, segments, out, begin, end);
  });
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.def("instruction_set", &tensormill::instruction_set_name);
}
